// Checked CUDA runtime calls, and the device that they speak to.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace ddit_rt {

inline void check_cuda(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // not for the next call to report
  throw std::runtime_error(std::string("ddit_rt: ") + call + " failed: " + cudaGetErrorName(error) +
                           ", " + cudaGetErrorString(error));
}

#define DDIT_RT_CUDA(call) ::ddit_rt::check_cuda((call), #call)

// Makes a device current for as long as it lives. This module has a CUDA runtime of its own, which
// does not know which device torch has made current.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    DDIT_RT_CUDA(cudaGetDevice(&before_));
    if (device != before_) DDIT_RT_CUDA(cudaSetDevice(device));
  }
  ~DeviceScope() { cudaSetDevice(before_); }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
};

}  // namespace ddit_rt
