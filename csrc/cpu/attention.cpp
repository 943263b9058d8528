// Attention in float32, without the matrix of scores: softmax(scale * Q K^T) V.
//
// Lanes of a vector are queries. A tile of scores is kTile keys by up to three vectors of queries,
// summed in registers over the channels, and so is a tile of results, kTile channels by as many
// queries, summed over the keys: each multiply-add reads one broadcast value and a vector that
// several of them share, and maxima, exponentials and sums go down the lanes, never across. Keys
// and values are copied a chunk at a time for several blocks of queries, whose sums are rescaled
// where a chunk raises their maximum. A query's result depends neither on the number of threads nor
// on the other queries. Bound by multiply-adds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "binding/args.h"
#include "cpu/vectors.h"
#include "ddit_rt/macros.h"

// This file alone is built with multiply-add contraction: no other code has to give the same bits.
namespace ddit_rt {
namespace {

constexpr int64_t kChunk = 256;          // keys at a time: their scores stay in the cache
constexpr int64_t kBlocks = 4;           // of queries that share a chunk's copy
constexpr int kVectors = 3;              // of queries in a block
constexpr int64_t kGrain = 1024 * 1024;  // multiply-adds worth a thread of their own
constexpr double kLog2E = 1.4426950408889634;

// 2^x for x <= 0, at least 2^-126; NaN stays NaN. 2^f, f in [-1/2, 1/2], is its minimax polynomial
// of degree 6: relative error 1e-7.
template <int kLanes>
DDIT_RT_HD void exp2_(Floats<kLanes>& x) {
  x = x < -126.0f ? Floats<kLanes>{} - 126.0f : x;
  // Adding 1.5 * 2^23 leaves the nearest integer in the lower bits.
  const Floats<kLanes> shifted = x + 12582912.0f;
  const Floats<kLanes> f = x - (shifted - 12582912.0f);
  Floats<kLanes> power = f * 1.5353362e-4f + 1.3398874e-3f;
  power = power * f + 9.6184373e-3f;
  power = power * f + 5.5503324e-2f;
  power = power * f + 2.4022648e-1f;
  power = power * f + 6.9314720e-1f;
  power = power * f + 1.0f;
  const Ints<kLanes> exponent = (reinterpret_cast<Ints<kLanes>>(shifted) + 127) << 23;
  x = power * reinterpret_cast<Floats<kLanes>>(exponent);
}

// Adds kRows broadcast rows times `count` vectors: out[r] += sum over i of row[r][i] * vectors[i].
// `rows`: values of row r at rows[r * row_step + i * step].
template <int kLanes, int kWide, int kRows>
DDIT_RT_HD void multiply_add(const float* rows, int64_t row_step, int64_t step, float* vectors,
                             int64_t count, Floats<kLanes> (&out)[kRows][kWide]) {
  for (int64_t i = 0; i < count; ++i) {
    Floats<kLanes> shared[kWide];
#pragma GCC unroll 8
    for (int c = 0; c < kWide; ++c) shared[c] = at<kLanes>(vectors + (i * kWide + c) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float value = rows[r * row_step + i * step];
#pragma GCC unroll 8
      for (int c = 0; c < kWide; ++c) out[r][c] += shared[c] * value;
    }
  }
}

// Keys and values [n, width] of a chunk, values in groups of kTile channels, [n, kTile] each.
struct Chunk {
  const float* keys;
  const float* values;
  int64_t count;
  int64_t width;
};

// Up to kWide * kLanes queries and what was summed for them; all arrays are [.., kWide * kLanes].
template <int kLanes, int kTile, int kWide>
struct Block {
  static constexpr int64_t kQueries = kWide * kLanes;
  float* queries;  // [width], scaled so that scores are logarithms to base 2
  float* results;  // [width]
  float* maximum;
  float* sum;

  Block(float* memory, int64_t width)
      : queries(memory),
        results(queries + width * kQueries),
        maximum(results + width * kQueries),
        sum(maximum + kQueries) {}

  DDIT_RT_HD void begin(const AttentionArgs& args, const float* query, int64_t count) {
    const float scale = static_cast<float>(args.scale * kLog2E);
    for (int64_t q = 0; q < kQueries; ++q) {
      // Lanes without a query of their own compute the last one's.
      const float* const from = query + std::min(q, count - 1) * args.query.token;
      for (int64_t i = 0; i < args.width; ++i)
        queries[i * kQueries + q] = from[i * args.query.channel] * scale;
    }
    std::memset(results, 0, args.width * kQueries * sizeof(float));
    std::fill_n(maximum, kQueries, -std::numeric_limits<float>::infinity());
    std::fill_n(sum, kQueries, 0.0f);
  }

