// The patch scheduler's decision on the device.
#pragma once

#include "ddit_rt/policy.h"

namespace ddit_rt {

struct DecideParams {
  const float* scores;      // [B, S]
  const int32_t* forced;    // this step's entry
  const float* thresholds;  // this step's row [S]
  PolicyState* state;
  float* record;  // this step's row [3 + S]
  int batch;
  int sizes;
  PolicyRule rule;
};

// decide_step() of policy.h.
//
// Grid: one block of one thread. It looks at B * S scores, a few dozen at most, so it is bound by
// the latency of its loads, and a parallel reduction would cost more than it saves.
__global__ void decide_kernel(DecideParams p) {
  decide_step(p.scores, p.thresholds, p.batch, p.sizes, *p.forced, p.rule, p.state, p.record);
}

}  // namespace ddit_rt
