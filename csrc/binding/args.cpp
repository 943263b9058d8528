#include "binding/args.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <sstream>
#include <utility>

#include "ddit_rt/difference.h"
#include "ddit_rt/solver.h"

namespace ddit_rt {
namespace {

std::string shape_text(const std::vector<int64_t>& shape) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < shape.size(); ++i) text << (i == 0 ? "" : ", ") << shape[i];
  text << ']';
  return text.str();
}

std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

void check_same_device(const Tensor& tensor, const Tensor& other, const char* op,
                       const char* name) {
  STD_TORCH_CHECK(
      tensor.is_cuda() == other.is_cuda() && tensor.get_device_index() == other.get_device_index(),
      "ddit_rt::", op, ": ", name, " is on another device than the other arguments");
}

// Spatial sizes of [..., H, W] or [..., F, H, W], where `lead` dimensions come first.
PatchShape latent_shape(const Tensor& tensor, int64_t lead, const char* op, const char* name) {
  const int64_t dims = tensor.dim() - lead;
  STD_TORCH_CHECK(dims == 2 || dims == 3, "ddit_rt::", op, ": ", name, " has shape ",
                  shape_text(shape_of(tensor)), ", expected ", lead + 2, " or ", lead + 3,
                  " dimensions");
  PatchShape shape{};
  shape.batch = tensor.size(lead - 2);
  shape.channels = tensor.size(lead - 1);
  shape.frames = dims == 3 ? tensor.size(lead) : 1;
  shape.height = tensor.size(tensor.dim() - 2);
  shape.width = tensor.size(tensor.dim() - 1);
  return shape;
}

void check_patch(const PatchShape& shape, int64_t patch, const char* op) {
  STD_TORCH_CHECK(patch >= 1, "ddit_rt::", op, ": patch size ", patch, ", expected at least 1");
  STD_TORCH_CHECK(shape.height % patch == 0 && shape.width % patch == 0, "ddit_rt::", op,
                  ": patch size ", patch, " does not divide the latent size ", shape.height, " x ",
                  shape.width);
}

template <typename T>
T* offset(const Tensor& tensor, int64_t index) {
  return static_cast<T*>(tensor.data_ptr()) + index;
}

HeadsView heads_view(const Tensor& tensor, const char* op, const char* name) {
  check_dtype(tensor, ScalarType::Float, op, name);
  STD_TORCH_CHECK(tensor.dim() == 4, "ddit_rt::", op, ": ", name, " has shape ",
                  shape_text(shape_of(tensor)), ", expected [B, n, heads, width]");
  return {offset<const float>(tensor, 0), tensor.stride(0), tensor.stride(1), tensor.stride(2),
          tensor.stride(3)};
}

void check_step(int64_t step, int64_t steps, const char* op) {
  STD_TORCH_CHECK(step >= 0 && step < steps, "ddit_rt::", op, ": step ", step, ", expected 0 to ",
                  steps - 1);
}

}  // namespace

std::string shape_text(const Tensor& tensor) { return shape_text(shape_of(tensor)); }

void check_contiguous(const Tensor& tensor, const char* op, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "ddit_rt::", op, ": ", name, " of shape ",
                  shape_text(tensor), " is not contiguous");
}

void check_dtype(const Tensor& tensor, ScalarType dtype, const char* op, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "ddit_rt::", op, ": ", name, " is ",
                  torch::headeronly::toString(tensor.scalar_type()), ", expected ",
                  torch::headeronly::toString(dtype));
}

void check_shape(const Tensor& tensor, const std::vector<int64_t>& shape, const char* op,
                 const char* name) {
  STD_TORCH_CHECK(shape_of(tensor) == shape, "ddit_rt::", op, ": ", name, " has shape ",
                  shape_text(tensor), ", expected ", shape_text(shape));
}

void check_floating(const Tensor& tensor, const char* op, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      "ddit_rt::", op, ": ", name, " is ", torch::headeronly::toString(dtype),
      ", expected float32, bfloat16 or float16");
  check_contiguous(tensor, op, name);
}

