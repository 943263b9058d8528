// What this build can do, and what the machine offers. Free of torch.
#pragma once

#include <string>

namespace ddit_rt {

struct BuildInfo {
  std::string version;
  std::string compiler;
  bool cuda;                       // built with the CUDA kernels
  std::string cuda_version;        // of the toolkit, "13.0"; empty without CUDA
  std::string cuda_architectures;  // "80-real 90-real 100-real 120"; empty without CUDA
};

BuildInfo build_info();

struct CudaStatus {
  bool available = false;  // at least one device can be used
  int device_count = 0;
  int driver_version = 0;   // newest CUDA version that the driver supports, 13000 for 13.0; 0: none
  int runtime_version = 0;  // of the linked CUDA runtime; 0 without CUDA
  std::string reason;       // why it is not available; empty when it is
};

// Never throws, whatever the machine lacks.
CudaStatus cuda_status() noexcept;

}  // namespace ddit_rt
