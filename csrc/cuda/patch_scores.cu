#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "binding/args.h"
#include "cuda/launch.h"
#include "cuda/patch_scores.cuh"

namespace ddit_rt {
namespace {

// A block's tile is at most 32 columns, so base patches must not be wider: any divisor of the
// sizes' common divisor serves as the base.
int64_t base_edge(int64_t divisor) {
  int64_t edge = divisor < kScoreColumns ? divisor : kScoreColumns;
  while (divisor % edge != 0) --edge;
  return edge;
}

void launch_moments(const ScoreArgs& args, float* mean, float* m2, cudaStream_t stream) {
  MomentParams params{};
  for (int i = 0; i < kHistoryLength; ++i) params.newest[i] = args.newest[i];
  params.mean = mean;
  params.m2 = m2;
  params.shape = args.shape;
  const auto edge = static_cast<int>(args.shape.patch);
  params.columns = kScoreColumns / edge * edge;
  params.tiles = (args.shape.width + params.columns - 1) / params.columns;
  const PatchShape& shape = args.shape;
  const unsigned grid = grid_size(shape.batch * shape.frames * shape.rows() * params.tiles);
  const dim3 block(kScoreColumns, kScoreGroups);
  if (args.order == 1) patch_moments_kernel<1><<<grid, block, 0, stream>>>(params);
  if (args.order == 2) patch_moments_kernel<2><<<grid, block, 0, stream>>>(params);
  if (args.order == 3) patch_moments_kernel<3><<<grid, block, 0, stream>>>(params);
  LaunchContext::check("patch_moments_kernel");
}

void launch_quantiles(const ScoreArgs& args, QuantileParams params, cudaStream_t stream) {
  const PatchShape& shape = args.shape;
  params.rows = shape.frames * shape.rows();
  params.columns = shape.columns();
  params.base_count = static_cast<float>(shape.lines() * shape.patch);
  params.quantile = args.quantile;
  params.sizes = static_cast<int>(args.sizes.size());
  for (int i = 0; i < params.sizes; ++i) {
    params.factor[i] = static_cast<int>(args.sizes[i] / shape.patch);
  }
  const dim3 grid(params.sizes, grid_size(shape.batch));
  patch_quantile_kernel<<<grid, kSelectThreads, 0, stream>>>(params);
  LaunchContext::check("patch_quantile_kernel");
}

Tensor patch_scores_cuda(Tensor history, std::vector<int64_t> patch_sizes, double quantile,
                         int64_t order, int64_t head) {
  ScoreArgs args = score_args(history, std::move(patch_sizes), quantile, order, head);
  const auto sizes = static_cast<int64_t>(args.sizes.size());
  const int64_t size[] = {args.shape.batch, sizes};
  Tensor scores = torch::stable::new_empty(history, {size, 2});
  if (scores.numel() == 0) return scores;
  args.shape.patch = base_edge(args.base);

  const LaunchContext context(history);
  const int64_t patches = args.shape.batch * args.shape.tokens();
  // One allocation: means, sums of squares, and the keys of every size.
  const int64_t scratch_size[] = {2 + sizes, patches};
  const Tensor scratch = torch::stable::new_empty(history, {scratch_size, 2});
  auto* const mean = static_cast<float*>(scratch.data_ptr());
  launch_moments(args, mean, mean + patches, context.stream());
  QuantileParams params{};
  params.mean = mean;
  params.m2 = mean + patches;
  params.keys = reinterpret_cast<uint32_t*>(mean + 2 * patches);
  params.scores = static_cast<float*>(scores.data_ptr());
  launch_quantiles(args, params, context.stream());
  return scores;
}

}  // namespace
}  // namespace ddit_rt

STABLE_TORCH_LIBRARY_IMPL(ddit_rt, CUDA, m) {
  m.impl("patch_scores", TORCH_BOX(&ddit_rt::patch_scores_cuda));
}
