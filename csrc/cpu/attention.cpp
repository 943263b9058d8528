// Attention in float32, without the matrix of scores: softmax(scale * Q K^T) V.
//
// Products in tiles of `vectors.h`, whose lanes are queries: maxima, exponentials and sums go down
// the lanes, never across. Keys and values are copied a chunk at a time for several blocks of
// queries, whose sums are rescaled where a chunk raises their maximum. A query's result depends
// neither on the number of threads nor on the other queries. Bound by multiply-adds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "binding/args.h"
#include "cpu/vectors.h"

namespace ddit_rt {
namespace {

constexpr int64_t kQueries = kWidest * kLanes;  // of a block
constexpr int64_t kChunk = 256;                 // keys at a time: their scores stay in the cache
constexpr int64_t kBlocks = 4;                  // of queries that share a chunk's copy
constexpr int64_t kGrain = 1024 * 1024;         // multiply-adds worth a thread of their own
constexpr double kLog2E = 1.4426950408889634;

// Keys and values [n, width] of a chunk, values in groups of kTile channels, [n, kTile] each.
struct Chunk {
  const float* keys;
  const float* values;
  int64_t count;
  int64_t width;
};

// kWide vectors of queries and what was summed for them; all arrays are [..][kWide] vectors.
template <int kWide>
struct Block {
  float* queries;  // [width], scaled so that scores are logarithms to base 2
  float* results;  // [width]
  float* maximum;
  float* sum;

  Block(float* memory, int64_t width)
      : queries(memory),
        results(queries + width * kWide * kLanes),
        maximum(results + width * kWide * kLanes),
        sum(maximum + kWide * kLanes) {}

  static constexpr int64_t size(int64_t width) { return kWide * kLanes * (2 * width + 2); }

  DDIT_RT_HD void begin(const AttentionArgs& args, const float* query, int64_t count) {
    to_lanes<kWide>({query, args.query.token, args.query.channel}, count, args.width,
                    static_cast<float>(args.scale * kLog2E), queries);
    std::memset(results, 0, args.width * kWide * kLanes * sizeof(float));
    for (int c = 0; c < kWide; ++c) {
      at(maximum + c * kLanes) = Floats{} - std::numeric_limits<float>::infinity();
      at(sum + c * kLanes) = Floats{};
    }
  }

  template <int kRows>
  DDIT_RT_HD void score(const float* keys, int64_t width, float* scores,
                        Floats (&highest)[kWide]) const {
    Floats tile[kRows][kWide] = {};
    multiply_add(keys, width, 1, queries, width, tile);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kWide; ++c) {
        at(scores + (r * kWide + c) * kLanes) = tile[r][c];
        highest[c] = tile[r][c] > highest[c] ? tile[r][c] : highest[c];
      }
    }
  }

