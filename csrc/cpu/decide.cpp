#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "binding/args.h"
#include "ddit_rt/policy.h"
#include "ddit_rt/step_cache.h"

namespace ddit_rt {
namespace {

void decide_cpu(Tensor scores, Tensor forced, Tensor thresholds, Tensor state, Tensor record,
                int64_t step, int64_t dwell, bool monotone) {
  const DecideArgs args =
      decide_args(scores, forced, thresholds, state, record, step, dwell, monotone);
  const int32_t entry = *args.forced;
  STD_TORCH_CHECK(entry >= kDynamic && entry <= args.sizes, "ddit_rt::decide_: forced[", step,
                  "] is ", entry, ", expected -1 (dynamic) or a bucket, 0 to ", args.sizes);
  STD_TORCH_CHECK(entry != kDynamic || args.batch > 0, "ddit_rt::decide_: step ", step,
                  " is dynamic but no scores were given");
  decide_step(args.scores, args.thresholds, args.batch, args.sizes, entry, args.rule, args.state,
              args.record);
}

void decide_reuse_cpu(Tensor signal, Tensor increments, Tensor coefficients, Tensor state,
                      Tensor memory, Tensor record, int64_t step, int64_t buckets, double threshold,
                      int64_t limit, int64_t growth) {
  const ReuseArgs args = reuse_args(signal, increments, coefficients, state, memory, record, step,
                                    buckets, threshold, limit, growth);
  cache_step(args.signal, args.increment, args.rows, args.buckets, args.rule, args.state,
             args.memory, args.record);
}

}  // namespace
}  // namespace ddit_rt

STABLE_TORCH_LIBRARY_IMPL(ddit_rt, CPU, m) {
  m.impl("decide_", TORCH_BOX(&ddit_rt::decide_cpu));
  m.impl("decide_reuse_", TORCH_BOX(&ddit_rt::decide_reuse_cpu));
}
