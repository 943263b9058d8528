// Patch scores on the device: moments of the base patches, then one quantile per sample and size.
#pragma once

#include "ddit_rt/difference.h"
#include "ddit_rt/moments.h"
#include "ddit_rt/patch.h"
#include "ddit_rt/quantile.h"

namespace ddit_rt {

inline constexpr int kScoreColumns = 32;  // pixel columns of a tile at most, one thread each
inline constexpr int kScoreGroups = 8;    // threads that share a column's lines
inline constexpr int kSelectThreads = 512;
inline constexpr int kBins = 256;  // of the radix select: eight bits a pass
inline constexpr unsigned kFullMask = 0xFFFFFFFFu;

struct MomentParams {
  const float* newest[4];  // z0, z1, z2, z3: [B, C, F, H, W] each
  float* mean;             // [B, F, H / g, W / g]
  float* m2;               // likewise
  PatchShape shape;        // patch = g, at most kScoreColumns
  int columns;             // of a tile: the largest multiple of g within kScoreColumns
  int64_t tiles;           // along the width
};

// Mean and sum of squared deviations of the difference, for every base patch of g x g x C values.
//
// Grid: one block of 32 x 8 threads per (sample, frame, row of base patches, tile of 32 columns). A
// thread takes every eighth of the C * g lines of its pixel column, so that a warp reads whole 128
// byte lines; Welford's update per thread, then a merge of the 8 threads of a column and of the g
// columns of a patch, both in a fixed order. Shared memory: 8 x 32 moments, 3 KiB. Bound by bytes:
// order + 1 reads of a latent. Deterministic.
template <int kOrder>
__global__ void __launch_bounds__(kScoreColumns* kScoreGroups)
    patch_moments_kernel(MomentParams p) {
  __shared__ float count[kScoreGroups][kScoreColumns];
  __shared__ float mean[kScoreGroups][kScoreColumns];
  __shared__ float m2[kScoreGroups][kScoreColumns];

  int64_t index = blockIdx.x;
  const int64_t first = index % p.tiles * p.columns;
  index /= p.tiles;
  const int64_t row = index % p.shape.rows();
  index /= p.shape.rows();
  const int64_t f = index % p.shape.frames;
  const int64_t b = index / p.shape.frames;
  const int x = threadIdx.x;
  const int group = threadIdx.y;
  const bool inside = x < p.columns && first + x < p.shape.width;

  Moments own;
  if (inside) {
#pragma unroll 4
    for (int line = group; line < p.shape.lines(); line += kScoreGroups) {
      const int64_t at = p.shape.latent_offset(b, f, row, line) + first + x;
      const float z2 = kOrder >= 2 ? p.newest[2][at] : 0.0f;
      const float z3 = kOrder >= 3 ? p.newest[3][at] : 0.0f;
      own = add(own, difference<kOrder>(p.newest[0][at], p.newest[1][at], z2, z3));
    }
  }
  count[group][x] = own.count;
  mean[group][x] = own.mean;
  m2[group][x] = own.m2;
  __syncthreads();
  if (group == 0) {
    for (int i = 1; i < kScoreGroups; ++i) own = merge(own, {count[i][x], mean[i][x], m2[i][x]});
    count[0][x] = own.count;
    mean[0][x] = own.mean;
    m2[0][x] = own.m2;
  }
  __syncthreads();
  const int edge = static_cast<int>(p.shape.patch);
  const int64_t column = first / edge + x;
  if (group != 0 || x >= p.columns / edge || column >= p.shape.columns()) return;
  Moments patch;
  for (int i = 0; i < edge; ++i) {
    const int at = x * edge + i;
    patch = merge(patch, {count[0][at], mean[0][at], m2[0][at]});
  }
  const int64_t out =
      ((b * p.shape.frames + f) * p.shape.rows() + row) * p.shape.columns() + column;
  p.mean[out] = patch.mean;
  p.m2[out] = patch.m2;
}

struct QuantileParams {
  const float* mean;  // [B, R, K], R = F * H / g rows, K = W / g columns of base patches
  const float* m2;    // likewise
  uint32_t* keys;     // scratch [B, S, R * K]
  float* scores;      // [B, S]
  int64_t rows;       // R
  int64_t columns;    // K
  float base_count;   // values of a base patch
  float quantile;
  int sizes;              // S
  int factor[kMaxSizes];  // edge of a patch of each size, in base patches
};

// Moments of a patch of factor x factor base patches, merged row by row.
DDIT_RT_HD Moments merge_square(const float* mean, const float* m2, int64_t pitch, float count,
                                int factor) {
  Moments patch;
  for (int y = 0; y < factor; ++y) {
    for (int x = 0; x < factor; ++x) {
      patch = merge(patch, {count, mean[y * pitch + x], m2[y * pitch + x]});
    }
  }
  return patch;
}

// The bin of `histogram` that holds the value of rank `rank`, found by one warp with eight bins per
// lane: a prefix sum over lanes, then a walk through the bins of the lane that holds the rank.
struct SelectState {
  unsigned prefix;  // bits of the wanted key that are known
  int rank;         // of the wanted key among those that share the prefix
  int equal;        // keys in the chosen bin
};

__device__ __forceinline__ void choose_bin(const int* histogram, int shift, SelectState* state) {
  constexpr int kPerLane = kBins / 32;
  const int lane = threadIdx.x;
  int sum = 0;
  for (int i = 0; i < kPerLane; ++i) sum += histogram[lane * kPerLane + i];
  int inclusive = sum;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int below = __shfl_up_sync(kFullMask, inclusive, offset);
    if (lane >= offset) inclusive += below;
  }
  int rank = state->rank - (inclusive - sum);
  __syncwarp();
  if (rank < 0 || rank >= sum) return;
  int bin = lane * kPerLane;
  while (rank >= histogram[bin]) rank -= histogram[bin++];
  state->prefix |= static_cast<unsigned>(bin) << shift;
  state->rank = rank;
  state->equal = histogram[bin];
}

