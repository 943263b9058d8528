// The functions of the CUDA runtime that csrc/runtime calls: graphs.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "mock_state.h"

namespace mock {
namespace {

Graph* graph_of(cudaGraph_t graph) { return reinterpret_cast<Graph*>(graph); }

std::shared_ptr<Executable> executable_of(cudaGraphExec_t executable, const char* call) {
  const auto found = state().executables.find(executable);
  if (found != state().executables.end()) {
    if (found->second->device != current_device) violate(std::string(call) + " on another device");
    return found->second;
  }
  violate(std::string(call) + " of no executable graph");
  return nullptr;
}

// Handles start a launch with their defaults, and may be set only while it lasts.
void start(const Graph& graph) {
  const std::lock_guard<std::mutex> lock(state().books);
  for (const auto id : handles_of(graph)) {
    Handle& handle = state().handles.at(id);
    if (handle.has_default) handle.value = handle.default_value;
    handle.is_set = handle.has_default;
    handle.running = true;
  }
}

void end(const Graph& graph) {
  const std::lock_guard<std::mutex> lock(state().books);
  for (const auto id : handles_of(graph)) state().handles.at(id).running = false;
}

cudaError_t add_kernel(Node& node, const cudaKernelNodeParamsV2& params) {
  const auto found = state().kernels.find(params.func);
  if (found == state().kernels.end()) return cudaErrorInvalidDeviceFunction;
  node.kernel.function = params.func;
  node.kernel.blocks = {params.gridDim.x, params.gridDim.y, params.gridDim.z};
  node.kernel.threads = {params.blockDim.x, params.blockDim.y, params.blockDim.z};
  const std::vector<size_t>& sizes = found->second.argument_sizes;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const char* bytes = static_cast<const char*>(params.kernelParams[i]);
    node.kernel.arguments.emplace_back(bytes, bytes + sizes[i]);
  }
  return cudaSuccess;
}

cudaError_t add_child(Node& node, const Graph& child) {
  if (has_conditional(child)) return cudaErrorInvalidValue;
  node.graphs.push_back(clone(child));
  return cudaSuccess;
}

cudaError_t add_conditional(Node& node, const Graph* graph, cudaConditionalNodeParams& params) {
  const auto found = state().handles.find(params.handle);
  if (found == state().handles.end() || found->second.used) return cudaErrorInvalidValue;
  if (!is_within(graph, found->second.graph)) return cudaErrorInvalidValue;
  if (params.size == 0) return cudaErrorInvalidValue;
  if (params.type == cudaGraphCondTypeWhile && params.size != 1) return cudaErrorInvalidValue;
  found->second.used = true;
  node.handle = params.handle;
  node.conditional = params.type;
  static thread_local std::vector<cudaGraph_t> bodies;
  bodies.clear();
  for (unsigned i = 0; i < params.size; ++i) {
    node.graphs.push_back(std::make_shared<Graph>());
    node.graphs.back()->parent = graph;
    bodies.push_back(reinterpret_cast<cudaGraph_t>(node.graphs.back().get()));
  }
  params.phGraph_out = bodies.data();
  return cudaSuccess;
}

bool add_dependencies(Node& node, const Graph& graph, const cudaGraphNode_t* after, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const auto found = std::find_if(graph.nodes.begin(), graph.nodes.end(), [&](const auto& other) {
      return reinterpret_cast<cudaGraphNode_t>(other.get()) == after[i];
    });
    if (found == graph.nodes.end()) return false;
    node.after.push_back(static_cast<size_t>(found - graph.nodes.begin()));
  }
  return true;
}

cudaError_t add_node(cudaGraphNode_t* out, Graph& graph, const cudaGraphNode_t* after, size_t count,
                     cudaGraphNodeParams* params) {
  auto node = std::make_shared<Node>();
  node->type = params->type;
  if (!add_dependencies(*node, graph, after, count)) return cudaErrorInvalidValue;
  cudaError_t error = cudaSuccess;
  if (params->type == cudaGraphNodeTypeKernel) error = add_kernel(*node, params->kernel);
  if (params->type == cudaGraphNodeTypeGraph) {
    error = add_child(*node, *graph_of(params->graph.graph));
  }
  if (params->type == cudaGraphNodeTypeConditional) {
    error = add_conditional(*node, &graph, params->conditional);
  }
  if (error != cudaSuccess) return error;
  graph.nodes.push_back(node);
  *out = reinterpret_cast<cudaGraphNode_t>(node.get());
  return cudaSuccess;
}

}  // namespace
}  // namespace mock

using namespace mock;