  template <int kRows>
  DDIT_RT_HD void score(const float* keys, int64_t width, float* scores,
                        Floats<kLanes> (&highest)[kWide]) const {
    Floats<kLanes> tile[kRows][kWide] = {};
    multiply_add<kLanes, kWide, kRows>(keys, width, 1, queries, width, tile);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kWide; ++c) {
        at<kLanes>(scores + (r * kWide + c) * kLanes) = tile[r][c];
        highest[c] = tile[r][c] > highest[c] ? tile[r][c] : highest[c];
      }
    }
  }

  template <int kRows>
  DDIT_RT_HD void collect(const float* values, float* weights, int64_t count, float* out) const {
    Floats<kLanes> tile[kRows][kWide];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kWide; ++c) tile[r][c] = at<kLanes>(out + (r * kWide + c) * kLanes);
    multiply_add<kLanes, kWide, kRows>(values, 1, kRows, weights, count, tile);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kWide; ++c) at<kLanes>(out + (r * kWide + c) * kLanes) = tile[r][c];
  }

  // `scores`: memory for [count].
  DDIT_RT_HD void add(const Chunk& chunk, float* scores) {
    Floats<kLanes> highest[kWide];
    Floats<kLanes> total[kWide];
    for (int c = 0; c < kWide; ++c) highest[c] = at<kLanes>(maximum + c * kLanes);
    int64_t key = 0;
    for (; key + kTile <= chunk.count; key += kTile)
      score<kTile>(chunk.keys + key * chunk.width, chunk.width, scores + key * kQueries, highest);
    for (; key < chunk.count; ++key)
      score<1>(chunk.keys + key * chunk.width, chunk.width, scores + key * kQueries, highest);
    for (int c = 0; c < kWide; ++c) {
      Floats<kLanes> rescale = at<kLanes>(maximum + c * kLanes) - highest[c];
      exp2_<kLanes>(rescale);
      at<kLanes>(maximum + c * kLanes) = highest[c];
      total[c] = at<kLanes>(sum + c * kLanes) * rescale;
      for (int64_t i = 0; i < chunk.width; ++i)
        at<kLanes>(results + (i * kWide + c) * kLanes) *= rescale;
    }
    for (key = 0; key < chunk.count; ++key) {
#pragma GCC unroll 8
      for (int c = 0; c < kWide; ++c) {
        Floats<kLanes> weight = at<kLanes>(scores + (key * kWide + c) * kLanes) - highest[c];
        exp2_<kLanes>(weight);
        at<kLanes>(scores + (key * kWide + c) * kLanes) = weight;
        total[c] += weight;
      }
    }
    for (int c = 0; c < kWide; ++c) at<kLanes>(sum + c * kLanes) = total[c];
    int64_t i = 0;
    for (; i + kTile <= chunk.width; i += kTile)
      collect<kTile>(chunk.values + i * chunk.count, scores, chunk.count, results + i * kQueries);
    for (; i < chunk.width; ++i)
      collect<1>(chunk.values + i * chunk.count, scores, chunk.count, results + i * kQueries);
  }

  DDIT_RT_HD void end(const AttentionArgs& args, float* out, int64_t count) const {
    for (int64_t q = 0; q < count; ++q) {
      const float share = 1.0f / sum[q];
      float* const to = out + q * args.heads * args.width;
      for (int64_t i = 0; i < args.width; ++i) to[i] = results[i * kQueries + q] * share;
    }
  }
};

// Queries [first, last) of one head of one sample, at most kBlocks blocks of them.
struct Part {
  int64_t sample;
  int64_t head;
  int64_t first;
  int64_t last;
};

template <int kTile>
DDIT_RT_HD Chunk copy_chunk(const AttentionArgs& args, const Part& part, int64_t first, float* keys,
                            float* values) {
  const int64_t count = std::min(kChunk, args.keys - first);
  for (int64_t key = 0; key < count; ++key) {
    const float* const from = args.key.at(part.sample, first + key, part.head);
    for (int64_t i = 0; i < args.width; ++i)
      keys[key * args.width + i] = from[i * args.key.channel];
  }
  for (int64_t i = 0; i < args.width;) {
    const int64_t wide = i + kTile <= args.width ? kTile : 1;
    for (int64_t key = 0; key < count; ++key) {
      const float* const from = args.value.at(part.sample, first + key, part.head);
      for (int64_t c = 0; c < wide; ++c)
        values[i * count + key * wide + c] = from[(i + c) * args.value.channel];
    }
    i += wide;
  }
  return {keys, values, count, args.width};
}

