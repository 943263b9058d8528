// Where a latent value goes when each frame of the latents is cut into patches of p x p pixels, one
// token each:
//
//   latents[b, c, f, row * p + dy, column * p + dx]
//     = tokens[b, (f * rows + row) * columns + column, feature],  where feature is
//       (c * p + dy) * p + dx  with channels first,
//       (dy * p + dx) * C + c  with channels last.
//
// Channels first is FluxPipeline._pack_latents of diffusers at p = 2, and a patch embedding by
// Conv3d flattened, as Wan's. Channels last is how WanTransformer3DModel's output is ordered.
#pragma once

#include <stdint.h>

#include "ddit_rt/macros.h"

namespace ddit_rt {

inline constexpr int kMaxSizes = 8;  // candidate patch sizes of one call

// The number of a line (see below) as two digits: how many values the inner one takes, and how far
// apart in latents the lines are that differ by one in the outer or in the inner digit.
struct LineOrder {
  int64_t inner;
  int64_t outer_stride, inner_stride;
};

struct PatchShape {
  int64_t batch, channels, frames, height, width;  // of the latents
  int64_t patch;                                   // edge p; patches may reach over the far edges
  bool channels_last = false;

  DDIT_RT_HD int64_t rows() const { return (height + patch - 1) / patch; }
  DDIT_RT_HD int64_t columns() const { return (width + patch - 1) / patch; }
  DDIT_RT_HD int64_t tokens() const { return frames * rows() * columns(); }
  DDIT_RT_HD int64_t features() const { return lines() * patch; }

  // Pixel rows of a row of patches, and pixel columns of a column of them, inside the latents.
  DDIT_RT_HD int64_t row_height(int64_t row) const { return within(height - row * patch); }
  DDIT_RT_HD int64_t column_width(int64_t column) const { return within(width - column * patch); }
  DDIT_RT_HD int64_t within(int64_t left) const { return left < patch ? left : patch; }

  // Values of the patch in the far corner: no patch has fewer.
  DDIT_RT_HD int64_t fewest_values() const {
    return channels * row_height(rows() - 1) * column_width(columns() - 1);
  }

  // A line is one row of pixels of one channel inside a row of patches. Lines are numbered as a
  // token holds them: c * p + dy, or dy * C + c with channels last.
  DDIT_RT_HD int64_t lines() const { return channels * patch; }

  DDIT_RT_HD LineOrder line_order() const {
    const int64_t channel = frames * height * width;
    if (channels_last) return {channels, width, channel};
    return {patch, channel, width};
  }

  // Lines that take turns in a token: the values of their pixel column dx are neighbours.
  DDIT_RT_HD int64_t group() const { return channels_last ? channels : 1; }

  // First value of a line of the patch row `row` in latents [B, C, F, H, W].
  DDIT_RT_HD int64_t latent_offset(int64_t b, int64_t f, int64_t row, int64_t line) const {
    const LineOrder order = line_order();
    const int64_t outer = line / order.inner;
    return outer * order.outer_stride + (line - outer * order.inner) * order.inner_stride +
           ((b * channels * frames + f) * height + row * patch) * width;
  }

  // First feature of the first token of a row of patches, in tokens [B, N, C * p * p]. The next
  // token is features() further on.
  DDIT_RT_HD int64_t token_offset(int64_t b, int64_t f, int64_t row) const {
    return (b * tokens() + (f * rows() + row) * columns()) * features();
  }

  // First value of a line among the features of a token; the line's next is group() further on.
  DDIT_RT_HD int64_t feature_offset(int64_t line) const {
    const int64_t first = line / group();
    return first * patch * group() + line - first * group();
  }
};

}  // namespace ddit_rt
