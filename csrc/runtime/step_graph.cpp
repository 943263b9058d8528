#include "runtime/step_graph.h"

#include <utility>

#include "runtime/cuda_call.h"

namespace ddit_rt {
namespace {

constexpr int kNeededVersion = 12080;  // SWITCH nodes

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

struct NodeKind {
  cudaGraphNodeType type;
  const char* name;
  bool allowed;       // in a conditional body
  const char* cause;  // what usually puts it there
};

constexpr NodeKind kKinds[] = {
    {cudaGraphNodeTypeKernel, "kernel", true, ""},
    {cudaGraphNodeTypeMemcpy, "memcpy", true, ""},
    {cudaGraphNodeTypeMemset, "memset", true, ""},
    {cudaGraphNodeTypeGraph, "child graph", true, ""},
    {cudaGraphNodeTypeEmpty, "empty", true, ""},
    {cudaGraphNodeTypeHost, "host function", false,
     "a library that calls back to the host; a debugging or logging hook in the model does"},
    {cudaGraphNodeTypeWaitEvent, "event wait", false,
     "work on a second stream with external events; load packages with run_single_threaded=True"},
    {cudaGraphNodeTypeEventRecord, "event record", false,
     "an external event; load packages with run_single_threaded=True"},
    {cudaGraphNodeTypeExtSemaphoreSignal, "semaphore signal", false, "graphics interoperation"},
    {cudaGraphNodeTypeExtSemaphoreWait, "semaphore wait", false, "graphics interoperation"},
    {cudaGraphNodeTypeMemAlloc, "memory allocation", false,
     "cudaMallocAsync inside the capture; use torch's native caching allocator"},
    {cudaGraphNodeTypeMemFree, "memory release", false,
     "cudaFreeAsync inside the capture; use torch's native caching allocator"},
    {cudaGraphNodeTypeConditional, "conditional", false,
     "torch.cond or a loop inside the model; a child graph may hold none"},
};

const NodeKind* kind_of(cudaGraphNodeType type) {
  for (const NodeKind& kind : kKinds) {
    if (kind.type == type) return &kind;
  }
  return nullptr;
}

std::vector<cudaGraphNode_t> nodes_of(cudaGraph_t graph) {
  size_t count = 0;
  DDIT_RT_CUDA(cudaGraphGetNodes(graph, nullptr, &count));
  std::vector<cudaGraphNode_t> nodes(count);
  if (count > 0) DDIT_RT_CUDA(cudaGraphGetNodes(graph, nodes.data(), &count));
  return nodes;
}

std::string name_of(cudaGraphNodeType type) {
  const NodeKind* kind = kind_of(type);
  return kind != nullptr ? kind->name : "type " + std::to_string(static_cast<int>(type));
}

using Counts = std::map<cudaGraphNodeType, int>;

void count_types(cudaGraph_t graph, Counts& counts) {
  for (const cudaGraphNode_t node : nodes_of(graph)) {
    cudaGraphNodeType type{};
    DDIT_RT_CUDA(cudaGraphNodeGetType(node, &type));
    ++counts[type];
    if (type == cudaGraphNodeTypeGraph) {
      cudaGraph_t child = nullptr;
      DDIT_RT_CUDA(cudaGraphChildGraphNodeGetGraph(node, &child));
      count_types(child, counts);
    }
  }
}

void check_bucket(const std::string& name, const Counts& counts) {
  for (const auto& [type, count] : counts) {
    const NodeKind* kind = kind_of(type);
    if (kind != nullptr && kind->allowed) continue;
    const std::string cause = kind != nullptr ? kind->cause : "a newer CUDA feature";
    throw NodeRefused("ddit_rt: the graph of bucket " + name + " has " + std::to_string(count) +
                      " " + name_of(type) +
                      " node(s), which CUDA does not allow where graphs switch on the device. " +
                      "Likely cause: " + cause + ".");
  }
}

// A decision without a body would run nothing, and the update would take an old velocity.
void check_count(size_t buckets, const StepControl& control) {
  const LoopParams& params = control.params();
  const int branches = control.branches();
  if (buckets == static_cast<size_t>(branches)) return;
  throw std::invalid_argument(
      "ddit_rt: a step graph of " + std::to_string(buckets) + " buckets, expected " +
      std::to_string(branches) + ": the base patch and " + std::to_string(params.sizes) + " sizes" +
      (params.increments != nullptr ? ", and each of them once more without its blocks" : "") +
      (params.stage_count > 1 ? ", in " + std::to_string(params.stage_count) + " stages" : ""));
}

#if CUDART_VERSION >= 12080

// `what` is for messages.
cudaGraphNode_t add_node(cudaGraph_t graph, cudaGraphNode_t after, cudaGraphNodeParams* params,
                         const std::string& what) {
  cudaGraphNode_t node = nullptr;
  const size_t count = after == nullptr ? 0 : 1;
#if CUDART_VERSION >= 13000
  const cudaError_t error = cudaGraphAddNode(&node, graph, &after, nullptr, count, params);
#else
  const cudaError_t error = cudaGraphAddNode(&node, graph, &after, count, params);
#endif
  check_cuda(error, "cudaGraphAddNode of " + what);
  return node;
}

cudaGraphNode_t add_kernel(cudaGraph_t graph, cudaGraphNode_t after, const Kernel& kernel,
                           void** arguments, const std::string& name) {
  cudaGraphNodeParams params{};
  params.type = cudaGraphNodeTypeKernel;
  params.kernel.func = const_cast<void*>(kernel.function);
  params.kernel.gridDim = dim3(kernel.grid_x, kernel.grid_y);
  params.kernel.blockDim = dim3(kernel.threads);
  params.kernel.kernelParams = arguments;
  return add_node(graph, after, &params, "the " + name + " kernel");
}

cudaGraphNode_t add_child(cudaGraph_t graph, const BucketGraph& child) {
  cudaGraphNodeParams params{};  // ownership 0: the child is cloned
  params.type = cudaGraphNodeTypeGraph;
  params.graph.graph = child.graph;
  return add_node(graph, nullptr, &params, "the graph of bucket " + child.name);
}

// A body without nodes is nothing that CUDA documents as allowed; one that does nothing is.
void fill_body(cudaGraph_t body, const BucketGraph& bucket) {
  if (bucket.graph != nullptr) {
    add_child(body, bucket);
    return;
  }
  cudaGraphNodeParams params{};
  params.type = cudaGraphNodeTypeEmpty;
  add_node(body, nullptr, &params, "an empty node for bucket " + bucket.name);
}

struct Conditional {
  cudaGraphNode_t node = nullptr;
  std::vector<cudaGraph_t> bodies;
};

Conditional add_conditional(cudaGraph_t graph, cudaGraphNode_t after,
                            cudaGraphConditionalHandle handle, cudaGraphConditionalNodeType type,
                            unsigned bodies) {
  cudaGraphNodeParams params{};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = handle;
  params.conditional.type = type;
  params.conditional.size = bodies;
  Conditional result;
  result.node = add_node(graph, after, &params,
                         type == cudaGraphCondTypeWhile ? "the WHILE node" : "the SWITCH node");
  const cudaGraph_t* out = params.conditional.phGraph_out;
  result.bodies.assign(out, out + bodies);
  return result;
}

// signal -> decide -> SWITCH -> update; `loop` is the handle of the WHILE around them, if any.
void add_step(cudaGraph_t graph, const StepControl& control,
              const std::vector<BucketGraph>& buckets, cudaGraph_t signal,
              const cudaGraphConditionalHandle* loop) {
  const auto count = static_cast<unsigned>(buckets.size());
  cudaGraphConditionalHandle handle{};
  // The decide kernel sets the handle in every step, so its default is never seen.
  DDIT_RT_CUDA(cudaGraphConditionalHandleCreate(&handle, graph, 0, 0));
  LoopParams params = control.params();
  Switches switches;
  switches.branch = handle;
  switches.branches = static_cast<int32_t>(count);
  if (loop != nullptr) {
    switches.loop = *loop;
    switches.loops = 1;
  }
  void* decide_arguments[] = {&params, &switches};
  void* update_arguments[] = {&params};
  const cudaGraphNode_t first = signal == nullptr ? nullptr : add_child(graph, {"signal", signal});
  const cudaGraphNode_t decide =
      add_kernel(graph, first, control.kernels().decide, decide_arguments, "decide");
  const Conditional choice = add_conditional(graph, decide, handle, cudaGraphCondTypeSwitch, count);
  for (unsigned i = 0; i < count; ++i) fill_body(choice.bodies[i], buckets[i]);
  add_kernel(graph, choice.node, control.kernels().update, update_arguments, "update");
}

void add_loop(cudaGraph_t graph, const StepControl& control,
              const std::vector<BucketGraph>& buckets, cudaGraph_t signal) {
  LoopParams params = control.params();
  void* arguments[] = {&params};
  const cudaGraphNode_t begin =
      add_kernel(graph, nullptr, control.kernels().begin, arguments, "begin");
  cudaGraphConditionalHandle handle{};
  DDIT_RT_CUDA(cudaGraphConditionalHandleCreate(&handle, graph, 1, cudaGraphCondAssignDefault));
  const Conditional loop = add_conditional(graph, begin, handle, cudaGraphCondTypeWhile, 1);
  add_step(loop.bodies[0], control, buckets, signal, &handle);
  add_kernel(graph, loop.node, control.kernels().finish, arguments, "finish");
}

#endif

}  // namespace

std::string switch_problem() {
#if CUDART_VERSION < 12080
  return "this build of ddit_rt was made with CUDA " + version_text(CUDART_VERSION) +
         "; graphs that switch on the device need CUDA " + version_text(kNeededVersion) +
         " or newer: build again with a newer nvcc";
#else
  int driver = 0;
  DDIT_RT_CUDA(cudaDriverGetVersion(&driver));
  if (driver >= kNeededVersion) return "";
  return (driver == 0 ? std::string("there is no CUDA driver")
                      : "the driver supports CUDA " + version_text(driver)) +
         "; graphs that switch on the device need a driver for CUDA " +
         version_text(kNeededVersion) + " or newer (r570)";
#endif
}

std::map<std::string, int> count_nodes(cudaGraph_t graph) {
  Counts counts;
  count_types(graph, counts);
  std::map<std::string, int> named;
  for (const auto& [type, count] : counts) named[name_of(type)] = count;
  return named;
}

StepGraph::StepGraph(std::shared_ptr<StepControl> control, const std::vector<BucketGraph>& buckets,
                     Form form, cudaGraph_t signal)
    : control_(std::move(control)), form_(form) {
  const DeviceScope scope(control_->device());
  try {
    refusable([&] {
      const std::string problem = switch_problem();
      if (!problem.empty()) throw SwitchUnavailable("ddit_rt: " + problem);
      check_count(buckets.size(), *control_);
      if (signal != nullptr) inspect({"signal", signal});
      for (const BucketGraph& bucket : buckets) inspect(bucket);
      build(buckets, signal);
      instantiate();
    });
  } catch (...) {
    if (graph_ != nullptr) cudaGraphDestroy(graph_);
    throw;
  }
}

StepGraph::~StepGraph() {
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(control_->device());
  if (control_->wait_idle()) cudaGraphExecDestroy(executable_);
  cudaGraphDestroy(graph_);  // what it was instantiated to is a copy
  cudaSetDevice(before);
  cudaGetLastError();
}

template <typename Work>
void StepGraph::refusable(const Work& work) const {
  try {
    work();
  } catch (const CudaError& error) {
    control_->check_device();  // CUDA also reports here that a kernel failed before
    throw GraphRefused("ddit_rt: CUDA refused the graph of the " +
                       std::string(form_ == Form::kLoop ? "loop" : "step") + " form: " +
                       error.reason() + (contents_.empty() ? "" : " (nodes of " + contents_ + ")"));
  }
}

void StepGraph::inspect(const BucketGraph& bucket) {
  Counts counts;
  if (bucket.graph != nullptr) count_types(bucket.graph, counts);
  check_bucket(bucket.name, counts);
  std::string text;
  for (const auto& [type, count] : counts) {
    text += (text.empty() ? "" : ", ") + std::to_string(count) + " " + name_of(type);
  }
  contents_ += (contents_.empty() ? "" : "; ") + bucket.name + ": " +
               (text.empty() ? bucket.graph == nullptr ? "not captured" : "none" : text);
}

void StepGraph::build(const std::vector<BucketGraph>& buckets, cudaGraph_t signal) {
#if CUDART_VERSION >= 12080
  DDIT_RT_CUDA(cudaGraphCreate(&graph_, 0));
  if (form_ == Form::kLoop) {
    add_loop(graph_, *control_, buckets, signal);
  } else {
    add_step(graph_, *control_, buckets, signal, nullptr);
  }
#endif
}

void StepGraph::instantiate() {
  cudaGraphInstantiateParams params{};
  const cudaError_t error = cudaGraphInstantiateWithParams(&executable_, graph_, &params);
  if (error == cudaSuccess) return;
  std::string details = ", result " + std::to_string(static_cast<int>(params.result_out));
  cudaGraphNodeType type{};
  if (params.errNode_out != nullptr &&
      cudaGraphNodeGetType(params.errNode_out, &type) == cudaSuccess) {
    details += ", because of a " + name_of(type) + " node";
  }
  check_cuda(error, "cudaGraphInstantiateWithParams", details);
}

void StepGraph::upload(cudaStream_t stream) {
  const DeviceScope scope(control_->device());
  refusable([&] { DDIT_RT_CUDA(cudaGraphUpload(executable_, stream)); });
}

void StepGraph::launch(cudaStream_t stream) {
  const DeviceScope scope(control_->device());
  const auto run = [&] { refusable([&] { DDIT_RT_CUDA(cudaGraphLaunch(executable_, stream)); }); };
  if (form_ == Form::kLoop) {
    control_->begin_run(run);
  } else {
    run();
  }
  control_->note_launch(stream);
}

void StepGraph::write_dot(const std::string& path) const {
  DDIT_RT_CUDA(cudaGraphDebugDotPrint(graph_, path.c_str(), 0));
}

}  // namespace ddit_rt
