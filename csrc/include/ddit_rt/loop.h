// What the step loop keeps on the device, and how its kernels find it.
//
// A step k is decide -> the bucket's model -> update. Everything that differs between two runs of
// one shape lies in device memory (settings, tables, state), so that captured graphs serve them
// all.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "ddit_rt/macros.h"
#include "ddit_rt/patch.h"
#include "ddit_rt/policy.h"
#include "ddit_rt/step_cache.h"

namespace ddit_rt {

inline constexpr int kPastLatents = 3;  // z[k-1], z[k-2], z[k-3] beside z[k]

// Where the loop stands. The first word is also the index by which buckets read their tables.
struct LoopState {
  int32_t step = -1;        // k, the step in progress; -1 before the first
  int32_t stopped = 0;      // 1 once the run was cancelled: nothing more is computed
  uint32_t generation = 0;  // number of this run, counted by the begin kernel
  uint32_t ticket = 0;      // blocks of the decide kernel that have finished
  PolicyState policy;
};
inline constexpr int kLoopStateWords = 8;
static_assert(sizeof(LoopState) == kLoopStateWords * sizeof(int32_t));

// What a run's plan fixes; written by the host before the run.
struct LoopSettings {
  int32_t steps;     // N
  int32_t order;     // of the difference, 1 to 3
  float quantile;    // rho
  int32_t dwell;     // of PolicyRule
  int32_t monotone;  // of PolicyRule
  CacheRule cache;   // read only where the loop has a step cache
};
inline constexpr int kLoopSettingsWords = 16;
static_assert(sizeof(LoopSettings) == kLoopSettingsWords * sizeof(int32_t));

// One step of the trace.
struct StepRow {
  uint64_t time_ns;                         // the device's clock when the step was decided
  float record[kRecordHeader + kMaxSizes];  // as decide_step() writes it
  float cache[kCacheRecord];                // as cache_step() writes it
  float reserved;
};

// Mapped pinned memory: the device writes, the host polls; `cancel` goes the other way.
struct Progress {
  uint32_t cancel;      // generation that the host wants stopped
  uint32_t generation;  // of the run that the rest describes
  uint32_t decided;     // steps decided; their rows are complete
  uint32_t finished;    // generation whose run is over
  uint32_t nonfinite;   // 1 once a score was NaN or infinite
  uint32_t stopped;     // 1 if the run ended before its last step
  uint64_t end_ns;      // the device's clock when the run was over

  DDIT_RT_HD StepRow* rows() { return reinterpret_cast<StepRow*>(this + 1); }
  DDIT_RT_HD const StepRow* rows() const { return reinterpret_cast<const StepRow*>(this + 1); }
};
static_assert(sizeof(Progress) % alignof(StepRow) == 0);

DDIT_RT_HD size_t progress_bytes(int64_t steps) {
  return sizeof(Progress) + static_cast<size_t>(steps) * sizeof(StepRow);
}

// Fixed for one shape: addresses and sizes, passed by value to every kernel.
struct LoopParams {
  float* latents;             // z[k], [B, C, F, H, W]; the buckets' input
  float* past;                // [3, B, C, F, H, W], z[m] in slot m mod 3
  const void* velocity;       // v[k], [B, C, F, H, W]; the buckets' output
  float* past_velocities;     // [D - 1, B, C, F, H, W], v[m] in slot m mod (D - 1)
  const float* coefficients;  // [N, 6]: a0, a1, a2, b0, b1, b2
  const int32_t* forced;      // [N]
  const int32_t* stages;      // [N], the stage of every step; null: there is one
  const float* thresholds;    // [N, S]
  float* mean;                // [B, F, H / g, W / g], rounded up: of the difference, per base patch
  float* m2;                  // likewise: sums of squared deviations
  uint32_t* keys;             // [B, S, F * H / g * W / g], scratch of the quantile
  float* scores;              // [B, S]
  const float* increments;    // [N], of the step cache; null: there is none
  const float* signal;        // [R], of the step cache: what the signal's graph computes
  CacheMemory cache;          // [2 + R]
  LoopState* state;
  const LoopSettings* settings;
  Progress* progress;
  PatchShape shape;           // patch = g, the base patch
  int32_t sizes;              // S candidate coarse sizes
  int32_t velocity_slots;     // D
  int32_t cache_rows;         // R: samples and passes that the step cache tells apart
  int32_t stage_count;        // ways to run the model in a step, each with graphs of its own
  int32_t columns;            // pixel columns of an update tile, a multiple of g
  int32_t tiles;              // update tiles along the width
  int32_t factor[kMaxSizes];  // edge of each size, in base patches

  DDIT_RT_HD int64_t count() const {  // values of one latent
    return shape.batch * shape.channels * shape.frames * shape.height * shape.width;
  }
  DDIT_RT_HD PolicyRule rule() const { return {settings->dwell, settings->monotone != 0}; }

  // Graphs of one stage: one per size, and one more each where steps may reuse.
  DDIT_RT_HD int32_t stage_branches() const {
    return (sizes + 1) * (increments == nullptr ? 1 : 2);
  }

  // The first graph of step k's stage.
  DDIT_RT_HD int32_t first_branch(int64_t k) const {
    return stages == nullptr ? 0 : stages[k] * stage_branches();
  }

  // Whether step k is decided by scores.
  DDIT_RT_HD bool scored(int64_t k) const {
    return sizes > 0 && k < settings->steps && forced[k] == kDynamic;
  }
};

// An update tile is at most this wide, so base patches must not be wider: any divisor of the sizes'
// common divisor serves as the base.
inline constexpr int kTileColumns = 32;

inline int base_edge(int64_t divisor) {
  int64_t edge = divisor < kTileColumns ? divisor : kTileColumns;
  while (divisor % edge != 0) --edge;
  return static_cast<int>(edge);
}

}  // namespace ddit_rt
