// One solver step, the latents' history, and the patch moments that the next decision needs.
#pragma once

#include "cuda/loop_control.cuh"
#include "ddit_rt/difference.h"
#include "ddit_rt/halves.h"
#include "ddit_rt/loop.h"
#include "ddit_rt/moments.h"
#include "ddit_rt/solver.h"

namespace ddit_rt {

inline constexpr int kUpdateThreads = 256;

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Packet {
  T value[kWidth];
};

template <int kWidth>
using Values = Packet<float, kWidth>;

template <int kWidth>
__device__ __forceinline__ Values<kWidth> load(const float* base, int64_t at) {
  return *reinterpret_cast<const Values<kWidth>*>(base + at);
}

template <int kWidth>
__device__ __forceinline__ void store(float* base, int64_t at, const Values<kWidth>& values) {
  *reinterpret_cast<Values<kWidth>*>(base + at) = values;
}

// The running sum of one packet. The first term is not added to a zero: -0 would lose its sign.
template <int kWidth>
struct PacketSum {
  Values<kWidth> sum{};
  bool empty = true;

  __device__ __forceinline__ void add(float coefficient, const Values<kWidth>& x) {
    if (coefficient == 0.0f) return;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sum.value[i] =
          empty ? coefficient * x.value[i] : add_term(sum.value[i], coefficient, x.value[i]);
    }
    empty = false;
  }
};

// What a step's update reads and writes: the same for every thread.
struct UpdateStep {
  SolverRow row;
  int order;                // of the difference that step k + 1 needs; 0: none
  bool reads_z1, reads_z2;  // z[k-1], z[k-2]
  const float* z1;
  const float* z2;
  float* z3;        // slot of z[k-3], which z[k] takes over
  const float* v1;  // v[k-1], v[k-2]; null beyond the ring
  const float* v2;
  float* v_out;  // slot that v[k] takes over; null if velocities are not kept
};

__device__ __forceinline__ UpdateStep update_step(const LoopParams& p) {
  const int64_t k = p.state->step;
  const int64_t count = p.count();
  UpdateStep step;
  step.row = solver_row(p.coefficients + k * kCoefficients);
  step.order = p.scored(k + 1) ? p.settings->order : 0;
  step.reads_z1 = step.row.a[1] != 0.0f || step.order >= 2;
  step.reads_z2 = step.row.a[2] != 0.0f || step.order >= 3;
  // The ring's length keeps the indices of older entries positive.
  step.z1 = p.past + (k + 2) % kPastLatents * count;
  step.z2 = p.past + (k + 1) % kPastLatents * count;
  step.z3 = p.past + k % kPastLatents * count;
  const int kept = p.velocity_slots - 1;
  step.v1 = kept >= 1 ? p.past_velocities + (k + kept - 1) % kept * count : nullptr;
  step.v2 = kept >= 2 ? p.past_velocities + (k + kept - 2) % kept * count : nullptr;
  step.v_out = kept >= 1 ? p.past_velocities + k % kept * count : nullptr;
  return step;
}

// z[k+1] = sum_i a_i z[k-i] + sum_j b_j v[k-j] for one packet, in place, and the histories; returns
// the difference that the next decision needs. Each thread owns what it reads and overwrites.
template <typename T, int kWidth>
__device__ __forceinline__ Values<kWidth> advance_packet(const LoopParams& p,
                                                         const UpdateStep& step, int64_t at) {
  const auto narrow =
      *reinterpret_cast<const Packet<T, kWidth>*>(static_cast<const T*>(p.velocity) + at);
  const Values<kWidth> z0 = load<kWidth>(p.latents, at);
  Values<kWidth> z1{}, z2{}, v0, v1, v2;
  if (step.reads_z1) z1 = load<kWidth>(step.z1, at);
  if (step.reads_z2) z2 = load<kWidth>(step.z2, at);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    v0.value[i] = to_float(narrow.value[i]);
    // A velocity that the ring is too short for cannot be refused from here: it must show.
    v1.value[i] = v2.value[i] = NAN;
  }
  if (step.v1 != nullptr && step.row.b[1] != 0.0f) v1 = load<kWidth>(step.v1, at);
  if (step.v2 != nullptr && step.row.b[2] != 0.0f) v2 = load<kWidth>(step.v2, at);

  PacketSum<kWidth> total;
  total.add(step.row.a[0], z0);
  total.add(step.row.a[1], z1);
  total.add(step.row.a[2], z2);
  total.add(step.row.b[0], v0);
  total.add(step.row.b[1], v1);
  total.add(step.row.b[2], v2);
  Values<kWidth> newest, change;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    newest.value[i] = total.empty ? 0.0f : total.sum.value[i];
    const float z = newest.value[i];
    change.value[i] = step.order == 1   ? difference<1>(z, z0.value[i], 0.0f, 0.0f)
                      : step.order == 2 ? difference<2>(z, z0.value[i], z1.value[i], 0.0f)
                                        : difference<3>(z, z0.value[i], z1.value[i], z2.value[i]);
  }
  store<kWidth>(p.latents, at, newest);
  store<kWidth>(step.z3, at, z0);
  if (step.v_out != nullptr) store<kWidth>(step.v_out, at, v0);
  return change;
}

