#include "mock_cudart.h"

#include <cuda_runtime_api.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>

namespace py = pybind11;

namespace mock {
namespace {

struct Graph;

struct Node {
  cudaGraphNodeType type{};
  // Kernel
  const void* function = nullptr;
  Grid blocks{}, threads{};
  std::vector<std::vector<char>> arguments;
  // Python callable in a kernel's place: what a bucket's graph computes
  std::function<void()> call;
  // Child graph or conditional
  std::vector<std::shared_ptr<Graph>> graphs;
  cudaGraphConditionalHandle handle = 0;
  cudaGraphConditionalNodeType conditional{};
  std::vector<const Node*> after;
};

struct Graph {
  std::vector<std::shared_ptr<Node>> nodes;
};

struct Handle {
  const Graph* graph;
  unsigned value;
  bool has_default, is_set, used;
  unsigned default_value;
};

struct State {
  std::recursive_mutex mutex;
  int driver = 13000;
  std::map<const void*, KernelEntry> kernels;
  std::map<cudaGraphConditionalHandle, Handle> handles;
  std::map<const Graph*, std::shared_ptr<Graph>> graphs;       // cudaGraph_t that the caller owns
  std::map<const Graph*, std::shared_ptr<Graph>> executables;  // cudaGraphExec_t
  std::set<void*> pinned;
  std::set<void*> events;
  std::map<std::string, int> calls;
  std::map<std::string, int> failures;  // calls that have to fail, by name
  std::string violation;                // first rule that was broken
};

State& state() {
  static State instance;
  return instance;
}

void violate(const std::string& rule) {
  if (state().violation.empty()) state().violation = rule;
}

// Counts a call; cudaErrorUnknown where the test asked for a failure.
cudaError_t enter(const char* name) {
  ++state().calls[name];
  const auto failure = state().failures.find(name);
  if (failure == state().failures.end()) return cudaSuccess;
  return --failure->second < 0 ? cudaErrorUnknown : cudaSuccess;
}

#define MOCK_ENTER(name)                                           \
  const std::lock_guard<std::recursive_mutex> lock(state().mutex); \
  if (const cudaError_t error = enter(#name); error != cudaSuccess) return error

Graph* graph_of(cudaGraph_t graph) { return reinterpret_cast<Graph*>(graph); }
Node* node_of(cudaGraphNode_t node) { return reinterpret_cast<Node*>(node); }

std::shared_ptr<Graph> clone(const Graph& graph) {
  auto copy = std::make_shared<Graph>();
  for (const auto& node : graph.nodes) {
    auto fresh = std::make_shared<Node>(*node);
    for (auto& child : fresh->graphs) child = clone(*child);
    copy->nodes.push_back(fresh);
  }
  return copy;
}

bool has_conditional(const Graph& graph) {
  for (const auto& node : graph.nodes) {
    if (node->type == cudaGraphNodeTypeConditional) return true;
    for (const auto& child : node->graphs) {
      if (has_conditional(*child)) return true;
    }
  }
  return false;
}

bool allowed_in_body(cudaGraphNodeType type) {
  switch (type) {
    case cudaGraphNodeTypeKernel:
    case cudaGraphNodeTypeMemcpy:
    case cudaGraphNodeTypeMemset:
    case cudaGraphNodeTypeGraph:
    case cudaGraphNodeTypeEmpty:
    case cudaGraphNodeTypeConditional:
      return true;
    default:
      return false;
  }
}

bool valid(const Graph& graph, bool in_body) {
  for (const auto& node : graph.nodes) {
    if (in_body && !allowed_in_body(node->type)) return false;
    const bool body = in_body || node->type == cudaGraphNodeTypeConditional;
    for (const auto& child : node->graphs) {
      if (!valid(*child, body)) return false;
    }
  }
  return true;
}

void run_graph(const Graph& graph);

void run_kernel(const Node& node) {
  if (node.call) return node.call();
  std::vector<void*> arguments;
  for (const auto& bytes : node.arguments) {
    arguments.push_back(const_cast<char*>(bytes.data()));
  }
  state().kernels.at(node.function).run(node.blocks, node.threads, arguments.data());
}

void run_conditional(const Node& node) {
  Handle& handle = state().handles.at(node.handle);
  if (node.conditional == cudaGraphCondTypeWhile) {
    while (handle.value != 0) run_graph(*node.graphs[0]);
    return;
  }
  if (!handle.is_set) violate("a SWITCH was reached whose handle no kernel had set in this pass");
  handle.is_set = false;
  if (handle.value < node.graphs.size()) run_graph(*node.graphs[handle.value]);
}

void run_graph(const Graph& graph) {
  for (const auto& node : graph.nodes) {
    if (node->type == cudaGraphNodeTypeKernel) run_kernel(*node);
    if (node->type == cudaGraphNodeTypeGraph) run_graph(*node->graphs[0]);
    if (node->type == cudaGraphNodeTypeConditional) run_conditional(*node);
  }
}

void collect_handles(const Graph& graph, std::vector<Handle*>& handles) {
  for (const auto& node : graph.nodes) {
    if (node->type == cudaGraphNodeTypeConditional) {
      handles.push_back(&state().handles.at(node->handle));
    }
    for (const auto& child : node->graphs) collect_handles(*child, handles);
  }
}

void add_kernel(Node& node, const cudaKernelNodeParamsV2& params) {
  node.function = params.func;
  node.blocks = {params.gridDim.x, params.gridDim.y, params.gridDim.z};
  node.threads = {params.blockDim.x, params.blockDim.y, params.blockDim.z};
  const std::vector<size_t>& sizes = state().kernels.at(params.func).argument_sizes;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const char* bytes = static_cast<const char*>(params.kernelParams[i]);
    node.arguments.emplace_back(bytes, bytes + sizes[i]);
  }
}

cudaError_t add_conditional(Node& node, cudaConditionalNodeParams& params) {
  const auto found = state().handles.find(params.handle);
  if (found == state().handles.end() || found->second.used) return cudaErrorInvalidValue;
  if (params.type == cudaGraphCondTypeWhile && params.size != 1) return cudaErrorInvalidValue;
  found->second.used = true;
  node.handle = params.handle;
  node.conditional = params.type;
  static thread_local std::vector<cudaGraph_t> bodies;
  bodies.clear();
  for (unsigned i = 0; i < params.size; ++i) {
    node.graphs.push_back(std::make_shared<Graph>());
    bodies.push_back(reinterpret_cast<cudaGraph_t>(node.graphs.back().get()));
  }
  params.phGraph_out = bodies.data();
  return cudaSuccess;
}

// A line per node, indented by depth: "WHILE", "kernel", "child graph".
void describe(const Graph& graph, int depth, std::vector<std::string>& lines) {
  for (const auto& node : graph.nodes) {
    std::string text(2 * depth, ' ');
    if (node->type == cudaGraphNodeTypeKernel) text += node->call ? "model" : "kernel";
    if (node->type == cudaGraphNodeTypeGraph) text += "child";
    if (node->type == cudaGraphNodeTypeConditional) {
      text += node->conditional == cudaGraphCondTypeWhile ? "WHILE" : "SWITCH";
    }
    if (!node->after.empty()) text += " after " + std::to_string(node->after.size());
    lines.push_back(text);
    for (const auto& child : node->graphs) describe(*child, depth + 1, lines);
  }
}

}  // namespace

void register_kernel(const void* function, KernelEntry entry) {
  state().kernels[function] = std::move(entry);
}

void set_conditional(unsigned long long handle, unsigned value) {
  Handle& entry = state().handles.at(handle);
  entry.value = value;
  entry.is_set = true;
}

}  // namespace mock

using namespace mock;

extern "C" {

cudaError_t cudaDriverGetVersion(int* version) {
  *version = state().driver;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "mockError"; }
const char* cudaGetErrorString(cudaError_t) { return "the mock was told to fail"; }

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  MOCK_ENTER(cudaHostAlloc);
  *pointer = std::malloc(bytes);
  state().pinned.insert(*pointer);
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* pointer) {
  MOCK_ENTER(cudaFreeHost);
  if (state().pinned.erase(pointer) == 0) violate("cudaFreeHost of memory that is not allocated");
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  MOCK_ENTER(cudaHostGetDevicePointer);
  *device = host;
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  MOCK_ENTER(cudaEventCreateWithFlags);
  void* token = std::malloc(1);
  state().events.insert(token);
  *event = static_cast<cudaEvent_t>(token);
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  MOCK_ENTER(cudaEventDestroy);
  if (state().events.erase(event) == 0) violate("cudaEventDestroy of no event");
  std::free(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  MOCK_ENTER(cudaEventRecord);
  if (state().events.count(event) == 0) violate("cudaEventRecord of no event");
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  MOCK_ENTER(cudaEventQuery);
  if (state().events.count(event) == 0) violate("cudaEventQuery of no event");
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  MOCK_ENTER(cudaEventSynchronize);
  if (state().events.count(event) == 0) violate("cudaEventSynchronize of no event");
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 blocks, dim3 threads, void** arguments,
                             size_t, cudaStream_t) {
  MOCK_ENTER(cudaLaunchKernel);
  state().kernels.at(function).run({blocks.x, blocks.y, blocks.z},
                                   {threads.x, threads.y, threads.z}, arguments);
  return cudaSuccess;
}

cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned) {
  MOCK_ENTER(cudaGraphCreate);
  auto fresh = std::make_shared<Graph>();
  *graph = reinterpret_cast<cudaGraph_t>(fresh.get());
  state().graphs[fresh.get()] = fresh;
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  MOCK_ENTER(cudaGraphDestroy);
  if (state().graphs.erase(graph_of(graph)) == 0) violate("cudaGraphDestroy of no graph");
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  MOCK_ENTER(cudaGraphGetNodes);
  const Graph& inner = *graph_of(graph);
  if (nodes != nullptr) {
    for (size_t i = 0; i < *count; ++i) {
      nodes[i] = reinterpret_cast<cudaGraphNode_t>(inner.nodes[i].get());
    }
  }
  *count = inner.nodes.size();
  return cudaSuccess;
}

cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type) {
  *type = node_of(node)->type;
  return cudaSuccess;
}

