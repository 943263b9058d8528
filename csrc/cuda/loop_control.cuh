// The first and the last kernel of a run, and what the loop's kernels share.
#pragma once

#include "ddit_rt/loop.h"

namespace ddit_rt {

#ifdef __CUDACC__
__device__ __forceinline__ uint64_t device_time_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

__device__ __forceinline__ void set_conditional(unsigned long long handle, unsigned value) {
#if CUDART_VERSION >= 12040
  cudaGraphSetConditional(handle, value);
#endif
}
#endif  // otherwise the emulator defines them

// Starts a run: state and progress as before the first step. One block of one thread.
__global__ void begin_kernel(LoopParams p) {
  LoopState fresh;
  fresh.generation = p.state->generation + 1;
  *p.state = fresh;
  volatile Progress* progress = p.progress;
  progress->decided = 0;
  progress->nonfinite = 0;
  progress->stopped = 0;
  progress->end_ns = 0;
  __threadfence_system();  // a host that sees the new generation sees nothing of the old run
  progress->generation = fresh.generation;
}

// Ends a run: publishes its outcome, then that it is over. One block of one thread.
__global__ void finish_kernel(LoopParams p) {
  volatile Progress* progress = p.progress;
  progress->nonfinite = static_cast<uint32_t>(p.state->policy.nonfinite);
  progress->stopped = p.state->step + 1 < p.settings->steps ? 1 : 0;
  progress->end_ns = device_time_ns();
  __threadfence_system();
  progress->finished = p.state->generation;
}

}  // namespace ddit_rt
