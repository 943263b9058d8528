// Checked CUDA runtime calls, and the device that they speak to.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace ddit_rt {

// A call that CUDA refused. `reason` names the call and has CUDA's words for the error.
class CudaError : public std::runtime_error {
 public:
  CudaError(const std::string& call, cudaError_t error, const std::string& details = "")
      : CudaError(call + " failed: " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error) +
                  details) {}

  const std::string& reason() const { return reason_; }

 private:
  explicit CudaError(const std::string& reason)
      : std::runtime_error("ddit_rt: " + reason), reason_(reason) {}

  std::string reason_;
};

inline void check_cuda(cudaError_t error, const std::string& call,
                       const std::string& details = "") {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // not for the next call to report
  throw CudaError(call, error, details);
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
