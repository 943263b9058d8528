// The step loop's kernels, the shipped source under the block emulator, for the mock CUDA runtime.

// The emulator defines what the kernels' headers expect of nvcc, so it must come first.
// clang-format off
#include "emulator.h"
// clang-format on

#include "cuda/step_kernels.cu"

#include "mock_cudart.h"

namespace ddit_rt {

void set_conditional(unsigned long long handle, unsigned value) {
  mock::set_conditional(handle, value);
}

}  // namespace ddit_rt

namespace mock {
namespace {

using ddit_rt::BFloat16;
using ddit_rt::Float16;
using ddit_rt::LoopParams;
using ddit_rt::Switches;

template <typename T>
const T& argument(void* const* arguments, int index) {
  return *static_cast<const T*>(arguments[index]);
}

dim3 extent(Grid grid) { return {grid.x, grid.y, grid.z}; }

void register_loop_kernel(const std::string& name, void (*kernel)(LoopParams)) {
  register_kernel(
      reinterpret_cast<const void*>(kernel),
      {name, {sizeof(LoopParams)}, [kernel](Grid blocks, Grid threads, void* const* args) {
         const auto& params = argument<LoopParams>(args, 0);
         emulator::launch(extent(blocks), extent(threads), [&] { kernel(params); });
       }});
}

template <typename T>
void register_updates(const std::string& type) {
  register_loop_kernel("update<" + type + ", 4>", &ddit_rt::update_kernel<T, 4>);
  register_loop_kernel("update<" + type + ", 1>", &ddit_rt::update_kernel<T, 1>);
  register_loop_kernel("update_flat<" + type + ", 4>", &ddit_rt::update_flat_kernel<T, 4>);
  register_loop_kernel("update_flat<" + type + ", 1>", &ddit_rt::update_flat_kernel<T, 1>);
}

}  // namespace

void register_step_kernels() {
  register_loop_kernel("begin", &ddit_rt::begin_kernel);
  register_loop_kernel("finish", &ddit_rt::finish_kernel);
  register_updates<float>("float32");
  register_updates<BFloat16>("bfloat16");
  register_updates<Float16>("float16");
  register_kernel(reinterpret_cast<const void*>(&ddit_rt::decide_kernel),
                  {"decide",
                   {sizeof(LoopParams), sizeof(Switches)},
                   [](Grid blocks, Grid threads, void* const* args) {
                     const auto& params = argument<LoopParams>(args, 0);
                     const auto& switches = argument<Switches>(args, 1);
                     emulator::launch(extent(blocks), extent(threads),
                                      [&] { ddit_rt::decide_kernel(params, switches); });
                   }});
}

void set_order(unsigned seed) { emulator::order = seed; }

}  // namespace mock
