// Python module `ddit_rt._runtime`: what the build contains, what the machine offers, and
// the step loop on CUDA.
#include <pybind11/pybind11.h>

#include "ddit_rt/policy.h"
#include "ddit_rt/step_cache.h"
#include "runtime/status.h"

namespace py = pybind11;

namespace ddit_rt {

#ifdef DDIT_RT_WITH_CUDA
void bind_step(py::module_& m);  // bind_step.cpp
#endif

namespace {

py::dict build_info_dict() {
  const BuildInfo info = build_info();
  py::dict result;
  result["version"] = info.version;
  result["compiler"] = info.compiler;
  result["cuda"] = info.cuda;
  result["cuda_version"] = info.cuda_version;
  result["cuda_architectures"] = info.cuda_architectures;
  return result;
}

py::dict cuda_status_dict() {
  const CudaStatus status = cuda_status();
  py::dict result;
  result["available"] = status.available;
  result["device_count"] = status.device_count;
  result["driver_version"] = status.driver_version;
  result["runtime_version"] = status.runtime_version;
  result["reason"] = status.reason;
  return result;
}

py::dict reason_codes() {
  py::dict codes;
  codes["FORCED"] = static_cast<int>(Reason::kForced);
  codes["BELOW"] = static_cast<int>(Reason::kBelow);
  codes["ABOVE"] = static_cast<int>(Reason::kAbove);
  codes["MONOTONE"] = static_cast<int>(Reason::kMonotone);
  codes["DWELL"] = static_cast<int>(Reason::kDwell);
  codes["NONFINITE"] = static_cast<int>(Reason::kNonfinite);
  return codes;
}

py::dict cache_reason_codes() {
  py::dict codes;
  codes["OFF"] = static_cast<int>(CacheReason::kOff);
  codes["FORCED"] = static_cast<int>(CacheReason::kForced);
  codes["CHANGED"] = static_cast<int>(CacheReason::kChanged);
  codes["ABOVE"] = static_cast<int>(CacheReason::kAbove);
  codes["LIMIT"] = static_cast<int>(CacheReason::kLimit);
  codes["NONFINITE"] = static_cast<int>(CacheReason::kNonfinite);
  codes["REUSED"] = static_cast<int>(CacheReason::kReused);
  return codes;
}

}  // namespace
}  // namespace ddit_rt

PYBIND11_MODULE(_runtime, m) {
  m.doc() = "Native runtime of ddit_rt: build information and the state of CUDA.";
  m.attr("__version__") = ddit_rt::build_info().version;
  m.def("build_info", &ddit_rt::build_info_dict,
        "Version, compiler, and CUDA toolkit and architectures of this build.");
  m.def("cuda_status", &ddit_rt::cuda_status_dict,
        "Whether CUDA can be used, and why not. Never raises.");
  m.def("reason_codes", &ddit_rt::reason_codes,
        "Names and values of the C++ enum `Reason` (policy.h).");
  m.def("cache_reason_codes", &ddit_rt::cache_reason_codes,
        "Names and values of the C++ enum `CacheReason` (step_cache.h).");
#ifdef DDIT_RT_WITH_CUDA
  ddit_rt::bind_step(m);
#endif
}
