// pack / unpack: a transpose of short runs of `patch` values.
//
// One task is one row of patches of one frame: [C * p lines] x [W / p tokens] of runs. Lines of
// different channels lie a power of two apart in usual latents and so share cache sets; taking them
// eight at a time stays within the ways of an L1 cache. Bound by bytes: each value is read and
// written once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "binding/args.h"

namespace ddit_rt {
namespace {

constexpr int64_t kGrainBytes = 128 * 1024;  // worth a thread of their own
constexpr int64_t kLineBlock = 8;

enum class Direction { kPack, kUnpack };

template <Direction kDirection, int64_t kRun>
inline void copy_run(char* latents, char* tokens, int64_t run) {
  char* to = kDirection == Direction::kPack ? tokens : latents;
  const char* from = kDirection == Direction::kPack ? latents : tokens;
  std::memcpy(to, from, kRun > 0 ? kRun : run);
}

// kRun is the run's size in bytes where it is known at compile time, else 0.
template <Direction kDirection, int64_t kRun>
void move_row(const PatchShape& shape, int64_t item, char* latents, char* tokens, int64_t index) {
  const int64_t row = index % shape.rows();
  const int64_t f = index / shape.rows() % shape.frames;
  const int64_t b = index / (shape.rows() * shape.frames);
  const int64_t run = kRun > 0 ? kRun : shape.patch * item;
  const int64_t token_bytes = shape.features() * item;
  const int64_t columns = shape.columns();
  for (int64_t first = 0; first < shape.lines(); first += kLineBlock) {
    const int64_t count = std::min(kLineBlock, shape.lines() - first);
    char* line[kLineBlock];
    for (int64_t i = 0; i < count; ++i) {
      line[i] = latents + shape.latent_offset(b, f, row, first + i) * item;
    }
    char* token = tokens + shape.token_offset(b, f, row, first) * item;
    for (int64_t column = 0; column < columns; ++column, token += token_bytes) {
      for (int64_t i = 0; i < count; ++i) {
        copy_run<kDirection, kRun>(line[i] + column * run, token + i * run, run);
      }
    }
  }
}

template <Direction kDirection, int64_t kRun>
void move_all(const PatchShape& shape, int64_t item, char* latents, char* tokens) {
  const int64_t rows = shape.batch * shape.frames * shape.rows();
  const int64_t row_bytes = std::max<int64_t>(1, shape.lines() * shape.width * item);
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / row_bytes);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      move_row<kDirection, kRun>(shape, item, latents, tokens, i);
  });
}

template <Direction kDirection>
void move(const PatchShape& shape, const Tensor& latents, const Tensor& tokens) {
  const auto item = static_cast<int64_t>(latents.element_size());
  auto* const latent_bytes = static_cast<char*>(latents.data_ptr());
  auto* const token_bytes = static_cast<char*>(tokens.data_ptr());
  switch (shape.patch * item) {
    case 4:
      return move_all<kDirection, 4>(shape, item, latent_bytes, token_bytes);
    case 8:
      return move_all<kDirection, 8>(shape, item, latent_bytes, token_bytes);
    case 16:
      return move_all<kDirection, 16>(shape, item, latent_bytes, token_bytes);
    case 32:
      return move_all<kDirection, 32>(shape, item, latent_bytes, token_bytes);
    default:
      return move_all<kDirection, 0>(shape, item, latent_bytes, token_bytes);
  }
}

Tensor pack_cpu(Tensor latents, int64_t patch_size) {
  const PatchShape shape = pack_shape(latents, patch_size);
  Tensor tokens = new_tokens(latents, shape);
  move<Direction::kPack>(shape, latents, tokens);
  return tokens;
}

Tensor unpack_cpu(Tensor tokens, int64_t patch_size, int64_t height, int64_t width,
                  int64_t frames) {
  const PatchShape shape = unpack_shape(tokens, patch_size, height, width, frames);
  Tensor latents = new_latents(tokens, shape, frames > 0);
  move<Direction::kUnpack>(shape, latents, tokens);
  return latents;
}

}  // namespace
}  // namespace ddit_rt

STABLE_TORCH_LIBRARY_IMPL(ddit_rt, CPU, m) {
  m.impl("pack", TORCH_BOX(&ddit_rt::pack_cpu));
  m.impl("unpack", TORCH_BOX(&ddit_rt::unpack_cpu));
}
