// Scores of all candidate patch sizes in one pass over the history.
//
// 1. Per row of base patches (edge = greatest common divisor of the sizes): Welford's update down
//    the C * g lines of the row, one accumulator per pixel column, so that the loop runs along
//    memory and vectorises; then the g columns of each patch merge.
// 2. Per sample and size: the moments of (size / g)^2 base patches merge, and the quantile of the
//    standard deviations is selected.
//
// Every patch is reduced by one thread in a fixed order: the result does not depend on the number
// of threads. Bound by the four reads of the history in step 1, by selection in step 2.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "binding/args.h"
#include "ddit_rt/difference.h"
#include "ddit_rt/moments.h"
#include "ddit_rt/quantile.h"

namespace ddit_rt {
namespace {

constexpr int64_t kGrain = 32 * 1024;  // values of one latent worth a thread of their own
constexpr int64_t kColumns = 256;      // accumulators kept at a time: 2 KiB

// Means and sums of squared deviations of a grid of patches [rows, columns], all of `count` values.
struct Grid {
  int64_t rows = 0;
  int64_t columns = 0;
  float count = 0.0f;
  std::vector<float> mean;
  std::vector<float> m2;

  Grid(int64_t rows_, int64_t columns_, float count_)
      : rows(rows_), columns(columns_), count(count_), mean(rows_ * columns_), m2(mean.size()) {}
};

// One more value for every column; `reciprocal` is 1 / (number of values with this one).
template <int kOrder>
DDIT_RT_HD void add_line(const float* __restrict__ z0, const float* __restrict__ z1,
                         const float* __restrict__ z2, const float* __restrict__ z3,
                         float reciprocal, float* __restrict__ mean, float* __restrict__ m2,
                         int64_t columns) {
  for (int64_t x = 0; x < columns; ++x) {
    const float value =
        difference<kOrder>(z0[x], z1[x], kOrder >= 2 ? z2[x] : 0.0f, kOrder >= 3 ? z3[x] : 0.0f);
    const float delta = value - mean[x];
    mean[x] += delta * reciprocal;
    m2[x] += delta * (value - mean[x]);
  }
}

DDIT_RT_CPU_CLONES void add_line(int order, const float* const z[4], float reciprocal, float* mean,
                                 float* m2, int64_t columns) {
  if (order == 1) add_line<1>(z[0], z[1], z[2], z[3], reciprocal, mean, m2, columns);
  if (order == 2) add_line<2>(z[0], z[1], z[2], z[3], reciprocal, mean, m2, columns);
  if (order == 3) add_line<3>(z[0], z[1], z[2], z[3], reciprocal, mean, m2, columns);
}

// Merges `stride`-spaced moments of `step_count` values each into running ones of `count` values:
// `merge` of moments.h with the counts, which are the same for the whole row, taken out of the
// loop.
DDIT_RT_CPU_CLONES void merge_strided(float* __restrict__ mean, float* __restrict__ m2,
                                      const float* __restrict__ more_mean,
                                      const float* __restrict__ more_m2, int64_t stride,
                                      float count, float step_count, int64_t patches) {
  const float share = step_count / (count + step_count);
  const float weight = count * share;
  for (int64_t i = 0; i < patches; ++i) {
    const float delta = more_mean[i * stride] - mean[i];
    mean[i] += delta * share;
    m2[i] = m2[i] + more_m2[i * stride] + delta * delta * weight;
  }
}

DDIT_RT_CPU_CLONES void deviations(const float* m2, float count, float* out, int64_t patches) {
  for (int64_t i = 0; i < patches; ++i) out[i] = standard_deviation({count, 0.0f, m2[i]});
}

// Row `row` of base patches of frame `f`, sample `b`, into the grid's row.
void reduce_row(const ScoreArgs& args, int64_t b, int64_t f, int64_t row, float* grid_mean,
                float* grid_m2) {
  const PatchShape& shape = args.shape;
  const int64_t tile = std::max<int64_t>(1, kColumns / shape.patch) * shape.patch;
  std::vector<float> buffer(2 * tile);
  float* const mean = buffer.data();
  float* const m2 = mean + tile;
  for (int64_t x = 0; x < shape.width; x += tile) {
    const int64_t columns = std::min(tile, shape.width - x);
    std::fill(buffer.begin(), buffer.end(), 0.0f);
    for (int64_t line = 0; line < shape.lines(); ++line) {
      const int64_t at = shape.latent_offset(b, f, row, line) + x;
      const float* const z[4] = {args.newest[0] + at, args.newest[1] + at, args.newest[2] + at,
                                 args.newest[3] + at};
      add_line(args.order, z, 1.0f / static_cast<float>(line + 1), mean, m2, columns);
    }
    const auto count = static_cast<float>(shape.lines());
    float* const out_mean = grid_mean + x / shape.patch;
    float* const out_m2 = grid_m2 + x / shape.patch;
    const int64_t patches = columns / shape.patch;
    std::fill_n(out_mean, patches, 0.0f);
    std::fill_n(out_m2, patches, 0.0f);
    for (int64_t i = 0; i < shape.patch; ++i) {
      merge_strided(out_mean, out_m2, mean + i, m2 + i, shape.patch, i * count, count, patches);
    }
  }
}

// Patches `factor` times as large on each side.
Grid coarsen(const Grid& fine, int64_t factor) {
  Grid grid(fine.rows / factor, fine.columns / factor, fine.count * (factor * factor));
  for (int64_t row = 0; row < grid.rows; ++row) {
    float* const mean = grid.mean.data() + row * grid.columns;
    float* const m2 = grid.m2.data() + row * grid.columns;
    for (int64_t i = 0; i < factor * factor; ++i) {
      const int64_t at = (row * factor + i / factor) * fine.columns + i % factor;
      merge_strided(mean, m2, fine.mean.data() + at, fine.m2.data() + at, factor, i * fine.count,
                    fine.count, grid.columns);
    }
  }
  return grid;
}

float select_quantile(std::vector<float>& values, float quantile) {
  for (const float value : values) {
    if (std::isnan(value)) return std::numeric_limits<float>::quiet_NaN();
  }
  const Rank rank = quantile_rank(quantile, static_cast<int64_t>(values.size()));
  const auto below = values.begin() + rank.below;
  std::nth_element(values.begin(), below, values.end());
  if (rank.weight == 0.0f) return *below;
  return lerp(*below, *std::min_element(below + 1, values.end()), rank.weight);
}

// Scores of one sample from its base grid, whose rows are those of all frames.
void score_sample(const ScoreArgs& args, const Grid& base, float* scores) {
  std::vector<size_t> order(args.sizes.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t i, size_t j) { return args.sizes[i] < args.sizes[j]; });
  std::vector<Grid> grids{base};
  std::vector<int64_t> edges{args.base};
  std::vector<float> values;
  for (const size_t i : order) {
    const int64_t size = args.sizes[i];
    size_t from = edges.size() - 1;  // the largest size so far that divides this one
    while (size % edges[from] != 0) --from;
    if (edges[from] != size) {
      grids.push_back(coarsen(grids[from], size / edges[from]));
      edges.push_back(size);
      from = edges.size() - 1;
    }
    const Grid& grid = grids[from];
    values.resize(grid.m2.size());
    deviations(grid.m2.data(), grid.count, values.data(), static_cast<int64_t>(values.size()));
    scores[i] = select_quantile(values, args.quantile);
  }
}

std::vector<Grid> base_grids(const ScoreArgs& args) {
  const PatchShape& shape = args.shape;
  const int64_t rows = shape.frames * shape.rows();
  const auto count = static_cast<float>(shape.lines() * shape.patch);
  std::vector<Grid> grids(shape.batch, Grid(rows, shape.columns(), count));
  const int64_t grain = std::max<int64_t>(1, kGrain / (shape.lines() * shape.width));
  torch::stable::parallel_for(0, shape.batch * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i % rows * shape.columns();
      Grid& grid = grids[i / rows];
      reduce_row(args, i / rows, i % rows / shape.rows(), i % shape.rows(), grid.mean.data() + at,
                 grid.m2.data() + at);
    }
  });
  return grids;
}

Tensor patch_scores_cpu(Tensor history, std::vector<int64_t> patch_sizes, double quantile,
                        int64_t order, int64_t head) {
  const ScoreArgs args = score_args(history, std::move(patch_sizes), quantile, order, head);
  const auto sizes = static_cast<int64_t>(args.sizes.size());
  const int64_t size[] = {args.shape.batch, sizes};
  Tensor scores = torch::stable::new_empty(history, {size, 2});
  if (scores.numel() == 0) return scores;
  const std::vector<Grid> grids = base_grids(args);
  auto* const out = static_cast<float*>(scores.data_ptr());
  torch::stable::parallel_for(0, args.shape.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) score_sample(args, grids[b], out + b * sizes);
  });
  return scores;
}

}  // namespace
}  // namespace ddit_rt

STABLE_TORCH_LIBRARY_IMPL(ddit_rt, CPU, m) {
  m.impl("patch_scores", TORCH_BOX(&ddit_rt::patch_scores_cpu));
}
