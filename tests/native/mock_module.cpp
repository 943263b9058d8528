// Python module `emulated_runtime`: the step loop of ddit_rt._runtime on the mock CUDA runtime, and
// what a test tells the mock and asks it.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <limits>

#include "mock_state.h"

namespace py = pybind11;

namespace ddit_rt {
void bind_step(py::module_& m);
}

namespace mock {
namespace {

constexpr uint64_t kAll = std::numeric_limits<uint64_t>::max();

uintptr_t keep(std::shared_ptr<Graph> graph) {
  const auto address = reinterpret_cast<uintptr_t>(graph.get());
  state().captured[graph.get()] = std::move(graph);
  return address;
}

// A captured bucket: a graph with one kernel node that calls Python.
uintptr_t call_graph(std::function<void()> call) {
  auto graph = std::make_shared<Graph>();
  graph->nodes.push_back(std::make_shared<Node>());
  graph->nodes[0]->type = cudaGraphNodeTypeKernel;
  graph->nodes[0]->call = std::move(call);
  return keep(graph);
}

// Nodes of one type, with nothing in them.
uintptr_t typed_graph(int type, int count) {
  auto graph = std::make_shared<Graph>();
  for (int i = 0; i < count; ++i) {
    graph->nodes.push_back(std::make_shared<Node>());
    graph->nodes.back()->type = static_cast<cudaGraphNodeType>(type);
  }
  return keep(graph);
}

// A graph whose one node is a copy of another graph.
uintptr_t child_graph(uintptr_t child) {
  auto graph = std::make_shared<Graph>();
  graph->nodes.push_back(std::make_shared<Node>());
  graph->nodes[0]->type = cudaGraphNodeTypeGraph;
  graph->nodes[0]->graphs.push_back(clone(*reinterpret_cast<const Graph*>(child)));
  return keep(graph);
}

void destroy_graph(uintptr_t graph) {
  state().captured.erase(reinterpret_cast<const Graph*>(graph));
}

std::map<std::string, size_t> live_objects() {
  return {{"graphs", state().graphs.size()},
          {"executables", state().executables.size()},
          {"pinned", state().pinned.size()},
          {"events", state().events.size()}};
}

std::vector<std::string> describe_executables() {
  std::vector<std::string> lines;
  for (const auto& [key, executable] : state().executables) {
    const std::vector<std::string> more = describe(*executable->graph);
    lines.insert(lines.end(), more.begin(), more.end());
  }
  return lines;
}

void clear_calls() {
  state().calls.clear();
  state().kernel_runs.clear();
  state().launch_devices.clear();
}

void reset() {
  clear_calls();
  state().driver = 13000;
  state().deferred = false;
  state().queries = 0;
  state().queue.clear();
  state().finished = state().launched;
  state().refused_in_bodies.clear();
  state().captured.clear();
  state().failures.clear();
  state().violation.clear();
  set_order(0);
}

// What was left to the end of the process, as after a run that hangs.
void end_process() {
  for (const auto& [memory, launch] : state().pinned) std::free(memory);
  for (const auto& [event, entry] : state().events) std::free(event);
  state().pinned.clear();
  state().events.clear();
  state().executables.clear();
}

void bind_mock(py::module_& m) {
  m.def("call_graph", &call_graph, "A captured bucket that calls Python.");
  m.def("typed_graph", &typed_graph, "A captured bucket of nodes of one cudaGraphNodeType.");
  m.def("child_graph", &child_graph, "A captured bucket that holds another.");
  m.def("destroy_graph", &destroy_graph);
  m.def("set_driver", [](int version) { state().driver = version; });
  m.def(
      "fail_after",
      [](const std::string& call, int successes, int times, int error) {
        state().failures[call] = {successes, times, static_cast<cudaError_t>(error)};
      },
      py::arg("call"), py::arg("successes"), py::arg("times") = -1,
      py::arg("error") = static_cast<int>(cudaErrorUnknown),
      "Makes a CUDA call fail, after it has succeeded so often; so many times, or for good.");
  m.def(
      "refuse_in_bodies", [](int type) { state().refused_in_bodies.insert(type); },
      "Makes every instantiation fail of a graph with such a node in a conditional body.");
  m.def("stop_failing", [] { state().failures.clear(); });
  m.def("calls", [] { return state().calls; }, "CUDA calls by name.");
  m.def("kernel_runs", [] { return state().kernel_runs; }, "Kernels that ran, by name.");
  m.def("launch_devices", [] { return state().launch_devices; });
  m.def("clear_calls", &clear_calls);
  m.def("violation", [] { return state().violation; }, "The first rule that was broken.");
  m.def("live_objects", &live_objects, "What the runtime has made and not destroyed.");
  m.def("describe", &describe_executables, "A line per node of every executable graph.");
  m.def("end_process", &end_process, "Frees what is left, as the end of a process does.");
  m.def("reset", &reset, "Forgets what tests told the mock, and their captured buckets.");
}

void bind_execution(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "defer",
      [](bool deferred, int queries) {
        state().deferred = deferred;
        state().queries = queries;
      },
      py::arg("deferred"), py::arg("queries") = 0,
      "Whether launches wait until they are told to run, or an event was queried so often.");
  m.def(
      "idle",
      [] {
        const std::lock_guard<std::mutex> lock(state().books);
        return state().finished == state().launched;
      },
      "Whether all that was launched has run.");
  m.def("run_pending", [] { run_queue(kAll); }, Release(), "Runs what was launched.");
  m.def("set_order", &set_order, py::arg("seed"),
        "In which order blocks, and a block's threads, are taken; 0: ascending.");
}

}  // namespace
}  // namespace mock

PYBIND11_MODULE(emulated_runtime, m) {
  m.doc() = "The step loop of ddit_rt._runtime on a mock CUDA runtime with emulated kernels.";
  mock::register_step_kernels();
  ddit_rt::bind_step(m);
  mock::bind_mock(m);
  mock::bind_execution(m);
  // Graphs that nobody destroyed hold Python callables, which must not outlive the interpreter.
  py::module_::import("atexit").attr("register")(py::cpp_function([] {
    mock::state().captured.clear();
    mock::state().graphs.clear();
    mock::state().executables.clear();
    mock::state().queue.clear();
  }));
}
