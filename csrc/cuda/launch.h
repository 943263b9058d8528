// The stream that torch is using, and checked kernel launches.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace ddit_rt {

// Makes a tensor's device current for as long as it lives, and names its current stream.
class LaunchContext {
 public:
  explicit LaunchContext(const torch::stable::Tensor& tensor)
      : guard_(tensor.get_device_index()), stream_(stream_of(tensor.get_device_index())) {}

  cudaStream_t stream() const { return stream_; }

  // Throws if the launch just made was refused. What a kernel does wrong while it runs is reported
  // by the next synchronisation, as always with CUDA.
  static void check(const char* kernel) {
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) {
      throw std::runtime_error(std::string("ddit_rt: launch of ") + kernel +
                               " failed: " + cudaGetErrorString(error));
    }
  }

 private:
  static cudaStream_t stream_of(int32_t device) {
    void* stream = nullptr;
    // Not Stream::nativeHandle() of the stable ABI, which needs torch 2.13.
    if (aoti_torch_get_current_cuda_stream(device, &stream) != 0) {
      throw std::runtime_error("ddit_rt: torch has no current CUDA stream for device " +
                               std::to_string(device));
    }
    return static_cast<cudaStream_t>(stream);
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline unsigned grid_size(int64_t blocks) {
  if (blocks > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error("ddit_rt: tensor too large, it needs " + std::to_string(blocks) +
                             " blocks of one kernel");
  }
  return static_cast<unsigned>(blocks);
}

}  // namespace ddit_rt
