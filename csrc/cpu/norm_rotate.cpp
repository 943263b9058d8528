// RMS norm of queries or keys, over each head or all of them, and their rotary embedding, in one
// pass: a token's heads are read from the cache the second time. Bound by bytes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "binding/args.h"
#include "cpu/vectors.h"

namespace ddit_rt {
namespace {

constexpr int64_t kGrain = 32 * 1024;  // values worth a thread of their own
DDIT_RT_HD float sum_of_squares(const float* values, int64_t count) {
  Floats parts = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) parts += at(values + i) * at(values + i);
  for (int lane = 0; i < count; ++i, ++lane) parts[lane] += values[i] * values[i];
  parts += swapped<8>(parts, LaneIndices{});
  parts += swapped<4>(parts, LaneIndices{});
  parts += swapped<2>(parts, LaneIndices{});
  return parts[0] + parts[1];
}

// Pairs of channels are (2 i, 2 i + 1); `sin` counts as negative where the channel is even.
DDIT_RT_HD void rotate(const float* values, const float* weight, float scale, const float* cos,
                       const float* sin, float* out, int64_t width) {
  constexpr Floats kSigns = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const Floats normed = at(values + i) * scale * at(weight + i);
    const Floats other = swapped<1>(normed, LaneIndices{}) * kSigns;
    at(out + i) = normed * at(cos + i) + other * at(sin + i);
  }
  for (; i < width; i += 2) {
    const float even = values[i] * scale * weight[i];
    const float odd = values[i + 1] * scale * weight[i + 1];
    out[i] = even * cos[i] - odd * sin[i];
    out[i + 1] = odd * cos[i + 1] + even * sin[i + 1];
  }
}

// Token `n` of sample `b`.
DDIT_RT_CPU_CLONES void token(const NormRotateArgs& args, int64_t b, int64_t n) {
  const int64_t width = args.width;
  const auto count = static_cast<float>(args.over_all ? width * args.heads : width);
  float sum = 0.0f;
  if (args.over_all)
    for (int64_t h = 0; h < args.heads; ++h) sum += sum_of_squares(args.values.at(b, n, h), width);
  for (int64_t h = 0; h < args.heads; ++h) {
    const float* const values = args.values.at(b, n, h);
    if (!args.over_all) sum = sum_of_squares(values, width);
    rotate(values, args.weight + (args.over_all ? h * width : 0),
           1.0f / std::sqrt(sum / count + args.eps), args.cos + n * width, args.sin + n * width,
           args.out + ((b * args.tokens + n) * args.heads + h) * width, width);
  }
}

Tensor norm_rotate_cpu(Tensor values, Tensor weight, Tensor cos, Tensor sin, double eps) {
  NormRotateArgs args = norm_rotate_args(values, weight, cos, sin, eps);
  Tensor out = torch::stable::new_empty(values, {args.batch, args.tokens, args.heads, args.width});
  args.out = static_cast<float*>(out.data_ptr());
  const int64_t grain =
      std::max<int64_t>(1, kGrain / std::max<int64_t>(1, args.heads * args.width));
  torch::stable::parallel_for(0, args.batch * args.tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) token(args, i / args.tokens, i % args.tokens);
  });
  return out;
}

}  // namespace
}  // namespace ddit_rt

STABLE_TORCH_LIBRARY_IMPL(ddit_rt, CPU, m) {
  m.impl("norm_rotate", TORCH_BOX(&ddit_rt::norm_rotate_cpu));
}
