// One step of any linear multistep flow solver: six scalars, whatever the scheduler.
//
//   z[k+1] = a0 z[k] + a1 z[k-1] + a2 z[k-2] + b0 v[k] + b1 v[k-1] + b2 v[k-2]
//
// Latents live in a ring of four slots, z[k] in slot (-k) mod 4, so that the newest comes first and
// older ones follow upwards; velocities likewise in a ring of D <= 3 slots.
#pragma once

#include <stdint.h>

#include "ddit_rt/difference.h"
#include "ddit_rt/macros.h"

namespace ddit_rt {

inline constexpr int kTerms = 3;  // latents, and velocities, of one step
inline constexpr int kCoefficients = 2 * kTerms;

DDIT_RT_HD int ring_slot(int64_t step, int length) {
  return static_cast<int>((length - step % length) % length);
}

// The step's scalars in float32, the precision in which torch multiplies a float32 tensor by a
// Python number.
struct SolverRow {
  float a[kTerms];
  float b[kTerms];
};

template <typename T>
DDIT_RT_HD SolverRow solver_row(const T* row) {  // [6]: a0, a1, a2, b0, b1, b2
  SolverRow result;
  for (int i = 0; i < kTerms; ++i) {
    result.a[i] = static_cast<float>(row[i]);
    result.b[i] = static_cast<float>(row[kTerms + i]);
  }
  return result;
}

// sum + coefficient * x, rounded twice and never fused: an Euler step must equal `z + dt * v` of
// float32 torch to the bit, on both devices. Both builds turn contraction off.
DDIT_RT_HD float add_term(float sum, float coefficient, float x) { return sum + coefficient * x; }

}  // namespace ddit_rt