PatchShape pack_shape(const Tensor& latents, int64_t patch_size, bool channels_last) {
  check_floating(latents, "pack", "latents");
  PatchShape shape = latent_shape(latents, 2, "pack", "latents");
  check_patch(shape, patch_size, "pack");
  shape.patch = patch_size;
  shape.channels_last = channels_last;
  return shape;
}

PatchShape unpack_shape(const Tensor& tokens, int64_t patch_size, int64_t height, int64_t width,
                        int64_t frames, bool channels_last) {
  check_floating(tokens, "unpack", "tokens");
  STD_TORCH_CHECK(tokens.dim() == 3, "ddit_rt::unpack: tokens have shape ", shape_text(tokens),
                  ", expected 3 dimensions");
  STD_TORCH_CHECK(height >= 1 && width >= 1 && frames >= 0, "ddit_rt::unpack: height ", height,
                  ", width ", width, ", frames ", frames, ", expected positive sizes");
  PatchShape shape{tokens.size(0), 0, frames == 0 ? 1 : frames, height, width, 1};
  check_patch(shape, patch_size, "unpack");
  shape.patch = patch_size;
  shape.channels_last = channels_last;
  shape.channels = tokens.size(2) / (patch_size * patch_size);
  check_shape(tokens, {shape.batch, shape.tokens(), shape.features()}, "unpack", "tokens");
  return shape;
}

Tensor new_tokens(const Tensor& latents, const PatchShape& shape) {
  const int64_t size[] = {shape.batch, shape.tokens(), shape.features()};
  return torch::stable::new_empty(latents, {size, 3});
}

Tensor new_latents(const Tensor& tokens, const PatchShape& shape, bool has_frames) {
  const int64_t video[] = {shape.batch, shape.channels, shape.frames, shape.height, shape.width};
  const int64_t image[] = {shape.batch, shape.channels, shape.height, shape.width};
  return has_frames ? torch::stable::new_empty(tokens, {video, 5})
                    : torch::stable::new_empty(tokens, {image, 4});
}

ScoreArgs score_args(const Tensor& history, std::vector<int64_t> patch_sizes, double quantile,
                     int64_t order, int64_t head) {
  constexpr const char* kOp = "patch_scores";
  check_dtype(history, ScalarType::Float, kOp, "history");
  check_contiguous(history, kOp, "history");
  ScoreArgs args{};
  args.shape = latent_shape(history, 3, kOp, "history");
  STD_TORCH_CHECK(history.size(0) == kHistoryLength, "ddit_rt::patch_scores: history has ",
                  history.size(0), " slots, expected ", kHistoryLength);
  STD_TORCH_CHECK(quantile >= 0.0 && quantile <= 1.0, "ddit_rt::patch_scores: quantile ", quantile,
                  ", expected 0 to 1");
  STD_TORCH_CHECK(order >= 1 && order <= kMaxOrder, "ddit_rt::patch_scores: order ", order,
                  ", expected 1 to ", kMaxOrder);
  STD_TORCH_CHECK(head >= 0 && head < kHistoryLength, "ddit_rt::patch_scores: head ", head,
                  ", expected 0 to ", kHistoryLength - 1);
  const PatchShape& shape = args.shape;
  STD_TORCH_CHECK(shape.channels * shape.frames * shape.height * shape.width > 0,
                  "ddit_rt::patch_scores: history of shape ", shape_text(history), " is empty");
  STD_TORCH_CHECK(patch_sizes.size() <= kMaxSizes, "ddit_rt::patch_scores: ", patch_sizes.size(),
                  " patch sizes, expected at most ", kMaxSizes);
  for (const int64_t size : patch_sizes) {
    STD_TORCH_CHECK(size >= 1, "ddit_rt::patch_scores: patch size ", size, ", expected at least 1");
    args.shape.patch = size;
    STD_TORCH_CHECK(shape.fewest_values() > 1,
                    "ddit_rt::patch_scores: a patch of a single value has no standard deviation");
    args.base = std::gcd(args.base, size);
  }
  args.shape.patch = args.base;
  args.sizes = std::move(patch_sizes);
  args.quantile = static_cast<float>(quantile);
  args.order = static_cast<int>(order);
  const int64_t count = history.numel() / kHistoryLength;
  for (int64_t i = 0; i < kHistoryLength; ++i) {
    args.newest[i] = offset<const float>(history, (head + i) % kHistoryLength * count);
  }
  return args;
}

