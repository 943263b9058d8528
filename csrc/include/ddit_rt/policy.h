// The patch scheduler's decision for one step, as plain data that a kernel can evaluate.
#pragma once

#include <math.h>
#include <stdint.h>

#include "ddit_rt/macros.h"

namespace ddit_rt {

// Why a step got its bucket. These codes are written into traces: `ddit_rt.ops.Reason` repeats them
// and a test keeps the two equal.
enum class Reason : int32_t {
  kForced = 0,     // the caller's table names the bucket (warm-up steps, or a fixed plan)
  kBelow = 1,      // a coarse bucket: its score is below its threshold
  kAbove = 2,      // the base bucket: no score is below its threshold
  kMonotone = 3,   // a coarser bucket was asked for, but buckets may only get finer
  kDwell = 4,      // another bucket was asked for, but the current one has not run long enough
  kNonfinite = 5,  // a score is NaN or infinite: the base bucket, and the flag is raised
};

inline constexpr int kStateSize = 4;      // int32 words of PolicyState
inline constexpr int kRecordHeader = 3;   // bucket, reason, run length; then one score per size
inline constexpr int32_t kDynamic = -1;   // in the table of forced buckets: let the scores decide
inline constexpr int32_t kNoBucket = -1;  // the current bucket before the first step

struct PolicyState {
  int32_t bucket = kNoBucket;  // 0 is the base size, i is the i-th coarse candidate
  int32_t run = 0;             // steps in a row in that bucket
  int32_t nonfinite = 0;       // 1 once a score was NaN or infinite
  int32_t branch = 0;          // to run: bucket i, or S + 1 + i to reuse its residual
};

struct PolicyRule {
  int dwell;      // least number of steps in a row in one bucket; 0 or 1 means no such rule
  bool monotone;  // a bucket may only be followed by itself or a finer one
};

struct Decision {
  int32_t bucket;
  Reason reason;
};

DDIT_RT_HD bool is_finite(float x) { return x - x == 0.0f; }

// The coarsest size whose score is below its threshold, for the sample that needs the finest one.
// A NaN threshold is never met, so it takes a size off the menu.
DDIT_RT_HD int32_t finest_needed(const float* scores,      // [B, S], sizes in ascending coarseness
                                 const float* thresholds,  // [S]
                                 int batch, int sizes) {
  int32_t finest = batch > 0 ? sizes : 0;
  for (int b = 0; b < batch; ++b) {
    int32_t bucket = sizes;
    while (bucket > 0 && !(scores[b * sizes + bucket - 1] < thresholds[bucket - 1])) --bucket;
    finest = bucket < finest ? bucket : finest;
  }
  return finest;
}

// One decision for the whole batch. `forced` is this step's entry of the table; one that names no
// bucket (greater than `sizes`) means the base.
DDIT_RT_HD Decision decide(const float* scores,      // [B, S]
                           const float* thresholds,  // [S]
                           int batch, int sizes, int32_t forced, PolicyRule rule,
                           PolicyState state) {
  if (forced != kDynamic) return {forced >= 0 && forced <= sizes ? forced : 0, Reason::kForced};
  bool finite = batch > 0;
  for (int i = 0; i < batch * sizes; ++i) finite = finite && is_finite(scores[i]);
  if (!finite) return {0, Reason::kNonfinite};

  const int32_t wanted = finest_needed(scores, thresholds, batch, sizes);
  Decision decision = {wanted, wanted > 0 ? Reason::kBelow : Reason::kAbove};
  if (state.bucket == kNoBucket) return decision;
  if (rule.monotone && wanted > state.bucket) decision = {state.bucket, Reason::kMonotone};
  if (decision.bucket != state.bucket && state.run < rule.dwell) {
    decision = {state.bucket, Reason::kDwell};
  }
  return decision;
}

DDIT_RT_HD PolicyState advance(PolicyState state, Decision decision) {
  state.run = decision.bucket == state.bucket ? state.run + 1 : 1;
  state.bucket = decision.bucket;
  state.branch = decision.bucket;
  if (decision.reason == Reason::kNonfinite) state.nonfinite = 1;
  return state;
}

// What the record keeps of a size's scores: the largest over the batch, NaN if one is NaN.
DDIT_RT_HD float worst_score(const float* scores,  // [B, S]
                             int batch, int sizes, int size) {
  float worst = scores[size];
  for (int b = 1; b < batch; ++b) {
    const float score = scores[b * sizes + size];
    if (score > worst || score != score) worst = score;
  }
  return worst;
}

// Decides a step, advances the state, and writes the step's row of the record: bucket, reason, run
// length, and each size's worst score (NaN where the scores were not looked at).
DDIT_RT_HD void decide_step(const float* scores,      // [B, S], batch = 0 where there are none
                            const float* thresholds,  // [S]
                            int batch, int sizes, int32_t forced, PolicyRule rule,
                            PolicyState* state,
                            float* record) {  // [3 + S]
  const Decision decision = decide(scores, thresholds, batch, sizes, forced, rule, *state);
  *state = advance(*state, decision);
  record[0] = static_cast<float>(decision.bucket);
  record[1] = static_cast<float>(static_cast<int32_t>(decision.reason));
  record[2] = static_cast<float>(state->run);
  const bool scored = batch > 0 && decision.reason != Reason::kForced;
  for (int i = 0; i < sizes; ++i) {
    record[kRecordHeader + i] = scored ? worst_score(scores, batch, sizes, i) : NAN;
  }
}

}  // namespace ddit_rt
