#include <torch/csrc/stable/library.h>

#include "binding/args.h"
#include "cuda/decide.cuh"
#include "cuda/launch.h"

namespace ddit_rt {
namespace {

void decide_cuda(Tensor scores, Tensor forced, Tensor thresholds, Tensor state, Tensor record,
                 int64_t step, int64_t dwell, bool monotone) {
  const DecideArgs args =
      decide_args(scores, forced, thresholds, state, record, step, dwell, monotone);
  const LaunchContext context(state);
  const DecideParams params{args.scores, args.forced, args.thresholds, args.state,
                            args.record, args.batch,  args.sizes,      args.rule};
  decide_kernel<<<1, 1, 0, context.stream()>>>(params);
  LaunchContext::check("decide_kernel");
}

}  // namespace
}  // namespace ddit_rt

STABLE_TORCH_LIBRARY_IMPL(ddit_rt, CUDA, m) { m.impl("decide_", TORCH_BOX(&ddit_rt::decide_cuda)); }