cudaError_t cudaGraphChildGraphNodeGetGraph(cudaGraphNode_t node, cudaGraph_t* graph) {
  *graph = reinterpret_cast<cudaGraph_t>(node_of(node)->graphs[0].get());
  return cudaSuccess;
}

cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle, cudaGraph_t graph,
                                             unsigned default_value, unsigned flags) {
  MOCK_ENTER(cudaGraphConditionalHandleCreate);
  *handle = state().handles.size() + 1;
  const bool has_default = (flags & cudaGraphCondAssignDefault) != 0;
  state().handles[*handle] = {graph_of(graph), 0, has_default, false, false, default_value};
  return cudaSuccess;
}

cudaError_t cudaGraphAddNode(cudaGraphNode_t* out, cudaGraph_t graph, const cudaGraphNode_t* after,
                             const cudaGraphEdgeData*, size_t count, cudaGraphNodeParams* params) {
  MOCK_ENTER(cudaGraphAddNode);
  Graph& target = *graph_of(graph);
  auto node = std::make_shared<Node>();
  node->type = params->type;
  for (size_t i = 0; i < count; ++i) {
    bool found = false;
    for (const auto& other : target.nodes) found = found || other.get() == node_of(after[i]);
    if (!found) return cudaErrorInvalidValue;
    node->after.push_back(node_of(after[i]));
  }
  if (params->type == cudaGraphNodeTypeKernel) add_kernel(*node, params->kernel);
  if (params->type == cudaGraphNodeTypeGraph) {
    const Graph& child = *graph_of(params->graph.graph);
    if (has_conditional(child)) return cudaErrorInvalidValue;
    node->graphs.push_back(clone(child));
  }
  if (params->type == cudaGraphNodeTypeConditional) {
    if (const cudaError_t error = add_conditional(*node, params->conditional);
        error != cudaSuccess) {
      return error;
    }
  }
  target.nodes.push_back(node);
  *out = reinterpret_cast<cudaGraphNode_t>(node.get());
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithParams(cudaGraphExec_t* executable, cudaGraph_t graph,
                                           cudaGraphInstantiateParams* params) {
  MOCK_ENTER(cudaGraphInstantiateWithParams);
  if (!valid(*graph_of(graph), false)) {
    params->result_out = cudaGraphInstantiateError;
    return cudaErrorInvalidValue;
  }
  for (const auto& [handle, entry] : state().handles) {
    if (!entry.used) violate("a conditional handle that no node uses");
  }
  auto copy = clone(*graph_of(graph));
  *executable = reinterpret_cast<cudaGraphExec_t>(copy.get());
  state().executables[copy.get()] = copy;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  MOCK_ENTER(cudaGraphExecDestroy);
  if (state().executables.erase(reinterpret_cast<Graph*>(executable)) == 0) {
    violate("cudaGraphExecDestroy of no executable graph");
  }
  return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) {
  MOCK_ENTER(cudaGraphUpload);
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
  MOCK_ENTER(cudaGraphLaunch);
  const Graph& graph = *state().executables.at(reinterpret_cast<Graph*>(executable));
  std::vector<Handle*> handles;
  collect_handles(graph, handles);
  for (Handle* handle : handles) {
    handle->is_set = handle->has_default;
    if (handle->has_default) handle->value = handle->default_value;
  }
  run_graph(graph);
  return cudaSuccess;
}

cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }

}  // extern "C"