// Values of memory that a part needs, with blocks of `queries` queries.
constexpr int64_t memory_of(int64_t width, int64_t queries) {
  return 2 * kChunk * width + kChunk * queries + kBlocks * queries * (2 * width + 2);
}

template <int kLanes, int kTile>
DDIT_RT_HD void attend(const AttentionArgs& args, const Part& part, float* memory) {
  constexpr int64_t kQueries = kVectors * kLanes;
  float* const scores = memory;
  float* const blocks = scores + kChunk * kQueries;
  const int64_t block_size = kQueries * (2 * args.width + 2);
  float* const keys = blocks + kBlocks * block_size;
  float* const values = keys + kChunk * args.width;
  // The last block of a head has as many vectors as it needs.
  const auto each = [&](auto&& act) __attribute__((always_inline)) {
    for (int64_t q = part.first; q < part.last; q += kQueries) {
      float* const own = blocks + (q - part.first) / kQueries * block_size;
      const int64_t count = std::min(kQueries, part.last - q);
      if (count > 2 * kLanes)
        act(Block<kLanes, kTile, 3>(own, args.width), q, count);
      else if (count > kLanes)
        act(Block<kLanes, kTile, 2>(own, args.width), q, count);
      else
        act(Block<kLanes, kTile, 1>(own, args.width), q, count);
    }
  };
  each([&](auto block, int64_t q, int64_t count) __attribute__((always_inline)) {
    block.begin(args, args.query.at(part.sample, q, part.head), count);
  });
  for (int64_t key = 0; key < args.keys; key += kChunk) {
    const Chunk chunk = copy_chunk<kTile>(args, part, key, keys, values);
    each([&](auto block, int64_t, int64_t)
             __attribute__((always_inline)) { block.add(chunk, scores); });
  }
  each([&](auto block, int64_t q, int64_t count) __attribute__((always_inline)) {
    block.end(args, args.out_at(part.sample, q, part.head), count);
  });
}

using Attend = void (*)(const AttentionArgs&, const Part&, float*);

struct Kernel {
  Attend attend;
  int64_t queries;  // of a block
};

void attend_any(const AttentionArgs& args, const Part& part, float* memory) {
  attend<4, 4>(args, part, memory);
}

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("arch=x86-64-v4"))) void attend_v4(const AttentionArgs& args,
                                                         const Part& part, float* memory) {
  attend<16, 8>(args, part, memory);
}

Kernel kernel() {
  if (__builtin_cpu_supports("x86-64-v4")) return {&attend_v4, kVectors * 16};
  return {&attend_any, kVectors * 4};
}
#else
Kernel kernel() { return {&attend_any, kVectors * 4}; }
#endif

Tensor attention_cpu(Tensor query, Tensor key, Tensor value, double scale) {
  AttentionArgs args = attention_args(query, key, value, scale);
  Tensor out = torch::stable::new_empty(query, {args.batch, args.queries, args.heads, args.width});
  if (out.numel() == 0) return out;
  args.out = static_cast<float*>(out.data_ptr());
  static const Kernel kKernel = kernel();
  const int64_t blocks = (args.queries + kKernel.queries - 1) / kKernel.queries;
  const int64_t parts = (blocks + kBlocks - 1) / kBlocks;  // of a head, about equally many blocks
  const int64_t own = (blocks + parts - 1) / parts * kKernel.queries;
  const int64_t work = 2 * own * args.keys * args.width;
  const int64_t grain = std::max<int64_t>(1, kGrain / work);
  const int64_t heads = args.batch * args.heads;
  torch::stable::parallel_for(0, heads * parts, grain, [&](int64_t begin, int64_t end) {
    constexpr size_t kAlign = 64;
    size_t bytes = memory_of(args.width, kKernel.queries) * sizeof(float) + kAlign;
    const std::unique_ptr<char[]> memory(new char[bytes]);
    void* aligned = memory.get();
    std::align(kAlign, bytes - kAlign, aligned, bytes);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / parts;
      const int64_t first = i % parts * own;
      const Part part{head / args.heads, head % args.heads, first,
                      std::min(first + own, args.queries)};
      if (part.first < part.last) kKernel.attend(args, part, static_cast<float*>(aligned));
    }
  });
  return out;
}

}  // namespace
}  // namespace ddit_rt

STABLE_TORCH_LIBRARY_IMPL(ddit_rt, CPU, m) {
  m.impl("attention", TORCH_BOX(&ddit_rt::attention_cpu));
}
