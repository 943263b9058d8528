// What the mock CUDA runtime knows. Private to the mock.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "mock_cudart.h"

namespace mock {

struct Graph;

using Arguments = std::vector<std::vector<char>>;  // bytes of each

struct Launch {
  const void* function = nullptr;
  Grid blocks{}, threads{};
  Arguments arguments;
};

struct Node {
  cudaGraphNodeType type{};
  Launch kernel;
  std::function<void()> call;                  // what a bucket computes, in a kernel's place
  std::vector<std::shared_ptr<Graph>> graphs;  // child graph, or the bodies of a conditional
  cudaGraphConditionalHandle handle = 0;
  cudaGraphConditionalNodeType conditional{};
  std::vector<size_t> after;  // indices into the graph's nodes
};

struct Graph {
  std::vector<std::shared_ptr<Node>> nodes;
  const Graph* parent = nullptr;  // of the body of a conditional
};

struct Handle {
  const Graph* graph;  // null once that is destroyed
  unsigned value, default_value;
  bool has_default;
  bool is_set = false;   // by a kernel, or by its default, in this pass
  bool used = false;     // by a node
  bool running = false;  // its graph was launched and is not done
};

struct Executable {
  std::shared_ptr<Graph> graph;
  int device = 0;
  uint64_t last_launch = 0;
};

struct Event {
  int device = 0;
  uint64_t launch = 0;  // complete once this one is
};

struct Failure {
  int successes;  // calls that succeed before
  int times;      // calls that fail then; negative: all
  cudaError_t error;
};

struct State {
  std::mutex books;             // never held while work runs
  std::recursive_mutex device;  // one piece of work at a time
  int driver = 13000;
  int devices = 2;
  std::map<const void*, KernelEntry> kernels;
  std::map<cudaGraphConditionalHandle, Handle> handles;
  cudaGraphConditionalHandle last_handle = 0;
  std::map<const Graph*, std::shared_ptr<Graph>> graphs;    // made by cudaGraphCreate
  std::map<const Graph*, std::shared_ptr<Graph>> captured;  // made by the test
  std::map<const void*, std::shared_ptr<Executable>> executables;
  std::map<void*, uint64_t> pinned;  // and the last launch that may use it
  std::map<void*, Event> events;
  bool deferred = false;
  int queries = 0;  // of an event, until what is deferred runs; 0: it runs when told to
  std::deque<std::function<void()>> queue;
  uint64_t launched = 0, finished = 0, awaited = 0;  // numbers of launches
  std::set<int> launch_devices;
  std::map<std::string, int> calls;
  std::map<std::string, int> kernel_runs;
  std::map<std::string, Failure> failures;  // calls that have to fail
  std::set<int> refused_in_bodies;          // node types that no instantiation takes there
  std::string violation;                    // first rule that was broken
};

State& state();

// mock_cudart.cpp; all with the books held
extern thread_local int current_device;
void violate(const std::string& rule);
cudaError_t enter(const char* name);

// mock_cudart.cpp; with the books free: remembers which pinned memory a launch uses
void note_use(uint64_t number, const std::function<bool(void*)>& uses_address);

// Takes the books for the rest of the function.
#define MOCK_ENTER(name)                                 \
  const std::lock_guard<std::mutex> lock(state().books); \
  if (const cudaError_t error = enter(#name); error != cudaSuccess) return error

// mock_graph.cpp
std::shared_ptr<Graph> clone(const Graph& graph);
bool has_conditional(const Graph& graph);
const Node* refused_node(const Graph& graph, bool in_body);  // by an instantiation; null: none
bool has_empty_body(const Graph& graph);
bool is_within(const Graph* graph, const Graph* ancestor);
bool uses(const Graph& graph, const void* address);
bool uses(const Launch& launch, const void* address);
std::vector<cudaGraphConditionalHandle> handles_of(const Graph& graph);
void run(const Launch& launch);
void run(const Graph& graph);
std::vector<std::string> describe(const Graph& graph);

// mock_queue.cpp
extern thread_local uint64_t last_launch;
uint64_t submit(std::function<void()> work);  // with the books free; returns the launch's number
void run_queue(uint64_t until);

}  // namespace mock
