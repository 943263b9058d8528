// Fused solver update on the device.
#pragma once

#include <math.h>

#include "ddit_rt/halves.h"
#include "ddit_rt/solver.h"

namespace ddit_rt {

struct SolverParams {
  int64_t count;               // values of one latent
  const void* coefficients;    // [6]: this step's row, float or double
  const float* latents[3];     // z[k], z[k-1], z[k-2]
  const float* velocities[3];  // unused, v[k-1], v[k-2]; null beyond the ring
  const void* velocity;        // v[k], of type T
  float* velocity_out;         // ring slot of v[k]
  float* latents_out;          // ring slot of z[k+1]
};

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Packet {
  T value[kWidth];
};

// The running sum of one packet. The first term is not added to a zero: -0 would lose its sign.
template <int kWidth>
struct PacketSum {
  float value[kWidth];
  bool empty = true;

  __device__ void add(float coefficient, const Packet<float, kWidth>& x) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      value[i] = empty ? coefficient * x.value[i] : add_term(value[i], coefficient, x.value[i]);
    }
    empty = false;
  }
};

// z[k+1] = sum_i a_i z[k-i] + sum_j b_j v[k-j], and v[k] into its ring slot.
//
// Grid: any number of blocks of any size, striding over packets of kWidth values, one thread each.
// Whether a term is read depends on its coefficient, which is the same for all threads, so warps do
// not diverge. No shared memory. Bound by bytes: 4 * (terms + 2) + sizeof(T) a value.
// Deterministic, and equal to the CPU kernel to the bit: same order, no fused multiply-add.
// T: float, BFloat16 or Float16. C: type of the coefficients. kWidth: 4 needs 16-byte alignment.
template <typename T, typename C, int kWidth>
__global__ void __launch_bounds__(256) solver_step_kernel(SolverParams p) {
  using Values = Packet<float, kWidth>;
  const SolverRow row = solver_row(static_cast<const C*>(p.coefficients));
  const auto* velocity = static_cast<const Packet<T, kWidth>*>(p.velocity);
  const int64_t packets = p.count / kWidth;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < packets;
       at += stride) {
    const Packet<T, kWidth> narrow = velocity[at];
    Values newest;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) newest.value[i] = to_float(narrow.value[i]);
    PacketSum<kWidth> sum;
#pragma unroll
    for (int i = 0; i < kTerms; ++i) {
      if (row.a[i] != 0.0f) sum.add(row.a[i], reinterpret_cast<const Values*>(p.latents[i])[at]);
    }
    if (row.b[0] != 0.0f) sum.add(row.b[0], newest);
#pragma unroll
    for (int j = 1; j < kTerms; ++j) {
      if (row.b[j] == 0.0f) continue;
      // A velocity that the ring is too short for cannot be refused from here: it must show.
      Values older;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) older.value[i] = NAN;
      if (p.velocities[j] != nullptr) {
        older = reinterpret_cast<const Values*>(p.velocities[j])[at];
      }
      sum.add(row.b[j], older);
    }
    Values result;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) result.value[i] = sum.empty ? 0.0f : sum.value[i];
    reinterpret_cast<Values*>(p.velocity_out)[at] = newest;
    reinterpret_cast<Values*>(p.latents_out)[at] = result;
  }
}

}  // namespace ddit_rt
