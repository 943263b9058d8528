// Python's view of StepControl and StepGraph. Addresses, streams and graphs are integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "runtime/step_control.h"
#include "runtime/step_graph.h"

namespace py = pybind11;

namespace ddit_rt {
namespace {

constexpr const char* kVelocityTypes[] = {"float32", "bfloat16", "float16"};

VelocityType velocity_type(const std::string& name) {
  for (int i = 0; i < 3; ++i) {
    if (name == kVelocityTypes[i]) return static_cast<VelocityType>(i);
  }
  throw py::value_error("velocity type '" + name + "', expected float32, bfloat16 or float16");
}

// Takes every address that the spec has, and nothing else.
void set_addresses(LoopSpec& spec, std::map<std::string, uintptr_t> addresses) {
  const std::pair<const char*, uintptr_t*> fields[] = {
      {"latents", &spec.latents},
      {"past", &spec.past},
      {"velocity", &spec.velocity},
      {"past_velocities", &spec.past_velocities},
      {"coefficients", &spec.coefficients},
      {"forced", &spec.forced},
      {"thresholds", &spec.thresholds},
      {"moments", &spec.moments},
      {"keys", &spec.keys},
      {"scores", &spec.scores},
      {"state", &spec.state},
      {"settings", &spec.settings},
      {"increments", &spec.increments},
      {"signal", &spec.signal},
      {"cache", &spec.cache},
      {"stages", &spec.stages},
  };
  for (const auto& [name, target] : fields) {
    const auto found = addresses.find(name);
    if (found == addresses.end()) throw py::value_error(std::string("no address for ") + name);
    *target = found->second;
    addresses.erase(found);
  }
  if (!addresses.empty()) {
    throw py::value_error("unknown buffer " + addresses.begin()->first);
  }
}

LoopSpec make_spec(const std::vector<int64_t>& shape, const std::vector<int64_t>& sizes,
                   const std::string& type, int velocity_slots, int64_t capacity) {
  if (shape.size() != 5) throw py::value_error("a latent shape is [B, C, F, H, W]");
  LoopSpec spec;
  spec.batch = shape[0];
  spec.channels = shape[1];
  spec.frames = shape[2];
  spec.height = shape[3];
  spec.width = shape[4];
  spec.sizes = sizes;
  spec.velocity_type = velocity_type(type);
  spec.velocity_slots = velocity_slots;
  spec.capacity = capacity;
  return spec;
}

cudaStream_t stream_of(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }
cudaGraph_t graph_of(uintptr_t graph) { return reinterpret_cast<cudaGraph_t>(graph); }

std::vector<BucketGraph> bucket_graphs(
    const std::vector<std::pair<std::string, uintptr_t>>& buckets) {
  std::vector<BucketGraph> result;
  for (const auto& [name, graph] : buckets) result.push_back({name, graph_of(graph)});
  return result;
}

StepGraph::Form graph_form(const std::string& form) {
  if (form == "loop") return StepGraph::Form::kLoop;
  if (form == "step") return StepGraph::Form::kStep;
  throw py::value_error("form '" + form + "', expected loop or step");
}

py::list records_of(const StepControl& control) {
  py::list rows;
  for (const StepRecord& record : control.records()) {
    rows.append(py::make_tuple(record.time_ns, record.values));
  }
  return rows;
}

py::list cache_records_of(const StepControl& control) {
  py::list rows;
  for (const StepRecord& record : control.records()) {
    rows.append(py::make_tuple(static_cast<int>(record.cache), record.accumulated));
  }
  return rows;
}

void bind_control(py::module_& m) {
  py::class_<RunProgress>(m, "RunProgress", py::module_local(), "How far a run has come.")
      .def_readonly("decided", &RunProgress::decided)
      .def_readonly("finished", &RunProgress::finished)
      .def_readonly("cancelled", &RunProgress::cancelled)
      .def_readonly("nonfinite", &RunProgress::nonfinite);

  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<StepControl, std::shared_ptr<StepControl>>(
      m, "StepControl", py::module_local(),
      "Kernels and progress of the step loop of one captured shape. `owner` is kept alive: "
      "whatever holds the buffers behind the addresses. `patience`: seconds that destructors wait "
      "for the last launch; what it uses is left alone if that was not enough.")
      .def(py::init([](std::map<std::string, uintptr_t> addresses,
                       const std::vector<int64_t>& shape, const std::vector<int64_t>& sizes,
                       const std::string& type, int velocity_slots, int64_t capacity, int device,
                       const py::object&, int cache_rows, int stages, double patience) {
             LoopSpec spec = make_spec(shape, sizes, type, velocity_slots, capacity);
             set_addresses(spec, std::move(addresses));
             spec.cache_rows = cache_rows;
             spec.stage_count = stages;
             return std::make_shared<StepControl>(spec, device, patience);
           }),
           py::arg("addresses"), py::kw_only(), py::arg("shape"), py::arg("sizes"),
           py::arg("velocity_type"), py::arg("velocity_slots"), py::arg("capacity"),
           py::arg("device"), py::arg("owner"), py::arg("cache_rows") = 0, py::arg("stages") = 1,
           py::arg("patience") = 120.0, py::keep_alive<1, 9>())
      .def(
          "begin", [](StepControl& c, uintptr_t s) { c.begin(stream_of(s)); }, py::arg("stream"),
          Release())
      .def(
          "decide", [](StepControl& c, uintptr_t s) { c.decide(stream_of(s)); }, py::arg("stream"),
          Release())
      .def(
          "update", [](StepControl& c, uintptr_t s) { c.update(stream_of(s)); }, py::arg("stream"),
          Release())
      .def(
          "finish", [](StepControl& c, uintptr_t s) { c.finish(stream_of(s)); }, py::arg("stream"),
          Release())
      .def("cancel", &StepControl::cancel, "Stops the current run before its next step.")
      .def("abandon", &StepControl::abandon, "The device hangs: destructors wait no more.")
      .def("progress", &StepControl::progress)
      .def("wait", &StepControl::wait, py::arg("decided"), py::arg("seconds"), Release(),
           "Waits until more than `decided` steps are decided or the run is over.")
      .def("bucket", &StepControl::bucket, py::arg("step"), "The bucket of a decided step.")
      .def("branch", &StepControl::branch, py::arg("step"),
           "What a decided step runs, among the graphs of its stage: its bucket, or S + 1 + i to "
           "reuse the residual of bucket i.")
      .def("cache_records", &cache_records_of,
           "Per decided step: CacheReason and the accumulated change.")
      .def("records", &records_of,
           "Per decided step: device time in ns, and [bucket, reason, run length, scores...].")
      .def("end_ns", &StepControl::end_ns);
}

void bind_graph(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<StepGraph>(m, "StepGraph", py::module_local(),
                        "The step loop as one CUDA graph: form 'step' or 'loop'. `owner` is kept "
                        "alive: whatever owns the memory that the graphs use. `signal`: the graph "
                        "that comes before every decision; 0: none.")
      .def(py::init([](std::shared_ptr<StepControl> control,
                       const std::vector<std::pair<std::string, uintptr_t>>& buckets,
                       const std::string& form, const py::object&, uintptr_t signal) {
             return std::make_unique<StepGraph>(std::move(control), bucket_graphs(buckets),
                                                graph_form(form), graph_of(signal));
           }),
           py::arg("control"), py::arg("buckets"), py::arg("form"), py::arg("owner"),
           py::arg("signal") = 0,
           // The control too: its owner holds buffers that the graph goes on using.
           py::keep_alive<1, 2>(), py::keep_alive<1, 5>())
      .def(
          "upload", [](StepGraph& g, uintptr_t s) { g.upload(stream_of(s)); }, py::arg("stream"),
          Release())
      .def(
          "launch", [](StepGraph& g, uintptr_t s) { g.launch(stream_of(s)); }, py::arg("stream"),
          Release())
      .def("write_dot", &StepGraph::write_dot, py::arg("path"));
}

py::tuple scratch_tuple(const std::vector<int64_t>& shape, const std::vector<int64_t>& sizes) {
  const ScratchSizes scratch = scratch_sizes(make_spec(shape, sizes, "float32", 1, 1));
  return py::make_tuple(scratch.moments, scratch.keys);
}

}  // namespace

void bind_step(py::module_& m) {
  py::register_local_exception<SwitchUnavailable>(m, "SwitchUnavailable", PyExc_RuntimeError);
  py::register_local_exception<NodeRefused>(m, "NodeRefused", PyExc_RuntimeError);
  py::register_local_exception<GraphRefused>(m, "GraphRefused", PyExc_RuntimeError);
  m.attr("STATE_WORDS") = kLoopStateWords;
  m.attr("SETTINGS_WORDS") = kLoopSettingsWords;
  m.attr("CACHE_HEADER") = kCacheHeader;
  m.def("scratch_sizes", &scratch_tuple, py::arg("shape"), py::arg("sizes"),
        "Floats for `moments` and 32-bit words for `keys`.");
  m.def("switch_problem", &switch_problem,
        "Why graphs cannot switch on the device here; empty if they can.");
  m.def(
      "count_nodes", [](uintptr_t graph) { return count_nodes(graph_of(graph)); }, py::arg("graph"),
      "Nodes of a cudaGraph_t by type, child graphs included.");
  bind_control(m);
  bind_graph(m);
}

}  // namespace ddit_rt
