#include "runtime/step_control.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <numeric>
#include <thread>

#include "ddit_rt/solver.h"
#include "runtime/cuda_call.h"

namespace ddit_rt {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Between two looks at what the device has done: at first none, then short ones.
void pause(Clock::time_point start) {
  constexpr double kSpin = 200e-6;
  constexpr auto kPause = std::chrono::microseconds(50);
  if (seconds_since(start) > kSpin) std::this_thread::sleep_for(kPause);
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument("ddit_rt: " + message);
}

// The host's view of mapped memory: every read goes to memory.
const volatile Progress& seen(const Progress* progress) { return *progress; }

PatchShape base_shape(const LoopSpec& spec) {
  int64_t divisor = 0;
  for (const int64_t size : spec.sizes) divisor = std::gcd(divisor, size);
  return {spec.batch,  spec.channels, spec.frames,
          spec.height, spec.width,    divisor == 0 ? 1 : base_edge(divisor)};
}

void check_sizes(const LoopSpec& spec) {
  require(
      spec.batch > 0 && spec.channels > 0 && spec.frames > 0 && spec.height > 0 && spec.width > 0,
      "a latent of " + std::to_string(spec.batch) + " x " + std::to_string(spec.channels) + " x " +
          std::to_string(spec.frames) + " x " + std::to_string(spec.height) + " x " +
          std::to_string(spec.width) + ", expected positive sizes");
  require(spec.sizes.size() <= kMaxSizes, std::to_string(spec.sizes.size()) +
                                              " patch sizes, expected at most " +
                                              std::to_string(kMaxSizes));
  for (const int64_t size : spec.sizes) {
    require(size > 0, "patch size " + std::to_string(size) + ", expected at least 1");
    const PatchShape shape{spec.batch, spec.channels, spec.frames, spec.height, spec.width, size};
    require(shape.fewest_values() > 1,
            "a patch of size " + std::to_string(size) +
                " holds a single value, which has no standard deviation: use another patch size");
  }
}

void check_spec(const LoopSpec& spec) {
  check_sizes(spec);
  require(
      spec.velocity_slots >= 1 && spec.velocity_slots <= kTerms,
      std::to_string(spec.velocity_slots) + " velocities, expected 1 to " + std::to_string(kTerms));
  require(spec.capacity > 0, "tables for no step");
  const uintptr_t needed[] = {spec.latents, spec.past,  spec.velocity, spec.coefficients,
                              spec.forced,  spec.state, spec.settings};
  for (const uintptr_t address : needed) require(address != 0, "a buffer has no address");
  require(spec.velocity_slots == 1 || spec.past_velocities != 0,
          "a multistep solver, but no buffer for past velocities");
  require(spec.sizes.empty() ||
              (spec.thresholds != 0 && spec.moments != 0 && spec.keys != 0 && spec.scores != 0),
          "patch sizes to score, but no buffers for it");
  require(spec.increments == 0 || (spec.signal != 0 && spec.cache != 0 && spec.cache_rows > 0),
          "a step cache, but no buffers for its signal and memory");
  require(spec.stage_count >= 1 && (spec.stages != 0 || spec.stage_count == 1),
          std::to_string(spec.stage_count) + " stages, but no table that tells each step's");
}

// Four values at a time where sizes and addresses allow it.
int update_width(const LoopSpec& spec, const LoopParams& params) {
  const int64_t item = spec.velocity_type == VelocityType::kFloat32 ? 4 : 2;
  const bool aligned = spec.latents % 16 == 0 && spec.past % 16 == 0 &&
                       spec.velocity % (4 * item) == 0 && spec.past_velocities % 16 == 0;
  const bool divides =
      spec.sizes.empty() ? params.count() % 4 == 0 : spec.width % 4 == 0 && params.columns % 4 == 0;
  return aligned && divides ? 4 : 1;
}

LoopParams loop_params(const LoopSpec& spec) {
  check_spec(spec);
  LoopParams params{};
  params.shape = base_shape(spec);
  params.sizes = static_cast<int32_t>(spec.sizes.size());
  params.velocity_slots = spec.velocity_slots;
  params.cache_rows = spec.cache_rows;
  params.stage_count = spec.stage_count;
  const int edge = static_cast<int>(params.shape.patch);
  params.columns = kTileColumns / edge * edge;
  params.tiles = static_cast<int32_t>((spec.width + params.columns - 1) / params.columns);
  for (int i = 0; i < params.sizes; ++i) params.factor[i] = static_cast<int>(spec.sizes[i] / edge);
  params.latents = pointer<float>(spec.latents);
  params.past = pointer<float>(spec.past);
  params.velocity = pointer<const void>(spec.velocity);
  params.past_velocities = pointer<float>(spec.past_velocities);
  params.coefficients = pointer<const float>(spec.coefficients);
  params.forced = pointer<const int32_t>(spec.forced);
  params.stages = pointer<const int32_t>(spec.stages);
  params.thresholds = pointer<const float>(spec.thresholds);
  params.mean = pointer<float>(spec.moments);
  params.m2 = params.mean + (params.sizes > 0 ? params.shape.batch * params.shape.tokens() : 0);
  params.keys = pointer<uint32_t>(spec.keys);
  params.scores = pointer<float>(spec.scores);
  params.increments = pointer<const float>(spec.increments);
  params.signal = pointer<const float>(spec.signal);
  params.cache = {pointer<float>(spec.cache)};
  params.state = pointer<LoopState>(spec.state);
  params.settings = pointer<const LoopSettings>(spec.settings);
  return params;
}

CacheReason cache_reason(const StepRow& row) {
  return static_cast<CacheReason>(static_cast<int32_t>(row.cache[0]));
}

void launch_kernel(const Kernel& kernel, void** arguments, cudaStream_t stream) {
  DDIT_RT_CUDA(cudaLaunchKernel(kernel.function, dim3(kernel.grid_x, kernel.grid_y),
                                dim3(kernel.threads), arguments, 0, stream));
}

}  // namespace

