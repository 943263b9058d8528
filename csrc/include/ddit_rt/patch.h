// Where a latent value goes when latents are cut into patches of r frames x p x p pixels, one token
// each:
//
//   latents[b, c, f * r + dt, row * p + dy, column * p + dx]
//     = tokens[b, (f * rows + row) * columns + column, feature],  where feature is
//       ((c * r + dt) * p + dy) * p + dx  with channels first,
//       ((dt * p + dy) * p + dx) * C + c  with channels last.
//
// Channels first is FluxPipeline._pack_latents of diffusers at p = 2, and a patch embedding by
// Conv3d flattened, as Wan's. Channels last is how WanTransformer3DModel's output is ordered.
#pragma once

#include <stdint.h>

#include "ddit_rt/macros.h"

namespace ddit_rt {

inline constexpr int kMaxSizes = 8;  // candidate patch sizes of one call

// The number of a line (see below) as three digits: how many values the two inner ones take, and
// how far apart in latents the lines are that differ by one in the outer, middle or inner digit.
struct LineOrder {
  int64_t middle, inner;
  int64_t outer_stride, middle_stride, inner_stride;
};

struct PatchShape {
  int64_t batch, channels, frames, height, width;  // of the latents
  int64_t patch;                                   // edge p; patches may reach over the far edges
  int64_t frame_patch = 1;                         // r, divides frames
  bool channels_last = false;

  DDIT_RT_HD int64_t rows() const { return (height + patch - 1) / patch; }
  DDIT_RT_HD int64_t columns() const { return (width + patch - 1) / patch; }
  DDIT_RT_HD int64_t tokens() const { return frames / frame_patch * rows() * columns(); }
  DDIT_RT_HD int64_t features() const { return lines() * patch; }

  // Pixel rows of a row of patches, and pixel columns of a column of them, inside the latents.
  DDIT_RT_HD int64_t row_height(int64_t row) const { return within(height - row * patch); }
  DDIT_RT_HD int64_t column_width(int64_t column) const { return within(width - column * patch); }
  DDIT_RT_HD int64_t within(int64_t left) const { return left < patch ? left : patch; }

  // Values of the patch in the far corner: no patch of one frame has fewer.
  DDIT_RT_HD int64_t fewest_values() const {
    return channels * row_height(rows() - 1) * column_width(columns() - 1);
  }

  // A line is one row of pixels of one channel inside a row of patches. Lines are numbered as a
  // token holds them: (c * r + dt) * p + dy, or (dt * p + dy) * C + c with channels last.
  DDIT_RT_HD int64_t lines() const { return channels * frame_patch * patch; }

  DDIT_RT_HD LineOrder line_order() const {
    const int64_t frame = height * width;
    if (channels_last) return {patch, channels, frame, width, frames * frame};
    return {frame_patch, patch, frames * frame, frame, width};
  }

  // Lines that take turns in a token: the values of their pixel column dx are neighbours.
  DDIT_RT_HD int64_t group() const { return channels_last ? channels : 1; }

  // First value of a line of the patch row `row` in latents [B, C, F, H, W].
  DDIT_RT_HD int64_t latent_offset(int64_t b, int64_t f, int64_t row, int64_t line) const {
    const LineOrder order = line_order();
    int64_t outer = line / order.inner;
    int64_t offset = (line - outer * order.inner) * order.inner_stride;
    if (order.middle > 1) {
      const int64_t digits = outer;
      outer = digits / order.middle;
      offset += (digits - outer * order.middle) * order.middle_stride;
    }
    return offset + outer * order.outer_stride +
           ((b * channels * frames + f * frame_patch) * height + row * patch) * width;
  }

  // First feature of the first token of a row of patches, in tokens [B, N, C * r * p * p]. The next
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
