#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "binding/args.h"
#include "cuda/launch.h"
#include "cuda/solver_step.cuh"

namespace ddit_rt {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 2048;  // enough to fill any GPU; more would only queue

bool aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Rings start aligned, and slots stay so if a latent is a multiple of four values.
bool can_take_four(const SolverArgs& args, size_t item) {
  return args.count % 4 == 0 && aligned(args.velocity, 4 * item) && aligned(args.latents_out, 16) &&
         aligned(args.velocity_out, 16);
}

template <typename T, typename C, int kWidth>
void launch(const SolverArgs& args, cudaStream_t stream) {
  SolverParams params{args.count,
                      args.coefficients,
                      {args.latents[0], args.latents[1], args.latents[2]},
                      {nullptr, args.velocities[0], args.velocities[1]},
                      args.velocity,
                      args.velocity_out,
                      args.latents_out};
  const int64_t blocks = (args.count / kWidth + kThreads - 1) / kThreads;
  const auto grid = static_cast<unsigned>(std::min(blocks, kMaxBlocks));
  solver_step_kernel<T, C, kWidth><<<grid, kThreads, 0, stream>>>(params);
  LaunchContext::check("solver_step_kernel");
}

template <typename T, typename C>
void choose_width(const SolverArgs& args, cudaStream_t stream) {
  return can_take_four(args, sizeof(T)) ? launch<T, C, 4>(args, stream)
                                        : launch<T, C, 1>(args, stream);
}

template <typename T>
void choose_coefficients(const SolverArgs& args, cudaStream_t stream) {
  return args.double_coefficients ? choose_width<T, double>(args, stream)
                                  : choose_width<T, float>(args, stream);
}

void solver_step_cuda(Tensor history, Tensor velocities, Tensor velocity, Tensor coefficients,
                      int64_t step) {
  const SolverArgs args = solver_args(history, velocities, velocity, coefficients, step);
  if (args.count == 0) return;
  const LaunchContext context(history);
  switch (args.velocity_dtype) {
    case ScalarType::BFloat16:
      return choose_coefficients<BFloat16>(args, context.stream());
    case ScalarType::Half:
      return choose_coefficients<Float16>(args, context.stream());
    default:
      return choose_coefficients<float>(args, context.stream());
  }
}

}  // namespace
}  // namespace ddit_rt

STABLE_TORCH_LIBRARY_IMPL(ddit_rt, CUDA, m) {
  m.impl("solver_step_", TORCH_BOX(&ddit_rt::solver_step_cuda));
}
