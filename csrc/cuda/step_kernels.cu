#include "cuda/decide.cuh"
#include "cuda/loop_control.cuh"
#include "cuda/step_kernels.h"
#include "cuda/update.cuh"

namespace ddit_rt {
namespace {

constexpr int64_t kMaxFlatBlocks = 2048;  // enough to fill any GPU; more would only queue

template <typename Function>
const void* address(Function* function) {
  return reinterpret_cast<const void*>(function);
}

template <typename T, int kWidth>
Kernel update_of(const LoopParams& p) {
  Kernel kernel;
  kernel.threads = kUpdateThreads;
  if (p.sizes > 0) {
    kernel.function = address(&update_kernel<T, kWidth>);
    kernel.grid_x =
        static_cast<unsigned>(p.shape.batch * p.shape.frames * p.shape.rows() * p.tiles);
    return kernel;
  }
  kernel.function = address(&update_flat_kernel<T, kWidth>);
  const int64_t blocks = (p.count() / kWidth + kUpdateThreads - 1) / kUpdateThreads;
  kernel.grid_x = static_cast<unsigned>(blocks < kMaxFlatBlocks ? blocks : kMaxFlatBlocks);
  return kernel;
}

template <typename T>
Kernel update_of(const LoopParams& p, int width) {
  return width == 4 ? update_of<T, 4>(p) : update_of<T, 1>(p);
}

}  // namespace

StepKernels step_kernels(const LoopParams& p, VelocityType type, int width) {
  StepKernels kernels;
  kernels.begin.function = address(&begin_kernel);
  kernels.finish.function = address(&finish_kernel);
  kernels.decide.function = address(&decide_kernel);
  kernels.decide.grid_x = p.sizes > 0 ? static_cast<unsigned>(p.sizes) : 1u;
  kernels.decide.grid_y = static_cast<unsigned>(p.shape.batch);
  kernels.decide.threads = kDecideThreads;
  if (type == VelocityType::kFloat32) kernels.update = update_of<float>(p, width);
  if (type == VelocityType::kBFloat16) kernels.update = update_of<BFloat16>(p, width);
  if (type == VelocityType::kFloat16) kernels.update = update_of<Float16>(p, width);
  return kernels;
}

}  // namespace ddit_rt
