// Graphs of the mock CUDA runtime: their rules, their execution, and what they look like.
#include <algorithm>
#include <cstring>

#include "mock_state.h"

namespace mock {
namespace {

bool allowed_in_body(cudaGraphNodeType type) {
  if (state().refused_in_bodies.count(type) != 0) return false;
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

// Takes what the kernels set: whether one of them did, and the value.
bool take_handle(cudaGraphConditionalHandle handle, unsigned* value) {
  const std::lock_guard<std::mutex> lock(state().books);
  Handle& entry = state().handles.at(handle);
  *value = entry.value;
  const bool was_set = entry.is_set;
  entry.is_set = false;
  if (!was_set) violate("a conditional node was reached whose handle no kernel had set");
  return was_set;
}

void run_conditional(const Node& node) {
  unsigned value = 0;
  if (!take_handle(node.handle, &value)) return;
  if (node.conditional != cudaGraphCondTypeWhile) {
    if (value < node.graphs.size()) run(*node.graphs[value]);
    return;
  }
  while (value != 0) {
    run(*node.graphs[0]);
    if (!take_handle(node.handle, &value)) return;
  }
}

void run_node(const Node& node) {
  if (node.type == cudaGraphNodeTypeKernel && node.call) node.call();
  if (node.type == cudaGraphNodeTypeKernel && !node.call) run(node.kernel);
  if (node.type == cudaGraphNodeTypeGraph) run(*node.graphs[0]);
  if (node.type == cudaGraphNodeTypeConditional) run_conditional(node);
}

std::string name_of(const Node& node) {
  switch (node.type) {
    case cudaGraphNodeTypeKernel:
      return node.call ? "model" : state().kernels.at(node.kernel.function).name;
    case cudaGraphNodeTypeGraph:
      return "child";
    case cudaGraphNodeTypeConditional:
      return node.conditional == cudaGraphCondTypeWhile ? "WHILE" : "SWITCH";
    case cudaGraphNodeTypeEmpty:
      return "empty";
    default:
      return "type " + std::to_string(static_cast<int>(node.type));
  }
}

void describe(const Graph& graph, int depth, std::vector<std::string>& lines) {
  for (const auto& node : graph.nodes) {
    std::string text = std::string(2 * depth, ' ') + name_of(*node);
    for (const size_t other : node->after) text += " < " + name_of(*graph.nodes[other]);
    lines.push_back(text);
    for (size_t i = 0; i < node->graphs.size(); ++i) {
      if (node->graphs.size() > 1) {
        lines.push_back(std::string(2 * depth + 2, ' ') + "body " + std::to_string(i));
      }
      describe(*node->graphs[i], depth + (node->graphs.size() > 1 ? 2 : 1), lines);
    }
  }
}

}  // namespace

std::shared_ptr<Graph> clone(const Graph& graph) {
  auto copy = std::make_shared<Graph>();
  for (const auto& node : graph.nodes) {
    auto fresh = std::make_shared<Node>(*node);
    for (auto& child : fresh->graphs) {
      child = clone(*child);
      child->parent = copy.get();
    }
    copy->nodes.push_back(fresh);
  }
  return copy;
}

bool has_conditional(const Graph& graph) { return !handles_of(graph).empty(); }

const Node* refused_node(const Graph& graph, bool in_body) {
  for (const auto& node : graph.nodes) {
    if (in_body && !allowed_in_body(node->type)) return node.get();
    const bool body = in_body || node->type == cudaGraphNodeTypeConditional;
    for (const auto& child : node->graphs) {
      if (const Node* const refused = refused_node(*child, body)) return refused;
    }
  }
  return nullptr;
}

bool has_empty_body(const Graph& graph) {
  return std::any_of(graph.nodes.begin(), graph.nodes.end(), [](const auto& node) {
    const bool conditional = node->type == cudaGraphNodeTypeConditional;
    return std::any_of(node->graphs.begin(), node->graphs.end(), [conditional](const auto& child) {
      return (conditional && child->nodes.empty()) || has_empty_body(*child);
    });
  });
}

bool is_within(const Graph* graph, const Graph* ancestor) {
  while (graph != nullptr && graph != ancestor) graph = graph->parent;
  return graph != nullptr;
}

bool uses(const Launch& launch, const void* address) {
  for (const std::vector<char>& bytes : launch.arguments) {
    for (size_t at = 0; at + sizeof address <= bytes.size(); at += sizeof address) {
      if (std::memcmp(bytes.data() + at, &address, sizeof address) == 0) return true;
    }
  }
  return false;
}

bool uses(const Graph& graph, const void* address) {
  return std::any_of(graph.nodes.begin(), graph.nodes.end(), [address](const auto& node) {
    return uses(node->kernel, address) ||
           std::any_of(node->graphs.begin(), node->graphs.end(),
                       [address](const auto& child) { return uses(*child, address); });
  });
}

std::vector<cudaGraphConditionalHandle> handles_of(const Graph& graph) {
  std::vector<cudaGraphConditionalHandle> handles;
  for (const auto& node : graph.nodes) {
    if (node->type == cudaGraphNodeTypeConditional) handles.push_back(node->handle);
    for (const auto& child : node->graphs) {
      const auto more = handles_of(*child);
      handles.insert(handles.end(), more.begin(), more.end());
    }
  }
  return handles;
}

void run(const Launch& launch) {
  std::vector<void*> arguments;
  for (const std::vector<char>& bytes : launch.arguments) {
    arguments.push_back(const_cast<char*>(bytes.data()));
  }
  const KernelEntry* entry = nullptr;
  {
    const std::lock_guard<std::mutex> lock(state().books);
    entry = &state().kernels.at(launch.function);
    ++state().kernel_runs[entry->name];
  }
  entry->run(launch.blocks, launch.threads, arguments.data());
}

// Of the nodes that may run, takes the one that was added last: an edge that is missing shows.
void run(const Graph& graph) {
  std::vector<bool> done(graph.nodes.size(), false);
  for (size_t count = 0; count < done.size(); ++count) {
    for (size_t i = done.size(); i-- > 0;) {
      const std::vector<size_t>& after = graph.nodes[i]->after;
      const bool ready =
          std::all_of(after.begin(), after.end(), [&done](size_t other) { return done[other]; });
      if (done[i] || !ready) continue;
      run_node(*graph.nodes[i]);
      done[i] = true;
      break;
    }
  }
}

std::vector<std::string> describe(const Graph& graph) {
  std::vector<std::string> lines;
  describe(graph, 0, lines);
  return lines;
}

}  // namespace mock
