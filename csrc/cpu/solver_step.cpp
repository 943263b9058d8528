// Fused solver update: reads every latent and velocity once, writes z[k+1], and v[k] where later
// steps need it.
//
// Works in blocks of 4096 values that stay in the L1 cache while the terms are added one by one, so
// that any mix of zero and non-zero coefficients costs memory traffic only for what it reads. Bound
// by bytes, per value: 4 * (terms other than v[k]) + the velocity's own size, read; 4 for z[k+1],
// and 4 more where velocities are kept, written.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "binding/args.h"
#include "ddit_rt/halves.h"
#include "ddit_rt/solver.h"

namespace ddit_rt {
namespace {

constexpr int64_t kBlock = 4096;       // values: 16 KiB of float32
constexpr int64_t kGrain = 64 * 1024;  // values worth a thread of their own

struct Term {
  const float* values;  // null: v[k]
  float coefficient;
};

// The sum is taken in the order z[k], z[k-1], z[k-2], v[k], v[k-1], v[k-2].
struct Terms {
  Term list[kCoefficients];
  int count = 0;
};

DDIT_RT_CPU_CLONES void first_term(const float* x, float coefficient, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = coefficient * x[i];
}

DDIT_RT_CPU_CLONES void next_term(const float* x, float coefficient, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = add_term(out[i], coefficient, x[i]);
}

DDIT_RT_CPU_CLONES void two_terms(const float* __restrict__ x, float a, const float* __restrict__ y,
                                  float b, float* __restrict__ out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = add_term(a * x[i], b, y[i]);
}

DDIT_RT_CPU_CLONES void widen(const BFloat16* __restrict__ x, float* __restrict__ out,
                              int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(x[i]);
}

DDIT_RT_CPU_CLONES void widen(const Float16* __restrict__ x, float* __restrict__ out,
                              int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(x[i]);
}

// v[k] of one block as float32: where it is, or widened into `block`.
const float* as_float(const float* x, float*, int64_t) { return x; }

template <typename T>
const float* as_float(const T* x, float* block, int64_t count) {
  widen(x, block, count);
  return block;
}

Terms nonzero_terms(const SolverArgs& args) {
  const SolverRow row = args.double_coefficients
                            ? solver_row(static_cast<const double*>(args.coefficients))
                            : solver_row(static_cast<const float*>(args.coefficients));
  Terms terms;
  const auto push = [&terms](const float* values, float coefficient) {
    if (coefficient != 0.0f) terms.list[terms.count++] = {values, coefficient};
  };
  for (int i = 0; i < kTerms; ++i) push(args.latents[i], row.a[i]);
  for (int j = 0; j < kTerms; ++j) {
    STD_TORCH_CHECK(j <= args.past_velocities || row.b[j] == 0.0f, "ddit_rt::solver_step_: b", j,
                    " is ", row.b[j], " but the velocity ring has only ", args.past_velocities,
                    " slots");
    push(j == 0 ? nullptr : args.velocities[j - 1], row.b[j]);
  }
  return terms;
}

template <typename T>
void run_range(const SolverArgs& args, const Terms& terms, int64_t begin, int64_t end) {
  alignas(64) float block[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = std::min(kBlock, end - at);
    const float* newest = as_float(static_cast<const T*>(args.velocity) + at, block, count);
    float* out = args.latents_out + at;
    Term term[kCoefficients];
    for (int i = 0; i < terms.count; ++i) {
      const Term& from = terms.list[i];
      term[i] = {from.values == nullptr ? newest : from.values + at, from.coefficient};
    }
    const int left = terms.count;
    if (left == 0) std::fill_n(out, count, 0.0f);
    if (left == 1) first_term(term[0].values, term[0].coefficient, out, count);
    if (left >= 2) {
      two_terms(term[0].values, term[0].coefficient, term[1].values, term[1].coefficient, out,
                count);
    }
    for (int i = 2; i < left; ++i) next_term(term[i].values, term[i].coefficient, out, count);
    // Last: the slot may be that of a velocity which was read above.
    if (args.velocity_out != nullptr) std::copy_n(newest, count, args.velocity_out + at);
  }
}

template <typename T>
void run(const SolverArgs& args, const Terms& terms) {
  torch::stable::parallel_for(0, args.count, kGrain, [&](int64_t begin, int64_t end) {
    run_range<T>(args, terms, begin, end);
  });
}

void solver_step_cpu(Tensor history, Tensor velocities, Tensor velocity, Tensor coefficients,
                     int64_t step) {
  const SolverArgs args = solver_args(history, velocities, velocity, coefficients, step);
  const Terms terms = nonzero_terms(args);
  if (args.velocity_dtype == ScalarType::Float) run<float>(args, terms);
  if (args.velocity_dtype == ScalarType::BFloat16) run<BFloat16>(args, terms);
  if (args.velocity_dtype == ScalarType::Half) run<Float16>(args, terms);
}

}  // namespace
}  // namespace ddit_rt

STABLE_TORCH_LIBRARY_IMPL(ddit_rt, CPU, m) {
  m.impl("solver_step_", TORCH_BOX(&ddit_rt::solver_step_cpu));
}
