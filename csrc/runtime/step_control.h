// The step loop of one captured shape: its kernels, and what passes between host and device while
// it runs. Free of torch; the device buffers belong to the caller.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "cuda/step_kernels.h"
#include "ddit_rt/loop.h"

namespace ddit_rt {

// Addresses and sizes of the caller's buffers; see LoopParams. `sizes` are edges in latent pixels.
struct LoopSpec {
  uintptr_t latents = 0, past = 0, velocity = 0, past_velocities = 0;
  uintptr_t coefficients = 0, forced = 0, thresholds = 0, moments = 0, keys = 0, scores = 0;
  uintptr_t state = 0, settings = 0;
  uintptr_t increments = 0, signal = 0, cache = 0;  // of a step cache; 0: there is none
  int cache_rows = 0;
  uintptr_t stages = 0;  // 0: there is one
  int stage_count = 1;
  int64_t batch = 0, channels = 0, frames = 0, height = 0, width = 0;
  std::vector<int64_t> sizes;
  VelocityType velocity_type = VelocityType::kFloat32;
  int velocity_slots = 1;
  int64_t capacity = 0;  // steps that the tables have room for
};

// Floats that `moments` must have room for, and 32-bit words that `keys` must.
struct ScratchSizes {
  int64_t moments = 0, keys = 0;
};
ScratchSizes scratch_sizes(const LoopSpec& spec);

// How far a run has come.
struct RunProgress {
  int64_t decided = 0;  // steps
  bool finished = false;
  bool cancelled = false;
  bool nonfinite = false;
};

struct StepRecord {
  uint64_t time_ns;           // the device's clock at the decision
  std::vector<float> values;  // bucket, reason, run length, a score per size
  CacheReason cache;
  float accumulated;  // change that the step cache compared; NaN if it did not
};

// Launches on a stream never wait. Methods may be called from any thread; runs of one object must
// not overlap. The destructor waits for the last launch, but no longer than `patience` seconds.
class StepControl {
 public:
  StepControl(const LoopSpec& spec, int device, double patience);
  ~StepControl();
  StepControl(const StepControl&) = delete;
  StepControl& operator=(const StepControl&) = delete;

  // The parts of a run: begin, then (decide, a bucket, update) for every step, then finish.
  void begin(cudaStream_t stream);
  void decide(cudaStream_t stream);
  void update(cudaStream_t stream);
  void finish(cudaStream_t stream);

  // Stops the run that was begun last before its next step. Later runs are not affected, whenever
  // the device comes to see it.
  void cancel();

  // Of the run that was begun last. Reads mapped memory: no call to the driver.
  RunProgress progress() const;

  // Waits until more than `decided` steps are decided or the run is over, at most `seconds`. Throws
  // what the device reports if a kernel failed.
  RunProgress wait(int64_t decided, double seconds) const;

  // Throws what the device reports if a kernel failed; does not wait.
  void check_device() const;

  // The device hangs: destructors wait for it no more.
  void abandon() { abandoned_ = true; }

  int bucket(int64_t step) const;           // of a step that is decided
  int branch(int64_t step) const;           // likewise, in its stage: bucket, or S + 1 + i to reuse
  std::vector<StepRecord> records() const;  // of the steps decided so far
  uint64_t end_ns() const;

  // For graphs: `launch` must queue the begin kernel, or throw if it did not; note_launch follows
  // every launch.
  void begin_run(const std::function<void()>& launch);
  void note_launch(cudaStream_t stream);

  // Waits until the last launch is over, and says whether it is. After `false`, the device may
  // still use everything that it was given, and whoever called has to leave it where it is: to free
  // it would pull it from under a kernel, or wait for ever, as cudaFreeHost does.
  bool wait_idle() noexcept;

  int device() const { return device_; }
  const LoopParams& params() const { return params_; }
  const StepKernels& kernels() const { return kernels_; }

  // Graphs that a step chooses among.
  int branches() const { return params_.stage_count * params_.stage_branches(); }

 private:
  const StepRow& decided_row(int64_t step) const;
  void launch(const Kernel& kernel, void** arguments, cudaStream_t stream);
  bool is_current() const;

  const int device_;
  const int64_t capacity_;
  const double patience_;
  LoopParams params_{};
  StepKernels kernels_;
  Progress* progress_ = nullptr;  // mapped
  cudaEvent_t launched_ = nullptr;
  std::atomic<uint32_t> generation_ = 0;  // of the run that was begun last
  std::atomic<bool> abandoned_ = false;
};

}  // namespace ddit_rt
