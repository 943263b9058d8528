// How pack and unpack are cut into memory accesses, threads and blocks. Decided on the host.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "ddit_rt/divisor.h"
#include "ddit_rt/patch.h"

namespace ddit_rt::pack {

inline constexpr int kLanes = 32;                  // of a warp
inline constexpr int kMaxThreads = 128;            // of a block
inline constexpr int kAccessBytes = 16;            // the widest load and store
inline constexpr int kMaxTile = kAccessBytes / 2;  // units of two bytes in it
inline constexpr int kThreadBytes = 64;            // what a thread should have under way
inline constexpr int kMaxRepeats = 4;              // but no more tiles than that
inline constexpr int64_t kSectorBytes = 32;        // what memory moves at least
inline constexpr int64_t kSegmentBytes = 64;       // what a warp should find side by side
inline constexpr int64_t kEnoughBlocks = 264;      // two for each multiprocessor of an H200

// What a thread must know. All but counts are bytes.
//
// A unit is what stays together on both sides: the p values of a line in a token, or one value with
// channels last; but at most 16 bytes, and no more than alignment allows, so that a line has a run
// of one or more units in a token. A tile, the least that a thread moves, is `tile_lines` lines by
// the units of one access to latents. An access to tokens takes one unit of each of these lines.
struct Params {
  uint32_t warps;  // that have something to do
  // Warp number -> (b, f, row, column tile, line tile), the last running fastest.
  Divisor line_tiles, column_tiles, rows, frames;
  uint64_t latent_batch, latent_frame, latent_row;  // from one b, f or row to the next
  uint64_t token_row;                               // all tokens of a row of patches
  uint64_t token;

  uint32_t unit;           // 2, 4, 8 or 16
  uint32_t latent_access;  // unit to 16
  uint32_t token_access;   // likewise
  uint32_t tile_lines;     // token_access / unit
  uint32_t repeats;        // tiles of a thread
  uint32_t lane_bits;      // 2^lane_bits lanes of a warp go along a line, the others across lines
  uint32_t vectors;        // accesses to one line
  uint32_t tile_rows;      // tiles across the lines of a row of patches

  // Lines, as patch.h numbers them; units of a line in a token.
  Divisor inner, group, run;
  uint64_t outer_stride, inner_stride;