AttentionArgs attention_args(const Tensor& query, const Tensor& key, const Tensor& value,
                             double scale) {
  constexpr const char* kOp = "attention";
  AttentionArgs args{};
  args.query = heads_view(query, kOp, "query");
  args.key = heads_view(key, kOp, "key");
  args.value = heads_view(value, kOp, "value");
  args.batch = query.size(0);
  args.queries = query.size(1);
  args.heads = query.size(2);
  args.width = query.size(3);
  args.keys = key.size(1);
  args.scale = scale;
  STD_TORCH_CHECK(args.keys >= 1, "ddit_rt::attention: key has shape ", shape_text(key),
                  ", expected at least one token");
  for (const auto& [tensor, name] : {std::pair{&key, "key"}, std::pair{&value, "value"}}) {
    check_shape(*tensor, {args.batch, args.keys, args.heads, args.width}, kOp, name);
    check_same_device(*tensor, query, kOp, name);
  }
  return args;
}

LinearArgs linear_args(const Tensor& values, const Tensor& weight,
                       const std::optional<Tensor>& bias, bool gelu) {
  constexpr const char* kOp = "linear";
  STD_TORCH_CHECK(values.dim() == 3 && weight.dim() == 2, "ddit_rt::linear: values have shape ",
                  shape_text(values), ", weight ", shape_text(weight),
                  ", expected [B, n, channels] and [features, channels]");
  LinearArgs args{};
  args.batch = values.size(0);
  args.tokens = values.size(1);
  args.channels = values.size(2);
  args.features = weight.size(0);
  check_shape(weight, {args.features, args.channels}, kOp, "weight");
  check_dtype(values, ScalarType::Float, kOp, "values");
  check_dtype(weight, ScalarType::Float, kOp, "weight");
  check_same_device(weight, values, kOp, "weight");
  STD_TORCH_CHECK(args.channels <= 1 || weight.stride(1) == 1, "ddit_rt::linear: weight of shape ",
                  shape_text(weight), " does not have its channels side by side");
  if (bias.has_value()) {
    check_dtype(*bias, ScalarType::Float, kOp, "bias");
    check_shape(*bias, {args.features}, kOp, "bias");
    check_contiguous(*bias, kOp, "bias");
    check_same_device(*bias, values, kOp, "bias");
    args.bias = offset<const float>(*bias, 0);
  }
  args.values = offset<const float>(values, 0);
  args.sample_step = values.stride(0);
  args.token_step = values.stride(1);
  args.channel_step = values.stride(2);
  args.weight = offset<const float>(weight, 0);
  args.weight_step = weight.stride(0);
  args.gelu = gelu;
  return args;
}

NormRotateArgs norm_rotate_args(const Tensor& values, const Tensor& weight, const Tensor& cos,
                                const Tensor& sin, double eps) {
  constexpr const char* kOp = "norm_rotate";
  NormRotateArgs args{};
  args.values = heads_view(values, kOp, "values");
  args.batch = values.size(0);
  args.tokens = values.size(1);
  args.heads = values.size(2);
  args.width = values.size(3);
  STD_TORCH_CHECK(args.width % 2 == 0 && (args.width <= 1 || args.values.channel == 1),
                  "ddit_rt::norm_rotate: values have shape ", shape_text(values), " and stride ",
                  args.values.channel, " between channels, expected an even number side by side");
  args.over_all = weight.numel() != args.width;
  check_shape(weight, {args.over_all ? args.heads * args.width : args.width}, kOp, "weight");
  check_shape(cos, {args.tokens, args.width}, kOp, "cos");
  check_shape(sin, {args.tokens, args.width}, kOp, "sin");
  for (const auto& [tensor, name] :
       {std::pair{&weight, "weight"}, std::pair{&cos, "cos"}, std::pair{&sin, "sin"}}) {
    check_dtype(*tensor, ScalarType::Float, kOp, name);
    check_contiguous(*tensor, kOp, name);
    check_same_device(*tensor, values, kOp, name);
  }
  args.weight = offset<const float>(weight, 0);
  args.cos = offset<const float>(cos, 0);
  args.sin = offset<const float>(sin, 0);
  args.eps = static_cast<float>(eps);
  return args;
}