extern "C" {

cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned) {
  MOCK_ENTER(cudaGraphCreate);
  auto fresh = std::make_shared<Graph>();
  *graph = reinterpret_cast<cudaGraph_t>(fresh.get());
  state().graphs[fresh.get()] = fresh;
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  MOCK_ENTER(cudaGraphDestroy);
  for (auto& [id, handle] : state().handles) {
    if (is_within(handle.graph, graph_of(graph))) handle.graph = nullptr;
  }
  if (state().graphs.erase(graph_of(graph)) != 0) return cudaSuccess;
  violate("cudaGraphDestroy of no graph");
  return cudaErrorInvalidValue;
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
  MOCK_ENTER(cudaGraphNodeGetType);
  *type = reinterpret_cast<Node*>(node)->type;
  return cudaSuccess;
}

cudaError_t cudaGraphChildGraphNodeGetGraph(cudaGraphNode_t node, cudaGraph_t* graph) {
  MOCK_ENTER(cudaGraphChildGraphNodeGetGraph);
  *graph = reinterpret_cast<cudaGraph_t>(reinterpret_cast<Node*>(node)->graphs[0].get());
  return cudaSuccess;
}

cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle, cudaGraph_t graph,
                                             unsigned default_value, unsigned flags) {
  MOCK_ENTER(cudaGraphConditionalHandleCreate);
  *handle = ++state().last_handle;
  const bool has_default = (flags & cudaGraphCondAssignDefault) != 0;
  state().handles[*handle] = {graph_of(graph), 0, default_value, has_default};
  return cudaSuccess;
}

#if CUDART_VERSION >= 13000
cudaError_t cudaGraphAddNode(cudaGraphNode_t* out, cudaGraph_t graph, const cudaGraphNode_t* after,
                             const cudaGraphEdgeData*, size_t count, cudaGraphNodeParams* params) {
#else
cudaError_t cudaGraphAddNode(cudaGraphNode_t* out, cudaGraph_t graph, const cudaGraphNode_t* after,
                             size_t count, cudaGraphNodeParams* params) {
#endif
  MOCK_ENTER(cudaGraphAddNode);
  return add_node(out, *graph_of(graph), after, count, params);
}

cudaError_t cudaGraphInstantiateWithParams(cudaGraphExec_t* executable, cudaGraph_t graph,
                                           cudaGraphInstantiateParams* params) {
  MOCK_ENTER(cudaGraphInstantiateWithParams);
  const Graph& source = *graph_of(graph);
  if (const Node* const refused = refused_node(source, false)) {
    params->result_out = cudaGraphInstantiateInvalidStructure;
    params->errNode_out = reinterpret_cast<cudaGraphNode_t>(const_cast<Node*>(refused));
    return cudaErrorInvalidValue;
  }
  if (has_empty_body(source))
    violate("a conditional body without a node, which no document allows");
  const std::vector<cudaGraphConditionalHandle> used = handles_of(source);
  for (const auto& [id, handle] : state().handles) {
    const bool own = is_within(handle.graph, &source);
    if (own && std::find(used.begin(), used.end(), id) == used.end()) {
      violate("a conditional handle that no node uses");
    }
  }
  auto fresh = std::make_shared<Executable>();
  fresh->graph = clone(source);
  fresh->device = current_device;
  *executable = reinterpret_cast<cudaGraphExec_t>(fresh.get());
  state().executables[fresh.get()] = fresh;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  MOCK_ENTER(cudaGraphExecDestroy);
  const auto target = executable_of(executable, "cudaGraphExecDestroy");
  if (target == nullptr) return cudaErrorInvalidValue;
  // CUDA would wait by itself, but the memory that the graph uses goes next.
  if (target->last_launch > state().awaited)
    violate("cudaGraphExecDestroy of a graph that may run");
  state().executables.erase(executable);
  return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t) {
  MOCK_ENTER(cudaGraphUpload);
  return executable_of(executable, "cudaGraphUpload") ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
  std::shared_ptr<Executable> target;
  {
    MOCK_ENTER(cudaGraphLaunch);
    target = executable_of(executable, "cudaGraphLaunch");
    if (target == nullptr) return cudaErrorInvalidValue;
  }
  const std::shared_ptr<Graph> graph = target->graph;
  const uint64_t number = submit([graph] {
    start(*graph);
    run(*graph);
    end(*graph);
  });
  note_use(number, [&graph](void* address) { return uses(*graph, address); });
  const std::lock_guard<std::mutex> lock(state().books);
  target->last_launch = number;
  return cudaSuccess;
}

cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }

}  // extern "C"