  uint64_t line_at[kMaxTile];  // latents: from a tile's first line to each
  uint64_t unit_at[kMaxTile];  // tokens: from the first unit of a tile's first line to each
};

struct Launch {
  Params params;
  int threads;     // of a block
  int64_t warps;   // may be too many
  int64_t blocks;  // likewise
};

constexpr int repeats_of(int tile_bytes) {
  return std::clamp(kThreadBytes / tile_bytes, 1, kMaxRepeats);
}

template <int kTileBytes>
inline constexpr int kRepeats = repeats_of(kTileBytes);

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// The widest access that divides all the lengths and addresses whose bits are set here.
inline uint32_t widest_access(uint64_t bits) {
  bits |= kAccessBytes;
  return static_cast<uint32_t>(bits & (~bits + 1));
}

// Whether tiles of `count` in a row all meet the ends of periods at the same places.
inline bool keeps_step(int64_t count, int64_t period) {
  return count % period == 0 || period % count == 0;
}

inline Params strides_of(const PatchShape& shape, int64_t item) {
  const LineOrder order = shape.line_order();
  const int64_t frame = shape.height * shape.width * item;
  Params p{};
  p.rows = Divisor(shape.rows());
  p.frames = Divisor(shape.frames);
  p.latent_batch = shape.channels * shape.frames * frame;
  p.latent_frame = frame;
  p.latent_row = shape.patch * shape.width * item;
  p.token = shape.features() * item;
  p.token_row = shape.columns() * p.token;
  p.inner = Divisor(order.inner);
  p.group = Divisor(shape.group());
  p.outer_stride = order.outer_stride * item;
  p.inner_stride = order.inner_stride * item;
  return p;
}

// The widest unit, and the widest accesses for which a tile looks the same wherever it is.
inline void choose_accesses(Params& p, const PatchShape& shape, int64_t item, uint64_t latents,
                            uint64_t tokens) {
  const auto line_bytes = static_cast<uint64_t>(shape.patch * item);
  const auto whole = shape.channels_last ? static_cast<uint64_t>(item) : line_bytes;
  p.unit = widest_access(latents | tokens | whole);
  const auto run = static_cast<int64_t>(line_bytes / p.unit);
  p.run = Divisor(run);

  p.latent_access = widest_access(latents | static_cast<uint64_t>(shape.width * item));
  while (!keeps_step(p.latent_access / p.unit, run)) p.latent_access /= 2;

  // Lines whose units are neighbours in a token. Tiles of them keep step with the inner digit, C
  // with channels last, else p: what divides C does, and a run of one unit makes p a power of two.
  const int64_t lines = shape.channels_last ? shape.channels : run == 1 ? shape.lines() : 1;
  p.token_access = widest_access(tokens | static_cast<uint64_t>(lines * p.unit));
  p.tile_lines = p.token_access / p.unit;
}

inline void fill_tables(Params& p, const PatchShape& shape, int64_t item) {
  for (uint32_t i = 0; i < p.tile_lines; ++i) {
    p.line_at[i] = shape.latent_offset(0, 0, 0, i) * item;
  }
  for (uint32_t i = 0; i < p.latent_access / p.unit; ++i) {
    const uint32_t token = i / p.run.value;
    const uint32_t dx = i - token * p.run.value;
    p.unit_at[i] = token * p.token + uint64_t{dx} * p.group.value * p.unit;
  }
}

// Lane bits for which a warp finds whole segments on both sides and, of these, leaves the fewest
// lanes idle. Where lines begin within a sector, longer segments on their side break a tie.
inline uint32_t choose_lane_bits(const Params& p) {
  const bool straddles = int64_t{p.vectors} * p.latent_access % kSectorBytes != 0;
  uint32_t best = 0;
  int64_t best_segment = 0;
  int64_t best_use = 0;
  for (uint32_t bits = 0; (kLanes >> bits) > 0; ++bits) {
    const int64_t along = int64_t{1} << bits;
    const int64_t across = kLanes >> bits;
    const int64_t segment =
        std::min({kSegmentBytes, along * p.latent_access, across * p.token_access});
    const int64_t use = 1024 * p.vectors / round_up(p.vectors, along * p.repeats) * p.tile_rows /
                        round_up(p.tile_rows, across);
    const bool as_good = segment == best_segment && use == best_use && straddles;
    if (segment > best_segment || (segment == best_segment && use > best_use) || as_good) {
      best = bits;
      best_segment = segment;
      best_use = use;
    }
  }
  return best;
}

// For a shape with values in it whose lines and tokens are shorter than 2^31 bytes. `latents` and
// `tokens` are addresses: their alignment decides too.
inline Launch launch_of(const PatchShape& shape, int64_t item, const void* latents,
                        const void* tokens) {
  Launch launch{strides_of(shape, item), kMaxThreads, 0, 0};
  Params& p = launch.params;
  choose_accesses(p, shape, item, reinterpret_cast<uintptr_t>(latents),
                  reinterpret_cast<uintptr_t>(tokens));
  fill_tables(p, shape, item);
  p.tile_rows = static_cast<uint32_t>(shape.lines() / p.tile_lines);
  p.vectors = static_cast<uint32_t>(shape.width * item / p.latent_access);
  p.repeats = repeats_of(static_cast<int>(p.latent_access * p.tile_lines));
  p.lane_bits = choose_lane_bits(p);

  const int64_t along = int64_t{p.repeats} << p.lane_bits;
  const int64_t across = kLanes >> p.lane_bits;
  p.column_tiles = Divisor(round_up(p.vectors, along) / along);
  p.line_tiles = Divisor(round_up(p.tile_rows, across) / across);
  launch.warps = shape.batch * shape.frames * shape.rows() * int64_t{p.column_tiles.value} *
                 p.line_tiles.value;
  p.warps = static_cast<uint32_t>(launch.warps);
  while (launch.threads > kLanes && launch.warps * kLanes < kEnoughBlocks * launch.threads) {
    launch.threads /= 2;
  }
  launch.blocks = round_up(launch.warps * kLanes, launch.threads) / launch.threads;
  return launch;
}

}  // namespace ddit_rt::pack