ScratchSizes scratch_sizes(const LoopSpec& spec) {
  check_sizes(spec);
  if (spec.sizes.empty()) return {};
  const int64_t patches = spec.batch * base_shape(spec).tokens();
  return {2 * patches, static_cast<int64_t>(spec.sizes.size()) * patches};
}

StepControl::StepControl(const LoopSpec& spec, int device, double patience)
    : device_(device), capacity_(spec.capacity), patience_(patience), params_(loop_params(spec)) {
  kernels_ = step_kernels(params_, spec.velocity_type, update_width(spec, params_));
  const DeviceScope scope(device_);
  void* host = nullptr;
  DDIT_RT_CUDA(cudaHostAlloc(&host, progress_bytes(capacity_), cudaHostAllocMapped));
  progress_ = static_cast<Progress*>(host);
  std::memset(host, 0, progress_bytes(capacity_));
  try {
    void* mapped = nullptr;
    DDIT_RT_CUDA(cudaHostGetDevicePointer(&mapped, host, 0));
    params_.progress = static_cast<Progress*>(mapped);
    DDIT_RT_CUDA(cudaEventCreateWithFlags(&launched_, cudaEventDisableTiming));
  } catch (...) {
    cudaFreeHost(host);
    throw;
  }
}

StepControl::~StepControl() {
  // Errors have nowhere to go from here; a failed device has failed its run already.
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(device_);
  if (wait_idle()) {
    cudaEventDestroy(launched_);
    cudaFreeHost(progress_);
  }
  cudaSetDevice(before);
  cudaGetLastError();
}

void StepControl::launch(const Kernel& kernel, void** arguments, cudaStream_t stream) {
  const DeviceScope scope(device_);
  launch_kernel(kernel, arguments, stream);
  note_launch(stream);
}

