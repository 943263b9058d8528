// Stands in for libtorch_cuda.so when `_ops_cuda` is linked against a CPU build of torch, which has
// no such file. Never shipped, never run: at load time torch's own library provides the function.
#include <cstdint>

extern "C" __attribute__((visibility("default"))) int32_t
aoti_torch_get_current_cuda_stream(int32_t /*device_index*/, void** /*stream*/) {
  return 1;
}