SolverArgs solver_args(const Tensor& history, const Tensor& velocities, const Tensor& velocity,
                       const Tensor& coefficients, int64_t step) {
  constexpr const char* kOp = "solver_step_";
  check_floating(velocity, kOp, "velocity");
  check_dtype(history, ScalarType::Float, kOp, "history");
  check_dtype(velocities, ScalarType::Float, kOp, "velocities");
  for (const Tensor* tensor : {&history, &velocities, &coefficients}) {
    check_contiguous(*tensor, kOp, "a buffer");
    check_same_device(*tensor, velocity, kOp, "a buffer");
  }
  std::vector<int64_t> shape = shape_of(velocity);
  shape.insert(shape.begin(), kHistoryLength);
  check_shape(history, shape, kOp, "history");
  const int64_t slots = velocities.dim() > 0 ? velocities.size(0) : kTerms;
  STD_TORCH_CHECK(slots < kTerms, "ddit_rt::solver_step_: velocities have ", slots,
                  " slots, expected 0 to ", kTerms - 1);
  shape[0] = slots;
  check_shape(velocities, shape, kOp, "velocities");
  const bool is_double = coefficients.scalar_type() == ScalarType::Double;
  if (!is_double) check_dtype(coefficients, ScalarType::Float, kOp, "coefficients");
  STD_TORCH_CHECK(coefficients.dim() == 2 && coefficients.size(1) == kCoefficients,
                  "ddit_rt::solver_step_: coefficients have shape ", shape_text(coefficients),
                  ", expected [N, ", kCoefficients, "]");
  check_step(step, coefficients.size(0), kOp);

  SolverArgs args{};
  args.count = velocity.numel();
  args.past_velocities = slots;
  args.double_coefficients = is_double;
  args.coefficients = offset<const char>(
      coefficients, step * kCoefficients * static_cast<int64_t>(coefficients.element_size()));
  const auto latent = [&](int64_t k) {
    return offset<float>(history, ring_slot(k, kHistoryLength) * args.count);
  };
  // Adding the ring's length keeps the step index of older entries positive.
  for (int i = 0; i < kTerms; ++i) args.latents[i] = latent(step - i + kHistoryLength);
  // v[m] is in slot m mod D: v[k] takes over the slot of v[k-D], which this step may still read.
  const auto past = [&](int64_t m) { return offset<float>(velocities, m % slots * args.count); };
  for (int64_t j = 1; j <= slots; ++j) args.velocities[j - 1] = past(step - j + slots);
  args.velocity = velocity.data_ptr();
  args.velocity_dtype = velocity.scalar_type();
  args.velocity_out = slots > 0 ? past(step) : nullptr;
  args.latents_out = latent(step + 1);
  return args;
}