// The update where no size has to be scored: one packet a thread, striding over the latent.
//
// Grid: any. Bound by bytes: per value 4 (z[k]) + sizeof(T) (v[k]) + 4 for every further term that
// has a coefficient, read; 8 written (z[k+1], z[k]), and 4 more where velocities are kept.
// Deterministic, and equal to the CPU's solver_step_ to the bit: same order, no fused multiply-add.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kUpdateThreads) update_flat_kernel(LoopParams p) {
  if (p.state->stopped != 0) return;
  const UpdateStep step = update_step(p);
  const int64_t packets = p.count() / kWidth;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < packets;
       i += stride) {
    advance_packet<T, kWidth>(p, step, i * kWidth);
  }
}

// Moments of a tile's columns, in shared memory.
template <int kGroups>
struct TileMoments {
  float count[kGroups][kTileColumns];
  float mean[kGroups][kTileColumns];
  float m2[kGroups][kTileColumns];

  __device__ __forceinline__ Moments get(int group, int column) const {
    return {count[group][column], mean[group][column], m2[group][column]};
  }
  __device__ __forceinline__ void set(int group, int column, const Moments& value) {
    count[group][column] = value.count;
    mean[group][column] = value.mean;
    m2[group][column] = value.m2;
  }
};

// Merges a tile's columns over the thread groups and then into base patches, in a fixed order.
template <int kGroups>
__device__ __forceinline__ void reduce_tile(const LoopParams& p, TileMoments<kGroups>& tile,
                                            int64_t patch_row, int64_t first) {
  constexpr int kParts = kUpdateThreads / kTileColumns;  // threads that share a column
  constexpr int kShare = kGroups / kParts;
  const int column = threadIdx.x % kTileColumns;
  const int part = threadIdx.x / kTileColumns;
  Moments own;
  for (int i = 0; i < kShare; ++i) own = merge(own, tile.get(part * kShare + i, column));
  tile.set(part * kShare, column, own);
  __syncthreads();
  if (part == 0) {
    for (int i = 1; i < kParts; ++i) own = merge(own, tile.get(i * kShare, column));
    tile.set(0, column, own);
  }
  __syncthreads();
  const int edge = static_cast<int>(p.shape.patch);
  const int64_t patch_column = first / edge + threadIdx.x;
  if (static_cast<int>(threadIdx.x) >= p.columns / edge || patch_column >= p.shape.columns()) {
    return;
  }
  Moments patch;
  const int width = static_cast<int>(p.shape.column_width(patch_column));
  for (int i = 0; i < width; ++i) patch = merge(patch, tile.get(0, threadIdx.x * edge + i));
  const int64_t out = patch_row * p.shape.columns() + patch_column;
  p.mean[out] = patch.mean;
  p.m2[out] = patch.m2;
}

// The update, and mean and sum of squared deviations of the next decision's difference for every
// base patch of g x g x C values, or as many as are there at the edges; larger patches merge these,
// so the latent is read once for all sizes.
//
// Grid: one block of 256 threads per (sample, frame, row of base patches, tile of 32 columns). A
// thread holds kWidth neighbouring columns and takes every (256 / (32 / kWidth))-th of the C * g
// lines, so that eight threads read whole 128-byte lines with 16 bytes each; Welford's update per
// thread, then merges in a fixed order. Shared memory: at most 32 x 32 moments, 12 KiB. Bound by
// bytes as update_flat_kernel, plus 4 for each of z[k-1], z[k-2] that the difference needs.
// Deterministic. kWidth: 4 needs widths and tiles that it divides, and 16-byte alignment.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kUpdateThreads) update_kernel(LoopParams p) {
  constexpr int kLanes = kTileColumns / kWidth;
  constexpr int kGroups = kUpdateThreads / kLanes;
  __shared__ TileMoments<kGroups> tile;
  if (p.state->stopped != 0) return;
  const UpdateStep step = update_step(p);

  // 32-bit divisions: 64-bit ones are calls, and would cost as much as the arithmetic.
  const auto tiles = static_cast<unsigned>(p.tiles);
  const auto rows = static_cast<unsigned>(p.shape.rows());
  const auto frames = static_cast<unsigned>(p.shape.frames);
  const int64_t first = blockIdx.x % tiles * p.columns;
  const unsigned patch_row = blockIdx.x / tiles;
  const int64_t b = patch_row / rows / frames;
  const int64_t f = patch_row / rows % frames;
  const int patch = static_cast<int>(p.shape.patch);
  const int height = static_cast<int>(p.shape.row_height(patch_row % rows));
  const int lines = static_cast<int>(p.shape.channels) * height;
  const int64_t plane = p.shape.frames * p.shape.height * p.shape.width;  // of one channel
  const int64_t origin =
      (b * p.shape.channels * p.shape.frames + f) * p.shape.height * p.shape.width +
      patch_row % rows * patch * p.shape.width + first;
  const int column = static_cast<int>(threadIdx.x) % kLanes * kWidth;
  const int group = static_cast<int>(threadIdx.x) / kLanes;

  Moments own[kWidth];
  if (column < p.columns && first + column < p.shape.width) {
#pragma unroll 1
    for (int line = group; line < lines; line += kGroups) {
      const int64_t at = origin + line / height * plane + line % height * p.shape.width + column;
      const Values<kWidth> change = advance_packet<T, kWidth>(p, step, at);
      if (step.order == 0) continue;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) own[i] = add(own[i], change.value[i]);
    }
  }
  if (step.order == 0) return;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) tile.set(group, column + i, own[i]);
  __syncthreads();
  reduce_tile<kGroups>(p, tile, patch_row, first);
}

}  // namespace ddit_rt
