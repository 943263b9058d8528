// Checks and unpacks the tensor arguments of the ops, for the CPU and the CUDA kernels alike.
//
// These are the only checks, whether an op is reached through `ddit_rt.ops`, `torch.ops` or an
// exported program. Each throws std::runtime_error, which torch raises as RuntimeError.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "ddit_rt/patch.h"
#include "ddit_rt/policy.h"
#include "ddit_rt/step_cache.h"

namespace ddit_rt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string shape_text(const Tensor& tensor);

void check_contiguous(const Tensor& tensor, const char* op, const char* name);
void check_dtype(const Tensor& tensor, ScalarType dtype, const char* op, const char* name);
void check_shape(const Tensor& tensor, const std::vector<int64_t>& shape, const char* op,
                 const char* name);

// float32, bfloat16 or float16, contiguous.
void check_floating(const Tensor& tensor, const char* op, const char* name);

// latents [B, C, H, W] or [B, C, F, H, W]; an image counts as one frame.
PatchShape pack_shape(const Tensor& latents, int64_t patch_size, bool channels_last);

// tokens [B, N, C * p * p]; frames = 0 stands for latents without a frame dimension.
PatchShape unpack_shape(const Tensor& tokens, int64_t patch_size, int64_t height, int64_t width,
                        int64_t frames, bool channels_last);

// Uninitialised results of pack and unpack, on the argument's device and of its dtype.
Tensor new_tokens(const Tensor& latents, const PatchShape& shape);
Tensor new_latents(const Tensor& tokens, const PatchShape& shape, bool has_frames);

struct ScoreArgs {
  PatchShape shape;            // patch = `base`
  std::vector<int64_t> sizes;  // as the caller ordered them
  int64_t base;                // greatest common divisor of the sizes
  float quantile;
  int order;
  const float* newest[4];  // z0, z1, z2, z3: [B, C, F, H, W] each
};

ScoreArgs score_args(const Tensor& history, std::vector<int64_t> patch_sizes, double quantile,
                     int64_t order, int64_t head);

// float32 [B, n, heads, width] of any strides, which are counted in values.
struct HeadsView {
  const float* data;
  int64_t sample;
  int64_t token;
  int64_t head;
  int64_t channel;

  const float* at(int64_t b, int64_t n, int64_t h) const {
    return data + b * sample + n * token + h * head;
  }
};

struct AttentionArgs {
  int64_t batch;
  int64_t heads;
  int64_t queries;
  int64_t keys;
  int64_t width;
  double scale;
  HeadsView query;
  HeadsView key;
  HeadsView value;
  float* out;  // [B, queries, heads, width], contiguous; not set yet

  float* out_at(int64_t b, int64_t n, int64_t h) const {
    return out + ((b * queries + n) * heads + h) * width;
  }
};

AttentionArgs attention_args(const Tensor& query, const Tensor& key, const Tensor& value,
                             double scale);

struct LinearArgs {
  int64_t batch;
  int64_t tokens;
  int64_t channels;
  int64_t features;
  const float* values;  // [B, tokens, channels]
  int64_t sample_step;
  int64_t token_step;
  int64_t channel_step;
  const float* weight;  // [features, channels]
  int64_t weight_step;
  const float* bias;  // [features], or null
  bool gelu;
  float* out;  // [B, tokens, features], contiguous; not set yet
};

LinearArgs linear_args(const Tensor& values, const Tensor& weight,
                       const std::optional<Tensor>& bias, bool gelu);

struct NormRotateArgs {
  int64_t batch;
  int64_t tokens;
  int64_t heads;
  int64_t width;  // even
  bool over_all;  // heads together, else each
  HeadsView values;
  const float* weight;  // [heads * width], or [width]
  const float* cos;     // [tokens, width]
  const float* sin;
  float eps;
  float* out;  // [B, tokens, heads, width], contiguous; not set yet
};

NormRotateArgs norm_rotate_args(const Tensor& values, const Tensor& weight, const Tensor& cos,
                                const Tensor& sin, double eps);

struct SolverArgs {
  int64_t count;             // values of one latent
  int64_t past_velocities;   // D: how many velocities before v[k] are kept
  const void* coefficients;  // row of this step
  bool double_coefficients;
  const float* latents[3];     // z[k], z[k-1], z[k-2]
  const float* velocities[2];  // v[k-1], v[k-2], null where the ring is too short
  const void* velocity;        // v[k]
  ScalarType velocity_dtype;
  float* velocity_out;  // ring slot that v[k] takes over; null if D is 0
  float* latents_out;   // ring slot of z[k+1]
};

SolverArgs solver_args(const Tensor& history, const Tensor& velocities, const Tensor& velocity,
                       const Tensor& coefficients, int64_t step);

struct DecideArgs {
  int batch;  // 0 where no scores were given
  int sizes;
  const float* scores;      // [B, S]
  const int32_t* forced;    // this step's entry
  const float* thresholds;  // this step's row [S]
  PolicyState* state;
  float* record;  // this step's row [3 + S]
  PolicyRule rule;
};

DecideArgs decide_args(const Tensor& scores, const Tensor& forced, const Tensor& thresholds,
                       const Tensor& state, const Tensor& record, int64_t step, int64_t dwell,
                       bool monotone);

struct ReuseArgs {
  int rows;
  int buckets;
  const float* signal;  // [R], or empty where the rule has no polynomial
  float increment;      // this step's
  CacheRule rule;
  PolicyState* state;
  CacheMemory memory;
  float* record;  // this step's row [2]
};

ReuseArgs reuse_args(const Tensor& signal, const Tensor& increments, const Tensor& coefficients,
                     const Tensor& state, const Tensor& memory, const Tensor& record, int64_t step,
                     int64_t buckets, double threshold, int64_t limit, int64_t growth);

}  // namespace ddit_rt