namespace ddit_rt {
void bind_step(py::module_& m);
}

namespace {

std::vector<std::string> describe_executables() {
  std::vector<std::string> lines;
  for (const auto& [key, graph] : state().executables) describe(*graph, 0, lines);
  return lines;
}

// A captured bucket: a graph with one kernel node that calls Python. Owned by the caller.
uintptr_t call_graph(std::function<void()> call) {
  cudaGraph_t graph = nullptr;
  cudaGraphCreate(&graph, 0);
  auto node = std::make_shared<Node>();
  node->type = cudaGraphNodeTypeKernel;
  node->call = std::move(call);
  graph_of(graph)->nodes.push_back(node);
  return reinterpret_cast<uintptr_t>(graph);
}

uintptr_t typed_graph(int type, int count) {
  cudaGraph_t graph = nullptr;
  cudaGraphCreate(&graph, 0);
  for (int i = 0; i < count; ++i) {
    auto node = std::make_shared<Node>();
    node->type = static_cast<cudaGraphNodeType>(type);
    graph_of(graph)->nodes.push_back(node);
  }
  return reinterpret_cast<uintptr_t>(graph);
}

std::map<std::string, size_t> live_objects() {
  return {{"graphs", state().graphs.size()},
          {"executables", state().executables.size()},
          {"pinned", state().pinned.size()},
          {"events", state().events.size()}};
}

void reset() {
  state().driver = 13000;
  state().calls.clear();
  state().failures.clear();
  state().violation.clear();
  state().handles.clear();
}

}  // namespace

PYBIND11_MODULE(emulated_runtime, m) {
  m.doc() = "The step loop of ddit_rt._runtime on a mock CUDA runtime with emulated kernels.";
  mock::register_step_kernels();
  ddit_rt::bind_step(m);
  m.def("call_graph", &call_graph);
  m.def("typed_graph", &typed_graph);
  m.def("destroy_graph",
        [](uintptr_t graph) { cudaGraphDestroy(reinterpret_cast<cudaGraph_t>(graph)); });
  m.def("set_driver", [](int version) { state().driver = version; });
  m.def("fail_after",
        [](const std::string& call, int successes) { state().failures[call] = successes; });
  m.def("calls", [] { return state().calls; });
  m.def("clear_calls", [] { state().calls.clear(); });
  m.def("violation", [] { return state().violation; });
  m.def("live_objects", &live_objects);
  m.def("describe", &describe_executables);
  m.def("reset", &reset);
  // Graphs that nobody destroyed hold Python callables, which must not outlive the interpreter.
  py::module_::import("atexit").attr("register")(py::cpp_function([] {
    state().graphs.clear();
    state().executables.clear();
  }));
}