DecideArgs decide_args(const Tensor& scores, const Tensor& forced, const Tensor& thresholds,
                       const Tensor& state, const Tensor& record, int64_t step, int64_t dwell,
                       bool monotone) {
  constexpr const char* kOp = "decide_";
  STD_TORCH_CHECK(scores.dim() == 2 && thresholds.dim() == 2,
                  "ddit_rt::decide_: scores have shape ", shape_text(scores), ", thresholds ",
                  shape_text(thresholds), ", expected [B, S] and [N, S]");
  const int64_t steps = thresholds.size(0);
  const int64_t sizes = thresholds.size(1);
  const bool scored = scores.size(0) > 0 && (scores.size(1) > 0 || sizes == 0);
  for (const Tensor* tensor : {&scores, &thresholds, &record}) {
    check_dtype(*tensor, ScalarType::Float, kOp, "scores, thresholds or record");
  }
  for (const Tensor* tensor : {&forced, &state}) {
    check_dtype(*tensor, ScalarType::Int, kOp, "forced or state");
  }
  for (const Tensor* tensor : {&scores, &forced, &thresholds, &state, &record}) {
    check_contiguous(*tensor, kOp, "an argument");
    check_same_device(*tensor, state, kOp, "an argument");
  }
  if (scored) check_shape(scores, {scores.size(0), sizes}, kOp, "scores");
  check_shape(forced, {steps}, kOp, "forced");
  check_shape(state, {kStateSize}, kOp, "state");
  check_shape(record, {steps, kRecordHeader + sizes}, kOp, "record");
  check_step(step, steps, kOp);
  constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(scores.numel() <= kMaxInt && dwell >= 0 && dwell <= kMaxInt,
                  "ddit_rt::decide_: dwell ", dwell, " or the number of scores ", scores.numel(),
                  " does not fit 32 bits");

  DecideArgs args{};
  args.batch = scored ? static_cast<int>(scores.size(0)) : 0;
  args.sizes = static_cast<int>(sizes);
  args.scores = offset<const float>(scores, 0);
  args.forced = offset<const int32_t>(forced, step);
  args.thresholds = offset<const float>(thresholds, step * sizes);
  args.state = offset<PolicyState>(state, 0);
  args.record = offset<float>(record, step * (kRecordHeader + sizes));
  args.rule = {static_cast<int>(dwell), monotone};
  return args;
}

ReuseArgs reuse_args(const Tensor& signal, const Tensor& increments, const Tensor& coefficients,
                     const Tensor& state, const Tensor& memory, const Tensor& record, int64_t step,
                     int64_t buckets, double threshold, int64_t limit, int64_t growth) {
  constexpr const char* kOp = "decide_reuse_";
  const Tensor* floats[] = {&signal, &increments, &coefficients, &memory, &record};
  for (const Tensor* tensor : floats) {
    check_dtype(*tensor, ScalarType::Float, kOp, "an argument other than state");
    check_contiguous(*tensor, kOp, "an argument");
    check_same_device(*tensor, state, kOp, "an argument");
  }
  check_dtype(state, ScalarType::Int, kOp, "state");
  check_contiguous(state, kOp, "state");
  check_shape(state, {kStateSize}, kOp, "state");
  const int64_t steps = increments.numel();
  const int64_t rows = memory.numel() - kCacheHeader;
  const int64_t terms = coefficients.numel();
  constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(rows >= 1 && rows <= kMaxInt, "ddit_rt::decide_reuse_: memory has ",
                  memory.numel(), " words, expected ", kCacheHeader, " and one per row");
  STD_TORCH_CHECK(terms <= kMaxTerms, "ddit_rt::decide_reuse_: a polynomial of ", terms,
                  " terms, expected at most ", kMaxTerms);
  STD_TORCH_CHECK(buckets >= 1 && buckets <= kMaxSizes + 1 && limit >= 0 && limit <= kMaxInt,
                  "ddit_rt::decide_reuse_: buckets ", buckets, " or limit ", limit,
                  " out of range");
  STD_TORCH_CHECK(growth >= 0 && growth <= static_cast<int64_t>(CacheGrowth::kLatest),
                  "ddit_rt::decide_reuse_: growth ", growth, " out of range");
  check_shape(increments, {steps}, kOp, "increments");
  check_shape(record, {steps, kCacheRecord}, kOp, "record");
  check_step(step, steps, kOp);

  ReuseArgs args{};
  args.increment = *offset<const float>(increments, step);
  if (terms > 0 && args.increment == args.increment) check_shape(signal, {rows}, kOp, "signal");
  args.rows = static_cast<int>(rows);
  args.buckets = static_cast<int>(buckets);
  args.signal = offset<const float>(signal, 0);
  args.rule = {static_cast<CacheGrowth>(growth),
               static_cast<float>(threshold),
               static_cast<int32_t>(limit),
               static_cast<int32_t>(terms),
               {}};
  std::copy_n(offset<const float>(coefficients, 0), terms, args.rule.coefficients);
  args.state = offset<PolicyState>(state, 0);
  args.memory = {offset<float>(memory, 0)};
  args.record = offset<float>(record, step * kCacheRecord);
  return args;
}

}  // namespace ddit_rt
