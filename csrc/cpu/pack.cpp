// pack / unpack: a transpose of short runs of `patch` values.
//
// One task is one row of patches of one frame: [C * p lines] x [W / p tokens] of runs. Runs of 4
// and 8 bytes, p = 2 in half and single precision, go through 16-byte registers as 4 x 4 and 2 x 2
// transposes. Lines of different channels lie a power of two apart in usual latents and so share
// cache sets: sixteen at a time stay in the cache. Bound by bytes: each value is read and written
// once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstring>

#include "binding/args.h"

namespace ddit_rt {
namespace {

constexpr int64_t kGrainBytes = 128 * 1024;  // worth a thread of their own
constexpr int64_t kLineBlock = 16;

enum class Direction { kPack, kUnpack };

// transpose<kRun>: kTile<kRun> runs from each of as many places, one to each of as many others.
#ifdef __SSE2__
template <int64_t kRun>
constexpr int64_t kTile = kRun == 4   ? 4
                          : kRun == 8 ? 2
                                      : 1;

inline __m128i load(const char* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

inline void store(char* to, __m128i value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), value);
}

inline void transpose_4(const char* const* from, char* const* to) {
  const __m128i low_01 = _mm_unpacklo_epi32(load(from[0]), load(from[1]));
  const __m128i low_23 = _mm_unpacklo_epi32(load(from[2]), load(from[3]));
  const __m128i high_01 = _mm_unpackhi_epi32(load(from[0]), load(from[1]));
  const __m128i high_23 = _mm_unpackhi_epi32(load(from[2]), load(from[3]));
  store(to[0], _mm_unpacklo_epi64(low_01, low_23));
  store(to[1], _mm_unpackhi_epi64(low_01, low_23));
  store(to[2], _mm_unpacklo_epi64(high_01, high_23));
  store(to[3], _mm_unpackhi_epi64(high_01, high_23));
}

inline void transpose_8(const char* const* from, char* const* to) {
  const __m128i first = load(from[0]);
  const __m128i second = load(from[1]);
  store(to[0], _mm_unpacklo_epi64(first, second));
  store(to[1], _mm_unpackhi_epi64(first, second));
}
#else
template <int64_t kRun>
constexpr int64_t kTile = 1;
#endif

template <int64_t kRun>
inline void transpose(const char* const* from, char* const* to, int64_t run) {
#ifdef __SSE2__
  if constexpr (kRun == 4) return transpose_4(from, to);
  if constexpr (kRun == 8) return transpose_8(from, to);
#endif
  std::memcpy(to[0], from[0], kRun > 0 ? kRun : run);
}

// Some lines of one row of patches, and the same features of its tokens.
struct Block {
  char* line[kLineBlock];
  char* token;  // the first line's run of the first token
  int64_t lines;
  int64_t columns;
  int64_t run;          // bytes of `patch` values
  int64_t token_bytes;  // from one token to the next
};

// Lines [first, last) of tokens [column, end), in square tiles of kSide runs.
template <Direction kDirection, int64_t kRun, int64_t kSide>
inline void move_tiles(const Block& block, int64_t first, int64_t last, int64_t column,
                       int64_t end) {
  // Copies, because the compiler must assume that stores through char* change the block.
  const int64_t run = kRun > 0 ? kRun : block.run;
  const int64_t token_bytes = block.token_bytes;
  char* line_of[kLineBlock];
  std::copy_n(block.line, kLineBlock, line_of);
  char* token = block.token + column * token_bytes;
  for (; column < end; column += kSide, token += kSide * token_bytes) {
    const int64_t at = column * run;
    for (int64_t line = first; line < last; line += kSide) {
      char* lines[kSide];
      char* tokens[kSide];
      for (int64_t i = 0; i < kSide; ++i) {
        lines[i] = line_of[line + i] + at;
        tokens[i] = token + i * token_bytes + line * run;
      }
      char* const* const from = kDirection == Direction::kPack ? lines : tokens;
      char* const* const to = kDirection == Direction::kPack ? tokens : lines;
      if constexpr (kSide == kTile<kRun>)
        transpose<kRun>(from, to, run);
      else
        std::memcpy(to[0], from[0], kRun);
    }
  }
}

template <Direction kDirection, int64_t kRun>
void move_block(const Block& block) {
  constexpr int64_t kSide = kTile<kRun>;
  const int64_t lines = block.lines / kSide * kSide;
  const int64_t columns = block.columns / kSide * kSide;
  // A full block's loop has a known length, and is unrolled.
  if (lines == kLineBlock)
    move_tiles<kDirection, kRun, kSide>(block, 0, kLineBlock, 0, columns);
  else
    move_tiles<kDirection, kRun, kSide>(block, 0, lines, 0, columns);
  if constexpr (kSide > 1) {
    move_tiles<kDirection, kRun, 1>(block, 0, lines, columns, block.columns);
    move_tiles<kDirection, kRun, 1>(block, lines, block.lines, 0, block.columns);
  }
}

// kRun is the run's size in bytes where it is known at compile time, else 0.
template <Direction kDirection, int64_t kRun>
void move_row(const PatchShape& shape, int64_t item, char* latents, char* tokens, int64_t index) {
  const int64_t row = index % shape.rows();
  const int64_t f = index / shape.rows() % shape.frames;
  const int64_t b = index / (shape.rows() * shape.frames);
  Block block{};
  block.columns = shape.columns();
  block.run = kRun > 0 ? kRun : shape.patch * item;
  block.token_bytes = shape.features() * item;
  for (int64_t first = 0; first < shape.lines(); first += kLineBlock) {
    block.lines = std::min(kLineBlock, shape.lines() - first);
    for (int64_t i = 0; i < block.lines; ++i) {
      block.line[i] = latents + shape.latent_offset(b, f, row, first + i) * item;
    }
    block.token = tokens + shape.token_offset(b, f, row, first) * item;
    move_block<kDirection, kRun>(block);
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
