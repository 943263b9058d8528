// pack / unpack: a transpose of short runs.
//
// One task is one row of patches of one frame, a matrix of lines x columns of runs: a token's
// `patch` values of a line with channels first, one pixel's value with channels last. Runs of 2, 4
// and 8 bytes go through 16-byte registers as 8 x 8, 4 x 4 and 2 x 2 transposes. Lines of different
// channels lie a power of two apart in usual latents and so share cache sets: sixteen at a time
// stay in the cache. Bound by bytes: each value is read and written once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <vector>

#include "binding/args.h"

namespace ddit_rt {
namespace {

constexpr int64_t kGrainBytes = 128 * 1024;  // worth a thread of their own
constexpr int64_t kLineBlock = 16;

enum class Direction { kPack, kUnpack };

// transpose<kRun>: kTile<kRun> runs from each of as many places, one to each of as many others.
#ifdef __SSE2__
template <int64_t kRun>
constexpr int64_t kTile = kRun == 2                ? 8
                          : kRun == 4 || kRun == 8 ? 4
                                                   : 1;

inline __m128i load(const char* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

inline void store(char* to, __m128i value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), value);
}

inline void transpose_2(const char* const* from, char* const* to) {
  __m128i pairs[8];  // [i] and [i + 1]: lines i and i + 1 by turns, the low and the high columns
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm_unpacklo_epi16(load(from[i]), load(from[i + 1]));
    pairs[i + 1] = _mm_unpackhi_epi16(load(from[i]), load(from[i + 1]));
  }
  for (int half = 0; half < 2; ++half) {
    const __m128i low_03 = _mm_unpacklo_epi32(pairs[half], pairs[half + 2]);
    const __m128i high_03 = _mm_unpackhi_epi32(pairs[half], pairs[half + 2]);
    const __m128i low_47 = _mm_unpacklo_epi32(pairs[half + 4], pairs[half + 6]);
    const __m128i high_47 = _mm_unpackhi_epi32(pairs[half + 4], pairs[half + 6]);
    char* const* const out = to + 4 * half;
    store(out[0], _mm_unpacklo_epi64(low_03, low_47));
    store(out[1], _mm_unpackhi_epi64(low_03, low_47));
    store(out[2], _mm_unpacklo_epi64(high_03, high_47));
    store(out[3], _mm_unpackhi_epi64(high_03, high_47));
  }
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
  for (int i = 0; i < 4; i += 2) {
    for (int j = 0; j < 4; j += 2) {
      const __m128i first = load(from[i] + 8 * j);
      const __m128i second = load(from[i + 1] + 8 * j);
      store(to[j] + 8 * i, _mm_unpacklo_epi64(first, second));
      store(to[j + 1] + 8 * i, _mm_unpackhi_epi64(first, second));
    }
  }
}

// The same of 8 x 8 runs of 4 bytes, where the processor has 32-byte registers: bfloat16 at p = 2.
// Runs of 8 bytes gain nothing by them.
#define DDIT_RT_AVX2 __attribute__((target("avx2")))
constexpr int64_t kWideTile = 8;

DDIT_RT_AVX2 inline __m256i load_wide(const char* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

DDIT_RT_AVX2 inline void store_wide(char* to, __m256i value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value);
}

DDIT_RT_AVX2 inline void transpose_wide_4(const char* const* from, char* const* to) {
  __m256i quads[8];  // [i]: lines 0 to 3 of columns i and i + 4, [i + 4]: lines 4 to 7 of the same
  for (int i = 0; i < 8; i += 4) {
    const __m256i low_01 = _mm256_unpacklo_epi32(load_wide(from[i]), load_wide(from[i + 1]));
    const __m256i high_01 = _mm256_unpackhi_epi32(load_wide(from[i]), load_wide(from[i + 1]));
    const __m256i low_23 = _mm256_unpacklo_epi32(load_wide(from[i + 2]), load_wide(from[i + 3]));
    const __m256i high_23 = _mm256_unpackhi_epi32(load_wide(from[i + 2]), load_wide(from[i + 3]));
    quads[i] = _mm256_unpacklo_epi64(low_01, low_23);
    quads[i + 1] = _mm256_unpackhi_epi64(low_01, low_23);
    quads[i + 2] = _mm256_unpacklo_epi64(high_01, high_23);
    quads[i + 3] = _mm256_unpackhi_epi64(high_01, high_23);
  }
  for (int i = 0; i < 4; ++i) {
    store_wide(to[i], _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x20));
    store_wide(to[i + 4], _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x31));
  }
}
#else
template <int64_t kRun>
constexpr int64_t kTile = 1;
#endif

