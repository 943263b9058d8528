// Cutting latents into tokens, and back, on the device.
#pragma once

#include "cuda/pack_plan.h"

namespace ddit_rt::pack {

template <int kBytes>
struct Unit;
template <>
struct Unit<2> {
  using Type = uint16_t;
};
template <>
struct Unit<4> {
  using Type = uint32_t;
};
template <>
struct Unit<8> {
  using Type = uint64_t;
};
template <>
struct Unit<16> {
  struct alignas(16) Type {
    uint64_t low, high;
  };
};

// What one load or store moves.
template <int kUnit, int kUnits>
struct alignas(kUnit* kUnits) Vector {
  typename Unit<kUnit>::Type unit[kUnits];
};

// Where a thread begins.
struct Start {
  uint64_t latents;  // byte of its first line
  uint64_t tokens;   // byte of this line's first unit in the first token of the row of patches
  uint32_t vector;   // its access along the line
  bool inside;       // whether there are such lines
};

__device__ __forceinline__ Start start_of(const Params& p, uint32_t warp, uint32_t lane) {
  uint32_t rest = p.line_tiles.quotient(warp);
  const uint32_t line_tile = p.line_tiles.remainder(warp, rest);
  const uint32_t row_number = p.column_tiles.quotient(rest);
  const uint32_t column_tile = p.column_tiles.remainder(rest, row_number);
  rest = p.rows.quotient(row_number);
  const uint32_t row = p.rows.remainder(row_number, rest);
  const uint32_t b = p.frames.quotient(rest);
  const uint32_t f = p.frames.remainder(rest, b);

  const uint32_t tile_row = line_tile * (kLanes >> p.lane_bits) + (lane >> p.lane_bits);
  const uint32_t line = tile_row * p.tile_lines;
  const uint32_t outer = p.inner.quotient(line);
  const uint32_t group = p.group.quotient(line);
  const uint32_t feature = group * p.group.value * p.run.value + p.group.remainder(line, group);

  Start start;
  start.latents = b * p.latent_batch + f * p.latent_frame + row * p.latent_row +
                  outer * p.outer_stride + p.inner.remainder(line, outer) * p.inner_stride;
  start.tokens = row_number * p.token_row + uint64_t{feature} * p.unit;
  start.vector = (column_tile * p.repeats << p.lane_bits) + (lane & ((1u << p.lane_bits) - 1));
  start.inside = tile_row < p.tile_rows;
  return start;
}

// The bytes at which a tile begins, and whether the tensors have it.
struct Tile {
  uint64_t latents, tokens;
  bool inside;
};

// A thread's tiles lie 2^lane_bits accesses apart along its lines.
template <int kUnit, int kUnits>
__device__ __forceinline__ Tile tile_of(const Params& p, const Start& start, uint32_t repeat) {
  const uint32_t vector = start.vector + (repeat << p.lane_bits);
  const uint32_t token = p.run.quotient(vector * kUnits);
  const uint32_t dx = p.run.remainder(vector * kUnits, token);
  return {start.latents + vector * (kUnit * kUnits),
          start.tokens + token * p.token + dx * p.group.value * kUnit,
          start.inside && vector < p.vectors};
}

// A transpose in registers: kLines accesses of kUnits units to latents hold what kUnits accesses of
// kLines units to tokens do. All loads are under way before the first store.
template <int kUnit, int kLines, int kUnits, bool kPack>
__device__ __forceinline__ void move_tiles(const unsigned char* __restrict__ from,
                                           unsigned char* __restrict__ to, const Params& p,
                                           const Start& start) {
  constexpr int kTiles = kRepeats<kUnit * kLines * kUnits>;
  constexpr int kLoads = kPack ? kLines : kUnits;
  constexpr int kStores = kPack ? kUnits : kLines;
  using Load = Vector<kUnit, kStores>;
  using Store = Vector<kUnit, kLoads>;
  Tile tiles[kTiles];
  Load loads[kTiles][kLoads];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    tiles[t] = tile_of<kUnit, kUnits>(p, start, t);
    if (!tiles[t].inside) continue;
    const unsigned char* const source = from + (kPack ? tiles[t].latents : tiles[t].tokens);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      loads[t][i] = *reinterpret_cast<const Load*>(source + (kPack ? p.line_at[i] : p.unit_at[i]));
    }
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    if (!tiles[t].inside) continue;
    unsigned char* const target = to + (kPack ? tiles[t].tokens : tiles[t].latents);
#pragma unroll
    for (int j = 0; j < kStores; ++j) {
      Store store;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) store.unit[i] = loads[t][i].unit[j];
      *reinterpret_cast<Store*>(target + (kPack ? p.unit_at[j] : p.line_at[j])) = store;
    }
  }
}

template <int kValue>
struct Count {
  static constexpr int kCount = kValue;
};

// Calls body(Count<count>()), for a power of two that is at most kMost.
template <int kMost, typename Body>
__device__ __forceinline__ void with_count(uint32_t count, Body body) {
  if constexpr (kMost > 1) {
    if (count < kMost) return with_count<kMost / 2>(count, body);
  }
  body(Count<kMost>());
}

// tokens <-> latents as in patch.h, without arithmetic on the values.
//
// Mapping: a thread transposes tiles of units in registers, see Params: 4 x 4 units of 4 bytes for
// p = 2 in half precision, 8 x 8 values of 2 bytes with channels last. A warp lays its tiles side
// by side such that it touches whole sectors on both sides; at FLUX and Wan sizes 64 bytes of each
// of its lines and 128 bytes of each of its tokens. One warp per (sample, frame, row of
// patches, tile of columns, tile of lines), one to four warps a block. Shared memory: none, so no
// barrier either. Bound by bytes: each value is read once and written once, and every thread has 64
// bytes or more under way where accesses are 16 bytes wide. Deterministic.
template <int kUnit, bool kPack>
__global__ void __launch_bounds__(kMaxThreads)
    pack_kernel(const unsigned char* __restrict__ from,  // latents [B, C, F, H, W], or tokens
                unsigned char* __restrict__ to,          // tokens [B, N, C * p * p], or latents
                Params p) {
  const uint32_t warp = blockIdx.x * (blockDim.x / kLanes) + threadIdx.x / kLanes;
  if (warp >= p.warps) return;
  const Start start = start_of(p, warp, threadIdx.x % kLanes);
  constexpr int kMost = kAccessBytes / kUnit;
  with_count<kMost>(p.tile_lines, [&](auto lines) {
    with_count<kMost>(p.latent_access / kUnit, [&](auto units) {
      constexpr int kLines = decltype(lines)::kCount;
      constexpr int kUnits = decltype(units)::kCount;
      move_tiles<kUnit, kLines, kUnits, kPack>(from, to, p, start);
    });
  });
}

}  // namespace ddit_rt::pack
