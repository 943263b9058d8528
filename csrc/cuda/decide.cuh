// The patch scheduler's decision: exact quantiles of the patch deviations, then the policy.
#pragma once

#include "cuda/loop_control.cuh"
#include "cuda/step_kernels.h"
#include "ddit_rt/loop.h"
#include "ddit_rt/moments.h"
#include "ddit_rt/quantile.h"
#include "ddit_rt/step_cache.h"

namespace ddit_rt {

inline constexpr int kDecideThreads = 512;
inline constexpr int kBins = 256;  // of the radix select: eight bits a pass
inline constexpr unsigned kFullMask = 0xFFFFFFFFu;

// Moments of a patch of factor x factor base patches from (row, column) on, merged row by row; `at`
// is where that row of base patches begins. Beyond the edges there are none, and those at the edges
// have the pixels that are there.
__device__ __forceinline__ Moments merge_square(const LoopParams& p, int64_t at, int row,
                                                int column, int factor) {
  const auto pitch = static_cast<int>(p.shape.columns());
  const auto rows = static_cast<int>(p.shape.rows());
  const int end_row = row + factor < rows ? row + factor : rows;
  const int end_column = column + factor < pitch ? column + factor : pitch;
  Moments patch;
  for (int y = row; y < end_row; ++y, at += pitch) {
    const int64_t lines = p.shape.channels * p.shape.row_height(y);
    for (int x = column; x < end_column; ++x) {
      const auto count = static_cast<float>(lines * p.shape.column_width(x));
      patch = merge(patch, {count, p.mean[at + x], p.m2[at + x]});
    }
  }
  return patch;
}

// Where a radix select stands.
struct SelectState {
  unsigned prefix;  // bits of the wanted key that are known
  int rank;         // of the wanted key among those that share the prefix
  int equal;        // keys in the chosen bin
};

// The bin of `histogram` that holds the value of the wanted rank, found by one warp with eight bins
// per lane: a prefix sum over lanes, then a walk through the bins of the lane that holds the rank.
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

// What the threads of a block share while they select.
struct SelectShared {
  int histogram[kBins];
  SelectState state;
  unsigned next;  // smallest key above the selected one
  int broken;     // a deviation is not a number
};

// The key of rank `rank.below` among `count` keys, and the quantile that interpolates from it to
// the next: four passes of eight bits, exact. Every thread of the block calls it; thread 0 has the
// result.
__device__ __forceinline__ float select_quantile(const uint32_t* keys, int count, Rank rank,
                                                 SelectShared* shared) {
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < kBins; i += kDecideThreads) shared->histogram[i] = 0;
    __syncthreads();
    const unsigned known = shift == 24 ? 0u : kFullMask << (shift + 8);
    const unsigned prefix = shared->state.prefix;
    for (int i = threadIdx.x; i < count; i += kDecideThreads) {
      const uint32_t key = keys[i];
      if ((key & known) == prefix) atomicAdd(&shared->histogram[(key >> shift) & (kBins - 1)], 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) choose_bin(shared->histogram, shift, &shared->state);
    __syncthreads();
  }
  // The next rank has the same key if the last bin, which holds equal keys only, has more of them.
  const bool repeated = shared->state.rank + 1 < shared->state.equal;
  for (int i = threadIdx.x; i < count && !repeated; i += kDecideThreads) {
    if (keys[i] > shared->state.prefix) atomicMin(&shared->next, keys[i]);
  }
  __syncthreads();
  const float below = from_ordered_key(shared->state.prefix);
  const bool last = repeated || shared->next == kFullMask;
  const float above = last ? below : from_ordered_key(shared->next);
  return lerp(below, above, rank.weight);
}