template <int64_t kRun>
inline void transpose(const char* const* from, char* const* to, int64_t run) {
#ifdef __SSE2__
  if constexpr (kRun == 2) return transpose_2(from, to);
  if constexpr (kRun == 4) return transpose_4(from, to);
  if constexpr (kRun == 8) return transpose_8(from, to);
#endif
  std::memcpy(to[0], from[0], kRun > 0 ? kRun : run);
}

// Some lines of one row of patches, and the same features of its tokens.
struct Block {
  char* line[kLineBlock];
  char* token;               // the first line's run of the first column
  const int64_t* column_at;  // from there to each column's, in bytes
  int64_t lines;
  int64_t columns;
  int64_t run;  // bytes
};

// Lines [first, last) of columns [column, end), in square tiles of kSide runs.
template <Direction kDirection, int64_t kRun, int64_t kSide>
inline void move_tiles(const Block& block, int64_t first, int64_t last, int64_t column,
                       int64_t end) {
  // Copies, because the compiler must assume that stores through char* change the block.
  const int64_t run = kRun > 0 ? kRun : block.run;
  const int64_t* const column_at = block.column_at;
  char* line_of[kLineBlock];
  std::copy_n(block.line, kLineBlock, line_of);
  char* const token = block.token;
  for (; column < end; column += kSide) {
    const int64_t at = column * run;
    char* token_of[kSide];
    for (int64_t i = 0; i < kSide; ++i) token_of[i] = token + column_at[column + i];
    for (int64_t line = first; line < last; line += kSide) {
      char* lines[kSide];
      char* tokens[kSide];
      for (int64_t i = 0; i < kSide; ++i) {
        lines[i] = line_of[line + i] + at;
        tokens[i] = token_of[i] + line * run;
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

#ifdef __SSE2__
// A full block's columns of runs of 4 bytes, as far as they fill wide tiles; returns how many.
template <Direction kDirection>
DDIT_RT_AVX2 int64_t move_wide(const Block& block) {
  const int64_t columns = block.columns / kWideTile * kWideTile;
  for (int64_t column = 0; column < columns; column += kWideTile) {
    for (int64_t line = 0; line < kLineBlock; line += kWideTile) {
      char* lines[kWideTile];
      char* tokens[kWideTile];
      for (int64_t i = 0; i < kWideTile; ++i) {
        lines[i] = block.line[line + i] + column * 4;
        tokens[i] = block.token + block.column_at[column + i] + line * 4;
      }
      if constexpr (kDirection == Direction::kPack)
        transpose_wide_4(lines, tokens);
      else
        transpose_wide_4(tokens, lines);
    }
  }
  return columns;
}
#endif

template <Direction kDirection, int64_t kRun>
void move_block(const Block& block) {
  constexpr int64_t kSide = kTile<kRun>;
  const int64_t lines = block.lines / kSide * kSide;
  const int64_t columns = block.columns / kSide * kSide;
  int64_t moved = 0;
#ifdef __SSE2__
  static const bool kHasWide = __builtin_cpu_supports("avx2");
  if constexpr (kRun == 4)
    if (lines == kLineBlock && kHasWide) moved = move_wide<kDirection>(block);
#endif
  // A full block's loop has a known length, and is unrolled.
  if (lines == kLineBlock)
    move_tiles<kDirection, kRun, kSide>(block, 0, kLineBlock, moved, columns);
  else
    move_tiles<kDirection, kRun, kSide>(block, 0, lines, 0, columns);
  if constexpr (kSide > 1) {
    move_tiles<kDirection, kRun, 1>(block, 0, lines, columns, block.columns);
    move_tiles<kDirection, kRun, 1>(block, lines, block.lines, 0, block.columns);
  }
}

// How every row of patches is cut into runs; all in bytes.
struct Runs {
  int64_t size;
  int64_t lines;                    // whose runs of a column are neighbours in a token
  int64_t columns;                  // runs of a line
  std::vector<int64_t> line_at;     // latents: from the row's first line to every line
  std::vector<int64_t> feature_at;  // tokens: from the row's first value to every line's
  std::vector<int64_t> column_at;   // tokens: from a line's first run to its run of every column
};

Runs runs_of(const PatchShape& shape, int64_t item) {
  Runs runs{};
  const bool pixels = shape.channels_last;
  runs.size = pixels ? item : shape.patch * item;
  runs.lines = pixels ? shape.channels : shape.lines();
  runs.columns = pixels ? shape.width : shape.columns();
  for (int64_t line = 0; line < shape.lines(); ++line) {
    runs.line_at.push_back(shape.latent_offset(0, 0, 0, line) * item);
    runs.feature_at.push_back(shape.feature_offset(line) * item);
  }
  const int64_t per_token = pixels ? shape.patch : 1;
  for (int64_t column = 0; column < runs.columns; ++column) {
    const int64_t token = column / per_token;
    const int64_t dx = column - token * per_token;
    runs.column_at.push_back((token * shape.features() + dx * shape.group()) * item);
  }
  return runs;
}

// latents and tokens: where the row of patches begins. kRun is the run's size in bytes where it is
// known at compile time, else 0.
template <Direction kDirection, int64_t kRun>
void move_row(const Runs& runs, char* latents, char* tokens) {
  Block block{};
  block.column_at = runs.column_at.data();
  block.columns = runs.columns;
  block.run = runs.size;
  const auto lines = static_cast<int64_t>(runs.line_at.size());
  for (int64_t group = 0; group < lines; group += runs.lines) {
    for (int64_t first = 0; first < runs.lines; first += kLineBlock) {
      block.lines = std::min(kLineBlock, runs.lines - first);
      const int64_t line = group + first;
      for (int64_t i = 0; i < block.lines; ++i) block.line[i] = latents + runs.line_at[line + i];
      block.token = tokens + runs.feature_at[line];
      move_block<kDirection, kRun>(block);
    }
  }
}

template <Direction kDirection, int64_t kRun>
void move_all(const PatchShape& shape, const Runs& runs, int64_t item, char* latents,
              char* tokens) {
  const int64_t rows = shape.batch * shape.frames * shape.rows();
  const int64_t row_bytes = std::max<int64_t>(1, shape.lines() * shape.width * item);
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / row_bytes);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % shape.rows();
      const int64_t f = i / shape.rows() % shape.frames;
      const int64_t b = i / shape.rows() / shape.frames;
      move_row<kDirection, kRun>(runs, latents + shape.latent_offset(b, f, row, 0) * item,
                                 tokens + shape.token_offset(b, f, row) * item);
    }
  });
}

