// The functions of the CUDA runtime that csrc/runtime calls: devices, memory, events, kernels.
#include "mock_cudart.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "mock_state.h"

namespace mock {
namespace {

Event* event_of(cudaEvent_t event, const char* call) {
  const auto found = state().events.find(event);
  if (found != state().events.end()) return &found->second;
  violate(std::string(call) + " of no event");
  return nullptr;
}

}  // namespace

State& state() {
  static State instance;
  return instance;
}

void violate(const std::string& rule) {
  if (state().violation.empty()) state().violation = rule;
}

thread_local int current_device = 0;

// Counts a call; the error that the test asked for, if it did.
cudaError_t enter(const char* name) {
  ++state().calls[name];
  const auto found = state().failures.find(name);
  if (found == state().failures.end()) return cudaSuccess;
  Failure& failure = found->second;
  if (failure.successes > 0) {
    --failure.successes;
    return cudaSuccess;
  }
  if (failure.times == 0) return cudaSuccess;
  if (failure.times > 0) --failure.times;
  return failure.error;
}

void note_use(uint64_t number, const std::function<bool(void*)>& uses_address) {
  const std::lock_guard<std::mutex> lock(state().books);
  state().launch_devices.insert(current_device);
  for (auto& [address, last] : state().pinned) {
    if (uses_address(address)) last = number;
  }
}

void register_kernel(const void* function, KernelEntry entry) {
  state().kernels[function] = std::move(entry);
}

void set_conditional(unsigned long long id, unsigned value) {
  const std::lock_guard<std::mutex> lock(state().books);
  const auto found = state().handles.find(id);
  if (found == state().handles.end() || !found->second.running) {
    return violate("a kernel set a handle whose graph is not running");
  }
  found->second.value = value;
  found->second.is_set = true;
}

}  // namespace mock

using namespace mock;

extern "C" {

cudaError_t cudaDriverGetVersion(int* version) {
  *version = state().driver;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= state().devices) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorName(cudaError_t error) {
  if (error == cudaErrorInvalidValue) return "cudaErrorInvalidValue";
  if (error == cudaErrorMemoryAllocation) return "cudaErrorMemoryAllocation";
  return "mockError";
}

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidValue) return "invalid argument";
  if (error == cudaErrorMemoryAllocation) return "out of memory";
  return "the mock refused";
}

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  MOCK_ENTER(cudaHostAlloc);
  *pointer = std::malloc(bytes);
  state().pinned[*pointer] = 0;
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* pointer) {
  MOCK_ENTER(cudaFreeHost);
  const auto found = state().pinned.find(pointer);
  if (found == state().pinned.end()) {
    violate("cudaFreeHost of memory that is not allocated");
    return cudaErrorInvalidValue;
  }
  if (found->second > state().awaited) violate("cudaFreeHost of memory that a launch may use");
  state().pinned.erase(found);
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  MOCK_ENTER(cudaHostGetDevicePointer);
  *device = host;
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  MOCK_ENTER(cudaEventCreateWithFlags);
  void* token = std::malloc(1);
  state().events[token] = {current_device, 0};
  *event = static_cast<cudaEvent_t>(token);
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  MOCK_ENTER(cudaEventDestroy);
  if (event_of(event, "cudaEventDestroy") == nullptr) return cudaErrorInvalidValue;
  state().events.erase(event);
  std::free(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  MOCK_ENTER(cudaEventRecord);
  Event* const target = event_of(event, "cudaEventRecord");
  if (target == nullptr) return cudaErrorInvalidValue;
  if (target->device != current_device) violate("cudaEventRecord on another device");
  target->launch = last_launch;
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  uint64_t number = 0;
  bool is_time = false;
  {
    MOCK_ENTER(cudaEventQuery);
    const Event* const target = event_of(event, "cudaEventQuery");
    if (target == nullptr) return cudaErrorInvalidValue;
    number = target->launch;
    is_time = number > state().finished && state().queries > 0 && --state().queries == 0;
  }
  if (is_time) run_queue(number);
  const std::lock_guard<std::mutex> lock(state().books);
  if (number > state().finished) return cudaErrorNotReady;
  state().awaited = std::max(state().awaited, number);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 blocks, dim3 threads, void** arguments,
                             size_t, cudaStream_t) {
  Launch launch{function, {blocks.x, blocks.y, blocks.z}, {threads.x, threads.y, threads.z}, {}};
  {
    MOCK_ENTER(cudaLaunchKernel);
    const auto found = state().kernels.find(function);
    if (found == state().kernels.end()) return cudaErrorInvalidDeviceFunction;
    const std::vector<size_t>& sizes = found->second.argument_sizes;
    for (size_t i = 0; i < sizes.size(); ++i) {
      const char* const bytes = static_cast<const char*>(arguments[i]);
      launch.arguments.emplace_back(bytes, bytes + sizes[i]);
    }
  }
  const uint64_t number = submit([launch] { run(launch); });
  note_use(number, [&launch](void* address) { return uses(launch, address); });
  return cudaSuccess;
}

}  // extern "C"
