// Scores of all candidate patch sizes in one pass over the history.
//
// 1. Per row of base patches (edge = greatest common divisor of the sizes): Welford's update down
//    the C * g lines of the row, one accumulator per pixel column, so that the loop runs along
//    memory and vectorises; then the g columns of each patch merge.
// 2. Per sample and size: the moments of (size / g)^2 base patches merge, and the quantile of the
//    standard deviations is selected.
//
// A patch that reaches over an edge has the pixels that are there: only patches of the last row and
// the last column have fewer, so that counts stay the same along a row.
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
constexpr int64_t kLines = 4;          // added at a time

// Means and sums of squared deviations of one sample's patches, [frames, rows, columns].
struct Grid {
  PatchShape shape;
  std::vector<float> mean;
  std::vector<float> m2;

  explicit Grid(const PatchShape& shape_) : shape(shape_), mean(shape.tokens()), m2(mean.size()) {}

  // Values of a patch.
  float count(int64_t row, int64_t column) const {
    return static_cast<float>(shape.channels * shape.row_height(row) * shape.column_width(column));
  }
  // Columns from the first whose patches have their whole width.
  int64_t whole_columns() const { return shape.width / shape.patch; }
  int64_t at(int64_t frame, int64_t row) const {
    return (frame * shape.rows() + row) * shape.columns();
  }
};

// kCount more values for every column, a line of each of the newest latents after the other.
// `first` is the number of values before them.
template <int kOrder, int kCount>
DDIT_RT_HD void add_lines(const float* const (&newest)[4], const int64_t* line_at, int64_t first,
                          float* __restrict__ mean, float* __restrict__ m2, int64_t columns) {
  const float* __restrict__ z[kCount][4];
  float reciprocal[kCount];
  for (int i = 0; i < kCount; ++i) {
    for (int age = 0; age < 4; ++age) z[i][age] = newest[age] + line_at[i];
    reciprocal[i] = 1.0f / static_cast<float>(first + i + 1);
  }
  for (int64_t x = 0; x < columns; ++x) {
    float mean_x = mean[x];
    float m2_x = m2[x];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const float value = difference<kOrder>(
          z[i][0][x], z[i][1][x], kOrder >= 2 ? z[i][2][x] : 0.0f, kOrder >= 3 ? z[i][3][x] : 0.0f);
      const float delta = value - mean_x;
      mean_x += delta * reciprocal[i];
      m2_x += delta * (value - mean_x);
    }
    mean[x] = mean_x;
    m2[x] = m2_x;
  }
}

// All lines of a row of patches, several at a time: their moments stay in registers meanwhile.
template <int kOrder>
DDIT_RT_HD void add_all(const float* const (&newest)[4], const int64_t* line_at, int64_t lines,
                        float* mean, float* m2, int64_t columns) {
  int64_t line = 0;
  for (; line + kLines <= lines; line += kLines)
    add_lines<kOrder, kLines>(newest, line_at + line, line, mean, m2, columns);
  for (; line < lines; ++line)
    add_lines<kOrder, 1>(newest, line_at + line, line, mean, m2, columns);
}

