// The step loop as one CUDA graph that chooses its buckets on the device.
//
// Per step:                                     Whole loop:
//   decide -> SWITCH(branch) -> update            begin -> WHILE(more) -> finish
//               |- child graph of bucket 0                   |- the step on the left
//               |- child graph of bucket 1
//               |- bucket 0 without its blocks, where steps may reuse
//               |- bucket 1 without its blocks
//
// Where steps differ in more than their size, all of these are there once for each stage, stage
// after stage, and a table says which stage a step belongs to.
//
// Where a step cache goes by a signal, the graph that computes it comes before `decide`. A bucket's
// graph is cloned into its body; its kernels go on using the caller's memory.
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime/step_control.h"

namespace ddit_rt {

// The driver, or the toolkit of this build, has no conditional graph nodes of the kinds needed.
class SwitchUnavailable : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A bucket's graph holds a node that may not stand in a conditional body.
class NodeRefused : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// CUDA refused to build, instantiate, upload or launch the graph, and the device is sound: nothing
// has run, and another form may do. The text names the call, the form, and the nodes of every
// bucket by kind.
class GraphRefused : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Why graphs cannot switch on the device here, with the version that is needed; empty if they can.
std::string switch_problem();

// Nodes of a graph by type, child graphs included.
std::map<std::string, int> count_nodes(cudaGraph_t graph);

struct BucketGraph {
  std::string name;   // for messages: "2p"
  cudaGraph_t graph;  // null: a bucket that no table may choose; its body does nothing
};

class StepGraph {
 public:
  enum class Form { kStep, kLoop };

  // `signal` may be null. Throws SwitchUnavailable, NodeRefused or GraphRefused.
  StepGraph(std::shared_ptr<StepControl> control, const std::vector<BucketGraph>& buckets,
            Form form, cudaGraph_t signal = nullptr);
  ~StepGraph();
  StepGraph(const StepGraph&) = delete;
  StepGraph& operator=(const StepGraph&) = delete;

  // Prepares the device, so that the first launch is as fast as the others. Throws GraphRefused.
  void upload(cudaStream_t stream);

  // Runs one step, or the whole loop with its begin and finish. Never waits. Throws GraphRefused if
  // CUDA refused at once.
  void launch(cudaStream_t stream);

  // Writes the graph in Graphviz' language.
  void write_dot(const std::string& path) const;

 private:
  void inspect(const BucketGraph& bucket);
  void build(const std::vector<BucketGraph>& buckets, cudaGraph_t signal);
  void instantiate();

  // Calls `work`, whose CUDA errors become GraphRefused.
  template <typename Work>
  void refusable(const Work& work) const;

  const std::shared_ptr<StepControl> control_;
  const Form form_;
  std::string contents_;  // for messages: the nodes of every bucket by kind
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

}  // namespace ddit_rt