  template <int kRows>
  DDIT_RT_HD void collect(const float* values, const float* weights, int64_t count,
                          float* out) const {
    Floats tile[kRows][kWide];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kWide; ++c) tile[r][c] = at(out + (r * kWide + c) * kLanes);
    multiply_add(values, 1, kRows, weights, count, tile);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kWide; ++c) at(out + (r * kWide + c) * kLanes) = tile[r][c];
  }

  // `scores`: memory for [count].
  DDIT_RT_HD void add(const Chunk& chunk, float* scores) {
    constexpr int64_t kStep = kWide * kLanes;
    Floats highest[kWide];
    Floats total[kWide];
    for (int c = 0; c < kWide; ++c) highest[c] = at(maximum + c * kLanes);
    int64_t key = 0;
    for (; key + kTile <= chunk.count; key += kTile)
      score<kTile>(chunk.keys + key * chunk.width, chunk.width, scores + key * kStep, highest);
    for (; key < chunk.count; ++key)
      score<1>(chunk.keys + key * chunk.width, chunk.width, scores + key * kStep, highest);
    for (int c = 0; c < kWide; ++c) {
      Floats rescale = at(maximum + c * kLanes) - highest[c];
      exp2_(rescale);
      at(maximum + c * kLanes) = highest[c];
      total[c] = at(sum + c * kLanes) * rescale;
      for (int64_t i = 0; i < chunk.width; ++i) at(results + i * kStep + c * kLanes) *= rescale;
    }
    for (key = 0; key < chunk.count; ++key) {
#pragma GCC unroll 8
      for (int c = 0; c < kWide; ++c) {
        Floats weight = at(scores + key * kStep + c * kLanes) - highest[c];
        exp2_(weight);
        at(scores + key * kStep + c * kLanes) = weight;
        total[c] += weight;
      }
    }
    for (int c = 0; c < kWide; ++c) at(sum + c * kLanes) = total[c];
    int64_t i = 0;
    for (; i + kTile <= chunk.width; i += kTile)
      collect<kTile>(chunk.values + i * chunk.count, scores, chunk.count, results + i * kStep);
    for (; i < chunk.width; ++i)
      collect<1>(chunk.values + i * chunk.count, scores, chunk.count, results + i * kStep);
  }

  DDIT_RT_HD void end(const AttentionArgs& args, float* out, int64_t count) const {
    const int64_t step = args.heads * args.width;
    for (int c = 0; c < kWide; ++c) {
      const Floats share = 1.0f / at(sum + c * kLanes);
      const int64_t rows = std::min<int64_t>(kLanes, count - c * kLanes);
      int64_t i = 0;
      for (; i + kTile <= args.width; i += kTile) {
        Floats tile[kTile];
#pragma GCC unroll 8
        for (int r = 0; r < kTile; ++r)
          tile[r] = at(results + ((i + r) * kWide + c) * kLanes) * share;
        to_rows(tile, out + c * kLanes * step + i, step, rows);
      }
      for (; i < args.width; ++i) {
        const Floats values = at(results + (i * kWide + c) * kLanes) * share;
        for (int64_t n = 0; n < rows; ++n) out[(c * kLanes + n) * step + i] = values[n];
      }
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

DDIT_RT_HD Chunk copy_chunk(const AttentionArgs& args, const Part& part, int64_t first, float* keys,
                            float* values) {
  const int64_t count = std::min(kChunk, args.keys - first);
  for (int64_t key = 0; key < count; ++key) {
    const float* const from = args.key.at(part.sample, first + key, part.head);
    for (int64_t i = 0; i < args.width; ++i)
      keys[key * args.width + i] = from[i * args.key.channel];
  }
  const int64_t whole = args.width / kTile * kTile;
  for (int64_t key = 0; key < count; ++key) {
    const float* const from = args.value.at(part.sample, first + key, part.head);
    for (int64_t i = 0; i < whole; i += kTile)
      for (int64_t c = 0; c < kTile; ++c)
        values[i * count + key * kTile + c] = from[(i + c) * args.value.channel];
    for (int64_t i = whole; i < args.width; ++i)
      values[i * count + key] = from[i * args.value.channel];
  }
  return {keys, values, count, args.width};
}

// Values of memory that a part needs.
constexpr int64_t memory_of(int64_t width) {
  return kChunk * kQueries + kBlocks * Block<kWidest>::size(width) + 2 * kChunk * width;
}

DDIT_RT_CPU_CLONES void attend(const AttentionArgs& args, const Part& part, float* memory) {
  float* const scores = memory;
  float* const blocks = scores + kChunk * kQueries;
  float* const keys = blocks + kBlocks * Block<kWidest>::size(args.width);
  float* const values = keys + kChunk * args.width;
  const auto each = [&](auto&& act) __attribute__((always_inline)) {
    for (int64_t q = part.first; q < part.last; q += kQueries) {
      float* const own = blocks + (q - part.first) / kQueries * Block<kWidest>::size(args.width);
      const int64_t count = std::min(kQueries, part.last - q);
      with_vectors(count, [&](auto wide) __attribute__((always_inline)) {
        act(Block<wide>(own, args.width), q, count);
      });
    }
  };
  each([&](auto block, int64_t q, int64_t count) __attribute__((always_inline)) {
    block.begin(args, args.query.at(part.sample, q, part.head), count);
  });
  for (int64_t key = 0; key < args.keys; key += kChunk) {
    const Chunk chunk = copy_chunk(args, part, key, keys, values);
    each([&](auto block, int64_t, int64_t)
             __attribute__((always_inline)) { block.add(chunk, scores); });
  }
  each([&](auto block, int64_t q, int64_t count) __attribute__((always_inline)) {
    block.end(args, args.out_at(part.sample, q, part.head), count);
  });
}

Tensor attention_cpu(Tensor query, Tensor key, Tensor value, double scale) {
  AttentionArgs args = attention_args(query, key, value, scale);
  Tensor out = torch::stable::new_empty(query, {args.batch, args.queries, args.heads, args.width});
  if (out.numel() == 0) return out;
  args.out = static_cast<float*>(out.data_ptr());
  const int64_t blocks = (args.queries + kQueries - 1) / kQueries;
  const int64_t parts = (blocks + kBlocks - 1) / kBlocks;  // of a head, about equally many blocks
  const int64_t own = (blocks + parts - 1) / parts * kQueries;
  const int64_t work = 2 * std::min(own, args.queries) * args.keys * args.width;
  const int64_t grain = std::max<int64_t>(1, kGrain / work);
  const int64_t heads = args.batch * args.heads;
  torch::stable::parallel_for(0, heads * parts, grain, [&](int64_t begin, int64_t end) {
    Scratch memory(memory_of(args.width));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / parts;
      const int64_t first = i % parts * own;
      const int64_t last = std::min(first + own, args.queries);
      attend(args, {head / args.heads, head % args.heads, first, last}, memory.data());
    }
  });
  return out;
}

}  // namespace
}  // namespace ddit_rt

STABLE_TORCH_LIBRARY_IMPL(ddit_rt, CPU, m) {
  m.impl("attention", TORCH_BOX(&ddit_rt::attention_cpu));
}
