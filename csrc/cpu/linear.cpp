// A linear layer in float32: values W^T + bias, and the GELU behind it.
//
// Tiles of `vectors.h`, whose lanes are tokens and whose rows are features, so that weights are
// read as they lie: libraries pack them anew in every call, which costs as much as the product
// where tokens are few. Sums of more than kDepth channels are made in parts, for less rounding.
// A token's result depends neither on the number of threads nor on the other tokens. Bound by
// multiply-adds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "binding/args.h"
#include "cpu/vectors.h"

namespace ddit_rt {
namespace {

constexpr int64_t kTokens = kWidest * kLanes;  // of a block
constexpr int64_t kFeatures = 32;              // of an item of work
constexpr int64_t kDepth = 512;
constexpr int64_t kGrain = 1024 * 1024;  // multiply-adds worth a thread of their own

// x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3))), which is GELU by tanh.
DDIT_RT_HD void gelu_(Floats& x) {
  constexpr float kScale = -2.302208198f;  // -2 sqrt(2 / pi) log2(e)
  Floats power = x * (x * x * (0.044715f * kScale) + kScale);
  exp2_(power);
  x = x / (power + 1.0f);
}

template <int kWide, int kRows>
DDIT_RT_HD void features(const LinearArgs& args, const float* vectors, int64_t first,
                         Floats (&out)[kRows][kWide]) {
  for (int64_t i = 0; i < args.channels; i += kDepth) {
    Floats part[kRows][kWide] = {};
    multiply_add(args.weight + first * args.weight_step + i, args.weight_step, 1,
                 vectors + i * kWide * kLanes, std::min(kDepth, args.channels - i), part);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kWide; ++c) out[r][c] += part[r][c];
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kWide; ++c) {
      if (args.bias != nullptr) out[r][c] += args.bias[first + r];
      if (args.gelu) gelu_(out[r][c]);
    }
  }
}

// Features [first, last) of `count` tokens, which are the lanes of `vectors`.
template <int kWide>
DDIT_RT_HD void block(const LinearArgs& args, const float* vectors, int64_t first, int64_t last,
                      int64_t count, float* out) {
  for (; first + kTile <= last; first += kTile) {
    Floats tile[kTile][kWide] = {};
    features<kWide, kTile>(args, vectors, first, tile);
#pragma GCC unroll 8
    for (int c = 0; c < kWide; ++c) {
      Floats column[kTile];
#pragma GCC unroll 8
      for (int r = 0; r < kTile; ++r) column[r] = tile[r][c];
      to_rows(column, out + c * kLanes * args.features + first, args.features, count - c * kLanes);
    }
  }
  for (; first < last; ++first) {
    Floats tile[1][kWide] = {};
    features<kWide, 1>(args, vectors, first, tile);
    for (int64_t n = 0; n < count; ++n)
      out[n * args.features + first] = tile[0][n / kLanes][n % kLanes];
  }
}

// Items [begin, end) of work: blocks of tokens, and of each the groups of features.
DDIT_RT_CPU_CLONES void items(const LinearArgs& args, int64_t begin, int64_t end, float* vectors) {
  const int64_t groups = (args.features + kFeatures - 1) / kFeatures;
  const int64_t blocks = (args.tokens + kTokens - 1) / kTokens;  // of a sample
  for (int64_t item = begin; item < end;) {
    const int64_t sample = item / groups / blocks;
    const int64_t token = item / groups % blocks * kTokens;
    const int64_t last_item = std::min(end, (item / groups + 1) * groups);
    const int64_t first = item % groups * kFeatures;
    const int64_t last = std::min(first + (last_item - item) * kFeatures, args.features);
    const int64_t count = std::min(kTokens, args.tokens - token);
    const Rows rows{args.values + sample * args.sample_step + token * args.token_step,
                    args.token_step, args.channel_step};
    float* const out = args.out + (sample * args.tokens + token) * args.features;
    with_vectors(count, [&](auto wide) __attribute__((always_inline)) {
      to_lanes<wide>(rows, count, args.channels, 1.0f, vectors);
      block<wide>(args, vectors, first, last, count, out);
    });
    item = last_item;
  }
}

Tensor linear_cpu(Tensor values, Tensor weight, std::optional<Tensor> bias, bool gelu) {
  LinearArgs args = linear_args(values, weight, bias, gelu);
  Tensor out = torch::stable::new_empty(values, {args.batch, args.tokens, args.features});
  if (out.numel() == 0) return out;
  args.out = static_cast<float*>(out.data_ptr());
  const int64_t blocks = args.batch * ((args.tokens + kTokens - 1) / kTokens);
  const int64_t groups = (args.features + kFeatures - 1) / kFeatures;
  const int64_t work = std::min(kTokens, args.tokens) * kFeatures * args.channels;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, blocks * groups, grain, [&](int64_t begin, int64_t end) {
    Scratch vectors(args.channels * kTokens);
    items(args, begin, end, vectors.data());
  });
  return out;
}

}  // namespace
}  // namespace ddit_rt

STABLE_TORCH_LIBRARY_IMPL(ddit_rt, CPU, m) { m.impl("linear", TORCH_BOX(&ddit_rt::linear_cpu)); }