// scores[b, s] = quantile over the patches of size s of their standard deviations.
//
// Grid: one block of 512 threads per (size, sample). Patches' deviations become integer keys in
// scratch memory; a radix select of four passes of eight bits finds the key of the lower rank
// exactly, a minimum the next one; then torch.quantile's interpolation. Shared memory: a histogram
// of 256 counts. Bound by latency: four short passes over keys that stay in the L1 / L2 cache.
// Deterministic: only integers are added or compared atomically.
__global__ void __launch_bounds__(kSelectThreads) patch_quantile_kernel(QuantileParams p) {
  __shared__ int histogram[kBins];
  __shared__ SelectState state;
  __shared__ unsigned next;
  __shared__ int broken;  // a deviation is not a number

  const int size = blockIdx.x;
  const int64_t b = blockIdx.y;
  const int factor = p.factor[size];
  const int64_t patch_columns = p.columns / factor;
  const int64_t patches = p.rows / factor * patch_columns;
  uint32_t* const keys = p.keys + (b * p.sizes + size) * p.rows * p.columns;
  const Rank rank = quantile_rank(p.quantile, patches);
  if (threadIdx.x == 0) {
    state = {0u, static_cast<int>(rank.below), 0};
    next = kFullMask;
    broken = 0;
  }
  __syncthreads();

  for (int64_t i = threadIdx.x; i < patches; i += kSelectThreads) {
    const int64_t at = b * p.rows * p.columns + i / patch_columns * factor * p.columns +
                       i % patch_columns * factor;
    const float deviation =
        standard_deviation(merge_square(p.mean + at, p.m2 + at, p.columns, p.base_count, factor));
    if (!is_number(deviation)) broken = 1;  // all writers agree
    keys[i] = ordered_key(deviation);
  }
  __syncthreads();

  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < kBins; i += kSelectThreads) histogram[i] = 0;
    __syncthreads();
    const unsigned known = shift == 24 ? 0u : kFullMask << (shift + 8);
    const unsigned prefix = state.prefix;
    for (int64_t i = threadIdx.x; i < patches; i += kSelectThreads) {
      const uint32_t key = keys[i];
      if ((key & known) == prefix) atomicAdd(&histogram[(key >> shift) & (kBins - 1)], 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) choose_bin(histogram, shift, &state);
    __syncthreads();
  }

  // The next rank has the same key if the last bin, which holds equal keys only, has more of them.
  const bool repeated = state.rank + 1 < state.equal;
  for (int64_t i = threadIdx.x; i < patches && !repeated; i += kSelectThreads) {
    if (keys[i] > state.prefix) atomicMin(&next, keys[i]);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  const float below = from_ordered_key(state.prefix);
  const bool last = repeated || next == kFullMask;
  const float above = last ? below : from_ordered_key(next);
  p.scores[b * p.sizes + size] = broken != 0 ? NAN : lerp(below, above, rank.weight);
}

}  // namespace ddit_rt
