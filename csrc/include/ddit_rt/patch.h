// Where a latent value goes when latents are cut into patches, one token each.
//
//   tokens[b, (f * rows + row) * columns + column, (c * p + dy) * p + dx]
//     = latents[b, c, f, row * p + dy, column * p + dx]
//
// At p = 2 this is FluxPipeline._pack_latents of diffusers.
#pragma once

#include <stdint.h>

#include "ddit_rt/macros.h"

namespace ddit_rt {

inline constexpr int kMaxSizes = 8;  // candidate patch sizes of one call

struct PatchShape {
  int64_t batch, channels, frames, height, width;  // of the latents
  int64_t patch;                                   // edge of a patch, divides height and width

  DDIT_RT_HD int64_t rows() const { return height / patch; }
  DDIT_RT_HD int64_t columns() const { return width / patch; }
  DDIT_RT_HD int64_t tokens() const { return frames * rows() * columns(); }
  DDIT_RT_HD int64_t features() const { return channels * patch * patch; }

  // A line is one row of pixels of one channel inside a row of patches: line = c * patch + dy.
  DDIT_RT_HD int64_t lines() const { return channels * patch; }

  // First value of a line of the patch row `row` in latents [B, C, F, H, W].
  DDIT_RT_HD int64_t latent_offset(int64_t b, int64_t f, int64_t row, int64_t line) const {
    const int64_t c = line / patch;
    const int64_t dy = line - c * patch;
    return (((b * channels + c) * frames + f) * height + row * patch + dy) * width;
  }

  // First value of the line's `patch` features in tokens [B, N, C * p * p], for the first token of
  // the patch row; the next token is features() further on.
  DDIT_RT_HD int64_t token_offset(int64_t b, int64_t f, int64_t row, int64_t line) const {
    return (b * tokens() + (f * rows() + row) * columns()) * features() + line * patch;
  }
};

}  // namespace ddit_rt