DDIT_RT_CPU_CLONES void add_all(int order, const float* const (&newest)[4], const int64_t* line_at,
                                int64_t lines, float* mean, float* m2, int64_t columns) {
  if (order == 1) add_all<1>(newest, line_at, lines, mean, m2, columns);
  if (order == 2) add_all<2>(newest, line_at, lines, mean, m2, columns);
  if (order == 3) add_all<3>(newest, line_at, lines, mean, m2, columns);
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

// Row `row` of base patches of frame `f`, sample `b`, into the grid's row. Lines are taken channel
// by channel, as `PatchShape` numbers them.
void reduce_row(const ScoreArgs& args, int64_t b, int64_t f, int64_t row, float* grid_mean,
                float* grid_m2) {
  const PatchShape& shape = args.shape;
  const int64_t tile = std::max<int64_t>(1, kColumns / shape.patch) * shape.patch;
  std::vector<float> buffer(2 * tile);
  float* const mean = buffer.data();
  float* const m2 = mean + tile;
  const int64_t height = shape.row_height(row);
  const int64_t lines = shape.channels * height;
  std::vector<int64_t> line_at;
  for (int64_t channel = 0; channel < shape.channels; ++channel) {
    for (int64_t dy = 0; dy < height; ++dy)
      line_at.push_back(shape.latent_offset(b, f, row, channel * shape.patch + dy));
  }
  for (int64_t x = 0; x < shape.width; x += tile) {
    const int64_t columns = std::min(tile, shape.width - x);
    std::fill(buffer.begin(), buffer.end(), 0.0f);
    const float* const newest[4] = {args.newest[0] + x, args.newest[1] + x, args.newest[2] + x,
                                    args.newest[3] + x};
    add_all(args.order, newest, line_at.data(), lines, mean, m2, columns);
    const auto count = static_cast<float>(lines);
    float* const out_mean = grid_mean + x / shape.patch;
    float* const out_m2 = grid_m2 + x / shape.patch;
    const int64_t patches = (columns + shape.patch - 1) / shape.patch;
    std::fill_n(out_mean, patches, 0.0f);
    std::fill_n(out_m2, patches, 0.0f);
    for (int64_t i = 0; i < std::min(shape.patch, columns); ++i) {
      const int64_t reaching = (columns - i + shape.patch - 1) / shape.patch;  // patches with it
      merge_strided(out_mean, out_m2, mean + i, m2 + i, shape.patch, i * count, count, reaching);
    }
  }
}

// Patches [column, column + patches) of a row, which merge equally many and equally large ones.
void coarsen_row(const Grid& fine, Grid& grid, int64_t frame, int64_t row, int64_t column,
                 int64_t patches) {
  const int64_t factor = grid.shape.patch / fine.shape.patch;
  const int64_t out = grid.at(frame, row) + column;
  const int64_t end_row = std::min((row + 1) * factor, fine.shape.rows());
  const int64_t end_column = std::min((column + 1) * factor, fine.shape.columns());
  float count = 0.0f;
  for (int64_t y = row * factor; y < end_row; ++y) {
    for (int64_t x = column * factor; x < end_column; ++x) {
      const int64_t at = fine.at(frame, y) + x;
      const float more = fine.count(y, x);
      merge_strided(grid.mean.data() + out, grid.m2.data() + out, fine.mean.data() + at,
                    fine.m2.data() + at, factor, count, more, patches);
      count += more;
    }
  }
}

// Patches of a larger size, a multiple of the finer grid's.
Grid coarsen(const Grid& fine, int64_t size) {
  PatchShape shape = fine.shape;
  shape.patch = size;
  Grid grid(shape);
  const int64_t whole = grid.whole_columns();
  for (int64_t frame = 0; frame < shape.frames; ++frame) {
    for (int64_t row = 0; row < shape.rows(); ++row) {
      coarsen_row(fine, grid, frame, row, 0, whole);
      if (whole < shape.columns()) coarsen_row(fine, grid, frame, row, whole, 1);
    }
  }
  return grid;
}

// Standard deviations of all patches.
void deviations(const Grid& grid, std::vector<float>& values) {
  const PatchShape& shape = grid.shape;
  const int64_t whole = grid.whole_columns();
  values.resize(grid.m2.size());
  for (int64_t frame = 0; frame < shape.frames; ++frame) {
    for (int64_t row = 0; row < shape.rows(); ++row) {
      const float* const m2 = grid.m2.data() + grid.at(frame, row);
      float* const out = values.data() + grid.at(frame, row);
      deviations(m2, grid.count(row, 0), out, whole);
      if (whole == shape.columns()) continue;
      deviations(m2 + whole, grid.count(row, whole), out + whole, 1);
    }
  }
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

// Scores of one sample from its base grid.
void score_sample(const ScoreArgs& args, const Grid& base, float* scores) {
  std::vector<size_t> order(args.sizes.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t i, size_t j) { return args.sizes[i] < args.sizes[j]; });
  std::vector<Grid> grids{base};
  std::vector<float> values;
  for (const size_t i : order) {
    const int64_t size = args.sizes[i];
    size_t from = grids.size() - 1;  // the largest size so far that divides this one
    while (size % grids[from].shape.patch != 0) --from;
    if (grids[from].shape.patch != size) {
      grids.push_back(coarsen(grids[from], size));
      from = grids.size() - 1;
    }
    deviations(grids[from], values);
    scores[i] = select_quantile(values, args.quantile);
  }
}

std::vector<Grid> base_grids(const ScoreArgs& args) {
  const PatchShape& shape = args.shape;
  const int64_t rows = shape.frames * shape.rows();
  std::vector<Grid> grids(shape.batch, Grid(shape));
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