// scores[b, size] = quantile over the patches of that size of their standard deviations; NaN if one
// of them is not a number.
__device__ __forceinline__ void score_size(const LoopParams& p, int size, int64_t b,
                                           SelectShared* shared) {
  const int factor = p.factor[size];
  const int64_t pitch = p.shape.columns();
  const int64_t base_patches = p.shape.tokens();
  const int columns = (static_cast<int>(pitch) + factor - 1) / factor;
  const int base_rows = static_cast<int>(p.shape.rows());
  const int rows = (base_rows + factor - 1) / factor;
  const int patches = static_cast<int>(p.shape.frames) * rows * columns;
  uint32_t* const keys = p.keys + (b * p.sizes + size) * base_patches;
  const Rank rank = quantile_rank(p.settings->quantile, patches);
  if (threadIdx.x == 0) {
    shared->state = {0u, static_cast<int>(rank.below), 0};
    shared->next = kFullMask;
    shared->broken = 0;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < patches; i += kDecideThreads) {
    const int frame = i / columns / rows;
    const int row = i / columns % rows * factor;
    const int64_t at = b * base_patches + (frame * base_rows + row) * pitch;
    const float deviation =
        standard_deviation(merge_square(p, at, row, i % columns * factor, factor));
    if (!is_number(deviation)) shared->broken = 1;  // all writers agree
    keys[i] = ordered_key(deviation);
  }
  __syncthreads();
  const float score = select_quantile(keys, patches, rank, shared);
  if (threadIdx.x == 0) p.scores[b * p.sizes + size] = shared->broken != 0 ? NAN : score;
}

// Takes the step's decision and sets the graph's switches. One thread.
__device__ __forceinline__ void take_decision(const LoopParams& p, const Switches& switches,
                                              int64_t k) {
  LoopState* const state = p.state;
  const uint32_t cancel = static_cast<volatile Progress*>(p.progress)->cancel;
  if (cancel == state->generation || k >= p.settings->steps) state->stopped = 1;
  unsigned branch = kFullMask;  // no body of a SWITCH: it runs nothing
  if (state->stopped == 0) {
    StepRow* const row = p.progress->rows() + k;
    row->time_ns = device_time_ns();
    const int batch = static_cast<int>(p.shape.batch);
    decide_step(p.scores, p.thresholds + k * p.sizes, batch, p.sizes, p.forced[k], p.rule(),
                &state->policy, row->record);
    row->cache[0] = static_cast<float>(static_cast<int32_t>(CacheReason::kOff));
    row->cache[1] = NAN;
    if (p.increments != nullptr) {
      cache_step(p.signal, p.increments[k], p.cache_rows, p.sizes + 1, p.settings->cache,
                 &state->policy, p.cache, row->cache);
    }
    state->step = static_cast<int32_t>(k);
    __threadfence_system();  // a host that sees the count sees the row
    static_cast<volatile Progress*>(p.progress)->decided = static_cast<uint32_t>(k) + 1;
    branch = static_cast<unsigned>(p.first_branch(k) + state->policy.branch);
  }
  const bool more = state->stopped == 0 && k + 1 < p.settings->steps;
  if (switches.branches > 0) set_conditional(switches.branch, branch);
  if (switches.loops != 0) set_conditional(switches.loop, more ? 1u : 0u);
}

// Decides the next step: scores of all sizes, policy, trace row, conditional nodes.
//
// Grid: one block of 512 threads per (size, sample), at least one; x is the size. Patches'
// deviations become integer keys in scratch memory; a radix select finds the quantile's key
// exactly, then torch.quantile's interpolation. The block that finishes last applies the policy.
// Shared memory: a histogram of 256 counts. Bound by latency: five short passes over keys that stay
// in the L1 / L2 cache, one read and one write over PCIe. Deterministic: only integers are combined
// atomically, and one thread decides. A step whose bucket is forced computes no scores.
__global__ void __launch_bounds__(kDecideThreads) decide_kernel(LoopParams p, Switches switches) {
  __shared__ SelectShared shared;
  const int64_t k = p.state->step + 1;
  const bool scored = p.state->stopped == 0 && p.scored(k);
  __syncthreads();  // every thread has read the state before one thread advances it
  if (scored) score_size(p, blockIdx.x, blockIdx.y, &shared);
  if (threadIdx.x != 0) return;
  __threadfence();  // this block's scores before its ticket
  const unsigned blocks = gridDim.x * gridDim.y;
  if (atomicAdd(&p.state->ticket, 1u) != blocks - 1) return;
  __threadfence();  // the other blocks' scores after theirs
  p.state->ticket = 0;
  take_decision(p, switches, k);
}

}  // namespace ddit_rt
