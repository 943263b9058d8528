// The CUDA kernels behind C functions that Python calls with tensors' addresses. Each repeats the
// launch of its .cu file; the kernels are the shipped ones.

// The emulator defines what the kernels' headers expect of nvcc, so it must come first.
// clang-format off
#include "emulator.h"
// clang-format on

#include "cuda/decide.cuh"
#include "cuda/patch_scores.cuh"
#include "cuda/solver_step.cuh"

namespace ddit_rt {

namespace {

unsigned blocks(int64_t count) { return static_cast<unsigned>(count); }

template <typename T>
void run_solver(const SolverParams& params, int width, unsigned grid) {
  emulator::launch({grid}, {64}, [&] {
    if (width == 4)
      solver_step_kernel<T, double, 4>(params);
    else
      solver_step_kernel<T, double, 1>(params);
  });
}

}  // namespace
}  // namespace ddit_rt

using namespace ddit_rt;

extern "C" {

// latents: z[k], z[k-1], z[k-2]; velocities: v[k-1], v[k-2]; type: 0 float, 1 bfloat16, 2 float16.
void emulate_solver_step(int64_t count, const double* row, const float* const* latents,
                         const float* const* velocities, const void* velocity, float* velocity_out,
                         float* latents_out, int type, int width) {
  const SolverParams params{count,
                            row,
                            {latents[0], latents[1], latents[2]},
                            {nullptr, velocities[0], velocities[1]},
                            velocity,
                            velocity_out,
                            latents_out};
  if (type == 0) run_solver<float>(params, width, 3);
  if (type == 1) run_solver<BFloat16>(params, width, 3);
  if (type == 2) run_solver<Float16>(params, width, 3);
}

void emulate_patch_scores(const float* const* newest, const int64_t* shape, int order,
                          float quantile, int sizes, const int* factors, float* mean, float* m2,
                          uint32_t* keys, float* scores) {
  MomentParams moments{};
  for (int i = 0; i < kHistoryLength; ++i) moments.newest[i] = newest[i];
  moments.mean = mean;
  moments.m2 = m2;
  moments.shape = {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]};
  const PatchShape& patches = moments.shape;
  moments.columns = kScoreColumns / static_cast<int>(patches.patch) * patches.patch;
  moments.tiles = (patches.width + moments.columns - 1) / moments.columns;
  const int64_t count = patches.batch * patches.frames * patches.rows() * moments.tiles;
  emulator::launch({blocks(count)}, {kScoreColumns, kScoreGroups}, [&] {
    if (order == 1) patch_moments_kernel<1>(moments);
    if (order == 2) patch_moments_kernel<2>(moments);
    if (order == 3) patch_moments_kernel<3>(moments);
  });

  QuantileParams quantiles{};
  quantiles.mean = mean;
  quantiles.m2 = m2;
  quantiles.keys = keys;
  quantiles.scores = scores;
  quantiles.rows = patches.frames * patches.rows();
  quantiles.columns = patches.columns();
  quantiles.base_count = static_cast<float>(patches.lines() * patches.patch);
  quantiles.quantile = quantile;
  quantiles.sizes = sizes;
  for (int i = 0; i < sizes; ++i) quantiles.factor[i] = factors[i];
  emulator::launch({blocks(sizes), blocks(patches.batch)}, {kSelectThreads},
                   [&] { patch_quantile_kernel(quantiles); });
}

// The radix select alone: one-value "patches" whose sum of squares is given, so that the deviations
// are known to the bit.
void emulate_quantile(const float* m2, int64_t count, float quantile, uint32_t* keys,
                      float* score) {
  const std::vector<float> mean(count, 0.0f);
  QuantileParams params{};
  params.mean = mean.data();
  params.m2 = m2;
  params.keys = keys;
  params.scores = score;
  params.rows = 1;
  params.columns = count;
  params.base_count = 2.0f;  // so that the deviation is sqrt(m2)
  params.quantile = quantile;
  params.sizes = 1;
  params.factor[0] = 1;
  emulator::launch({1}, {kSelectThreads}, [&] { patch_quantile_kernel(params); });
}

void emulate_decide(const float* scores, const int32_t* forced, const float* thresholds,
                    int32_t* state, float* record, int batch, int sizes, int dwell, bool monotone) {
  const DecideParams params{scores, forced, thresholds, reinterpret_cast<PolicyState*>(state),
                            record, batch,  sizes,      {dwell, monotone}};
  emulator::launch({1}, {1}, [&] { decide_kernel(params); });
}

}  // extern "C"
