// Entry points of the step loop's kernels, as cudaLaunchKernel and graph nodes take them: all that
// host code, which a plain C++ compiler builds, sees of them.
#pragma once

#include "ddit_rt/loop.h"

namespace ddit_rt {

// Which conditional nodes a decision steers; neither where the host reads it instead. The handles
// are cudaGraphConditionalHandle.
struct Switches {
  unsigned long long branch = 0;  // SWITCH: the bucket to run, or whose residual to reuse
  unsigned long long loop = 0;    // WHILE: whether another step follows
  int32_t branches = 0;           // bodies of the SWITCH; 0: there is none
  int32_t loops = 0;              // 1 if there is a WHILE
};

enum class VelocityType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Kernel {
  const void* function = nullptr;
  unsigned grid_x = 1, grid_y = 1, threads = 1;
};

// Every kernel takes a LoopParams by value; `decide` takes a Switches after it.
struct StepKernels {
  Kernel begin, decide, update, finish;
};

// The kernels for one shape. `width` values are moved at a time by the update, 4 or 1; see
// update_width().
StepKernels step_kernels(const LoopParams& params, VelocityType type, int width);

}  // namespace ddit_rt
