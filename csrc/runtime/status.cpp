#include "runtime/status.h"

#ifdef DDIT_RT_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace ddit_rt {

BuildInfo build_info() {
  BuildInfo info{DDIT_RT_VERSION, DDIT_RT_COMPILER, false, "", DDIT_RT_CUDA_ARCHITECTURES};
#ifdef DDIT_RT_WITH_CUDA
  info.cuda = true;
  info.cuda_version =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
#endif
  return info;
}

CudaStatus cuda_status() noexcept {
  CudaStatus status;
#ifdef DDIT_RT_WITH_CUDA
  // A failed call leaves its output alone; cudaGetLastError clears the error it left behind.
  cudaRuntimeGetVersion(&status.runtime_version);
  cudaDriverGetVersion(&status.driver_version);
  const cudaError_t error = cudaGetDeviceCount(&status.device_count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    status.device_count = 0;
    status.reason = cudaGetErrorString(error);
  }
  status.available = status.device_count > 0;
  if (!status.available && status.reason.empty()) status.reason = "no CUDA device";
#else
  status.reason = "built without CUDA";
#endif
  return status;
}

}  // namespace ddit_rt
