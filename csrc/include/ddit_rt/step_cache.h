// Whether a step computes or reuses what the blocks added before, as plain data that a kernel can
// evaluate.
#pragma once

#include <math.h>
#include <stdint.h>

#include "ddit_rt/macros.h"
#include "ddit_rt/policy.h"

namespace ddit_rt {

// Why a step computed or reused. These codes are written into traces: `ddit_rt.ops.CacheReason`
// repeats them and a test keeps the two equal.
enum class CacheReason : int32_t {
  kOff = 0,        // computed: the run has no step cache
  kForced = 1,     // computed: the table says so (first and last steps)
  kChanged = 2,    // computed: the first step in a row at its patch size
  kAbove = 3,      // computed: the accumulated change is not below the threshold
  kLimit = 4,      // computed: as many steps in a row as are allowed were reused
  kNonfinite = 5,  // computed: a signal is NaN or infinite, and the flag is raised
  kReused = 6,     // reused: the accumulated change is below the threshold
};

// How a row's sum grows; `ddit_rt.ops.CacheGrowth` repeats these codes.
enum class CacheGrowth : int32_t {
  kSum = 0,      // by the step's change
  kProduct = 1,  // by |1 - p|, p being the product of the increments since the latest computed step
  kLatest = 2,   // not at all: it is the step's change, measured against the latest computed step
};

inline constexpr int kMaxTerms = 7;     // of a polynomial
inline constexpr int kCacheHeader = 2;  // words of a cache's memory before one sum per row
inline constexpr int kCacheRecord = 2;  // a step's row of the record: reason, accumulated change

// What a run's step cache fixes.
struct CacheRule {
  CacheGrowth growth;             // of every row's sum
  float threshold;                // below it a step reuses
  int32_t limit;                  // steps in a row that may reuse
  int32_t terms;                  // of the polynomial that makes increments of signals; 0: a table
  float coefficients[kMaxTerms];  // highest power first
};

DDIT_RT_HD float polynomial(const float* coefficients,  // [T], highest power first
                            int terms, float x) {
  float value = 0.0f;
  for (int i = 0; i < terms; ++i) value = value * x + coefficients[i];
  return value;
}

// What accumulates from step to step; written by a step before a later one reads it.
struct CacheMemory {
  float* words;  // [2 + R]: product of the factors, steps reused in a row, a sum per row

  DDIT_RT_HD float& product() const { return words[0]; }
  DDIT_RT_HD float& reused() const { return words[1]; }
  DDIT_RT_HD float& sum(int row) const { return words[kCacheHeader + row]; }
};

DDIT_RT_HD float step_change(const float* signal,  // [R]
                             float increment, int row, const CacheRule& rule,
                             const CacheMemory& memory) {
  if (rule.terms > 0) return polynomial(rule.coefficients, rule.terms, signal[row]);
  return rule.growth == CacheGrowth::kProduct ? fabsf(1.0f - memory.product()) : increment;
}

// Adds this step's change to every row's sum; the largest sum, NaN if a change is not finite.
DDIT_RT_HD float accumulate(const float* signal,  // [R]
                            float increment, int rows, const CacheRule& rule,
                            const CacheMemory& memory) {
  if (rule.growth == CacheGrowth::kProduct) memory.product() *= increment;
  float largest = -INFINITY;
  for (int row = 0; row < rows; ++row) {
    const float change = step_change(signal, increment, row, rule, memory);
    if (!is_finite(change)) return NAN;
    memory.sum(row) = rule.growth == CacheGrowth::kLatest ? change : memory.sum(row) + change;
    largest = memory.sum(row) > largest ? memory.sum(row) : largest;
  }
  return largest;
}

// One decision for the whole batch: a step reuses only if the sum of every row, that is of every
// sample in every pass of the model, is below the threshold. A step whose size differs from the one
// before it has no sum to go by.
DDIT_RT_HD CacheReason judge_reuse(const float* signal,  // [R]
                                   float increment, int rows, const CacheRule& rule,
                                   const PolicyState& state, const CacheMemory& memory,
                                   float* accumulated) {
  *accumulated = NAN;
  if (increment != increment) return CacheReason::kForced;
  if (state.nonfinite != 0) return CacheReason::kNonfinite;
  if (state.run < 2) return CacheReason::kChanged;
  *accumulated = accumulate(signal, increment, rows, rule, memory);
  if (!is_finite(*accumulated)) return CacheReason::kNonfinite;
  if (!(*accumulated < rule.threshold)) return CacheReason::kAbove;
  return memory.reused() < static_cast<float>(rule.limit) ? CacheReason::kReused
                                                          : CacheReason::kLimit;
}

// Decides between computing and reusing once the step's size is decided; advances memory and state,
// and writes the step's row of the record: reason, and the accumulated change that was compared.
DDIT_RT_HD void cache_step(const float* signal,  // [R], not read without a polynomial
                           float increment,      // of the table; NaN: the step computes
                           int rows, int buckets, const CacheRule& rule, PolicyState* state,
                           const CacheMemory& memory,
                           float* record) {  // [2]
  const CacheReason reason = judge_reuse(signal, increment, rows, rule, *state, memory, &record[1]);
  record[0] = static_cast<float>(static_cast<int32_t>(reason));
  if (reason == CacheReason::kNonfinite) state->nonfinite = 1;
  if (reason == CacheReason::kReused) {
    memory.reused() += 1.0f;
    state->branch = state->bucket + buckets;
    return;
  }
  memory.product() = 1.0f;
  memory.reused() = 0.0f;
  for (int row = 0; row < rows; ++row) memory.sum(row) = 0.0f;
}

}  // namespace ddit_rt