template <Direction kDirection>
void move(const PatchShape& shape, const Tensor& latents, const Tensor& tokens) {
  if (latents.numel() == 0) return;
  const auto item = static_cast<int64_t>(latents.element_size());
  auto* const latent_bytes = static_cast<char*>(latents.data_ptr());
  auto* const token_bytes = static_cast<char*>(tokens.data_ptr());
  const Runs runs = runs_of(shape, item);
  switch (runs.size) {
    case 2:
      return move_all<kDirection, 2>(shape, runs, item, latent_bytes, token_bytes);
    case 4:
      return move_all<kDirection, 4>(shape, runs, item, latent_bytes, token_bytes);
    case 8:
      return move_all<kDirection, 8>(shape, runs, item, latent_bytes, token_bytes);
    case 16:
      return move_all<kDirection, 16>(shape, runs, item, latent_bytes, token_bytes);
    case 32:
      return move_all<kDirection, 32>(shape, runs, item, latent_bytes, token_bytes);
    default:
      return move_all<kDirection, 0>(shape, runs, item, latent_bytes, token_bytes);
  }
}

Tensor pack_cpu(Tensor latents, int64_t patch_size, bool channels_last) {
  const PatchShape shape = pack_shape(latents, patch_size, channels_last);
  Tensor tokens = new_tokens(latents, shape);
  move<Direction::kPack>(shape, latents, tokens);
  return tokens;
}

Tensor unpack_cpu(Tensor tokens, int64_t patch_size, int64_t height, int64_t width, int64_t frames,
                  bool channels_last) {
  const PatchShape shape = unpack_shape(tokens, patch_size, height, width, frames, channels_last);
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