void StepControl::begin(cudaStream_t stream) {
  const DeviceScope scope(device_);
  void* arguments[] = {&params_};
  begin_run([&] { launch_kernel(kernels_.begin, arguments, stream); });
  note_launch(stream);
}

void StepControl::decide(cudaStream_t stream) {
  Switches none;
  void* arguments[] = {&params_, &none};
  launch(kernels_.decide, arguments, stream);
}

void StepControl::update(cudaStream_t stream) {
  void* arguments[] = {&params_};
  launch(kernels_.update, arguments, stream);
}

void StepControl::finish(cudaStream_t stream) {
  void* arguments[] = {&params_};
  launch(kernels_.finish, arguments, stream);
}

void StepControl::begin_run(const std::function<void()>& launch) {
  ++generation_;  // first: a wish to stop that comes while this launches is meant for this run
  try {
    launch();
  } catch (...) {
    --generation_;
    throw;
  }
}

void StepControl::note_launch(cudaStream_t stream) {
  DDIT_RT_CUDA(cudaEventRecord(launched_, stream));
}

bool StepControl::wait_idle() noexcept {
  const auto start = Clock::now();
  while (cudaEventQuery(launched_) == cudaErrorNotReady) {
    if (abandoned_ || seconds_since(start) >= patience_) {
      abandoned_ = true;  // one wait is enough, however many graphs are destroyed
      return false;
    }
    pause(start);
  }
  return true;  // or the device has failed, and runs nothing
}

void StepControl::cancel() { const_cast<volatile Progress*>(progress_)->cancel = generation_; }

bool StepControl::is_current() const { return seen(progress_).generation == generation_; }

RunProgress StepControl::progress() const {
  RunProgress result;
  if (generation_ == 0 || !is_current()) return result;
  const volatile Progress& now = seen(progress_);
  result.finished = now.finished == generation_;
  std::atomic_thread_fence(std::memory_order_acquire);
  result.decided = now.decided;
  result.cancelled = result.finished && now.stopped != 0;
  result.nonfinite = result.finished && now.nonfinite != 0;
  std::atomic_thread_fence(std::memory_order_acquire);
  return result;
}

RunProgress StepControl::wait(int64_t decided, double seconds) const {
  const auto start = Clock::now();
  while (true) {
    const RunProgress now = progress();
    if (now.finished || now.decided > decided || seconds_since(start) >= seconds) {
      if (!now.finished) check_device();
      return now;
    }
    pause(start);
  }
}

void StepControl::check_device() const {
  const DeviceScope scope(device_);
  const cudaError_t error = cudaEventQuery(launched_);
  if (error != cudaErrorNotReady) check_cuda(error, "the step loop");
  cudaGetLastError();
}

const StepRow& StepControl::decided_row(int64_t step) const {
  require(step >= 0 && step < progress().decided,
          "step " + std::to_string(step) + " is not decided yet");
  return progress_->rows()[step];
}

int StepControl::bucket(int64_t step) const {
  return static_cast<int>(decided_row(step).record[0]);
}

int StepControl::branch(int64_t step) const {
  const StepRow& row = decided_row(step);
  const bool reused = cache_reason(row) == CacheReason::kReused;
  return static_cast<int>(row.record[0]) + (reused ? params_.sizes + 1 : 0);
}

std::vector<StepRecord> StepControl::records() const {
  std::vector<StepRecord> result;
  const int64_t steps = progress().decided;
  for (int64_t k = 0; k < steps && k < capacity_; ++k) {
    const StepRow& row = progress_->rows()[k];
    result.push_back({row.time_ns,
                      {row.record, row.record + kRecordHeader + params_.sizes},
                      cache_reason(row),
                      row.cache[1]});
  }
  return result;
}

uint64_t StepControl::end_ns() const { return seen(progress_).end_ns; }

}  // namespace ddit_rt
