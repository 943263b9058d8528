// Cutting latents into tokens, and back, on the device.
#pragma once

#include "ddit_rt/patch.h"

namespace ddit_rt {

inline constexpr int kPackColumns = 32;  // threads along a line
inline constexpr int kPackRows = 8;      // lines at a time

// How a tensor is cut into blocks; made by pack_tiling() on the host.
struct PackTiling {
  int columns;         // pixel columns of a tile, a multiple of the patch edge
  int lines;           // lines (c, dy) of a tile
  int64_t tiles;       // along the width
  int64_t line_tiles;  // along the lines

  DDIT_RT_HD int pitch() const { return columns + 1; }  // odd: fewer bank conflicts when transposed
};

inline PackTiling pack_tiling(const PatchShape& shape) {
  // 64 lines of 33 float32 are 8 KiB of shared memory; longer patches get fewer lines.
  constexpr int64_t kValues = 64 * (kPackColumns + 1);
  const int64_t patch = shape.patch;
  PackTiling tiling{};
  tiling.columns = static_cast<int>(patch >= kPackColumns ? patch : kPackColumns / patch * patch);
  const int64_t fit = kValues / tiling.pitch();
  const int64_t lines = fit < shape.lines() ? fit : shape.lines();
  tiling.lines = static_cast<int>(lines < 1 ? 1 : lines);
  tiling.tiles = (shape.width + tiling.columns - 1) / tiling.columns;
  tiling.line_tiles = (shape.lines() + tiling.lines - 1) / tiling.lines;
  return tiling;
}

// tokens <-> latents as in patch.h, without arithmetic.
//
// Grid: one block of 32 x 8 threads per (sample, frame, row of patches, tile of columns, tile of
// lines). Shared memory: the tile, lines x (columns + 1) values. On the latent side threads run
// along pixel columns, on the token side along a token's features, so both sides are coalesced.
// Bound by bytes: each value is read and written once. T: an integer of the value's size.
template <typename T, bool kPack>
__global__ void __launch_bounds__(kPackColumns* kPackRows)
    pack_kernel(T* __restrict__ latents,  // [B, C, F, H, W]
                T* __restrict__ tokens,   // [B, N, C * p * p]
                PatchShape shape, PackTiling tiling) {
  extern __shared__ unsigned char shared[];
  T* const tile = reinterpret_cast<T*>(shared);

  int64_t index = blockIdx.x;
  const int64_t first_line = index % tiling.line_tiles * tiling.lines;
  index /= tiling.line_tiles;
  const int64_t first_column = index % tiling.tiles * tiling.columns;
  index /= tiling.tiles;
  const int64_t row = index % shape.rows();
  index /= shape.rows();
  const int64_t f = index % shape.frames;
  const int64_t b = index / shape.frames;

  const int64_t columns_left = shape.width - first_column;
  const int64_t lines_left = shape.lines() - first_line;
  const int columns =
      columns_left < tiling.columns ? static_cast<int>(columns_left) : tiling.columns;
  const int lines = lines_left < tiling.lines ? static_cast<int>(lines_left) : tiling.lines;
  const int patch = static_cast<int>(shape.patch);
  const int thread = threadIdx.y * kPackColumns + threadIdx.x;

  const auto latent_side = [&] {
    for (int line = threadIdx.y; line < lines; line += kPackRows) {
      T* const source = latents + shape.latent_offset(b, f, row, first_line + line) + first_column;
      for (int x = threadIdx.x; x < columns; x += kPackColumns) {
        T& cell = tile[line * tiling.pitch() + x];
        if constexpr (kPack)
          cell = source[x];
        else
          source[x] = cell;
      }
    }
  };
  const auto token_side = [&] {
    T* const target = tokens + shape.token_offset(b, f, row, first_line) +
                      first_column / patch * shape.features();
    const int run = lines * patch;  // features of one token in this tile, contiguous
    for (int i = thread; i < columns * lines; i += kPackColumns * kPackRows) {
      const int token = i / run;
      const int feature = i - token * run;
      const int line = feature / patch;
      T& cell = tile[line * tiling.pitch() + token * patch + feature - line * patch];
      T& value = target[token * shape.features() + feature];
      if constexpr (kPack)
        value = cell;
      else
        cell = value;
    }
  };
  if constexpr (kPack)
    latent_side();
  else
    token_side();
  __syncthreads();
  if constexpr (kPack)
    token_side();
  else
    latent_side();
}

}  // namespace ddit_rt
