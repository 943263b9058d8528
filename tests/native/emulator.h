// Runs CUDA kernels on the CPU, one block at a time, every thread of a block as a fiber.
//
// Slow and sequential, but it executes the kernel's own source: indexing, barriers, warp shuffles
// and atomics are those of the shipped code. What it cannot show: races between blocks, memory
// ordering, speed.
#pragma once

#include <time.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Inside a function `thread_local` implies `static`, and unlike `static` it may follow `extern`, so
// it serves both static and dynamic shared memory. Blocks run one after the other on one thread.
#define __shared__ thread_local

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kWarp = 32;

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

struct Block {
  std::vector<ucontext_t> fibers;
  std::vector<std::vector<char>> stacks;
  std::vector<bool> finished;
  std::vector<Barrier> warps;
  std::vector<int> exchange;  // one word per thread for shuffles
  Barrier all;
  int live = 0;
  int current = 0;
};

inline Block block;
inline ucontext_t scheduler;
inline std::function<void()> kernel;

inline void yield() { swapcontext(&block.fibers[block.current], &scheduler); }

inline void wait(Barrier& barrier, int expected) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline void enter() {
  kernel();
  block.finished[block.current] = true;
  --block.live;
  yield();
}

inline void set_thread(int index) {
  block.current = index;
  threadIdx = {index % blockDim.x, index / blockDim.x % blockDim.y,
               index / (blockDim.x * blockDim.y)};
}

inline void run_block(int threads) {
  block.fibers.resize(threads);
  block.stacks.resize(threads);
  block.finished.assign(threads, false);
  block.warps.assign((threads + kWarp - 1) / kWarp, {});
  block.exchange.assign(threads, 0);
  block.all = {};
  block.live = threads;
  for (int i = 0; i < threads; ++i) {
    block.stacks[i].resize(kStackBytes);
    getcontext(&block.fibers[i]);
    block.fibers[i].uc_stack.ss_sp = block.stacks[i].data();
    block.fibers[i].uc_stack.ss_size = kStackBytes;
    block.fibers[i].uc_link = &scheduler;
    makecontext(&block.fibers[i], enter, 0);
  }
  while (block.live > 0) {
    for (int i = 0; i < threads; ++i) {
      if (block.finished[i]) continue;
      set_thread(i);
      swapcontext(&scheduler, &block.fibers[i]);
    }
  }
}

inline void launch(dim3 grid, dim3 threads, std::function<void()> body) {
  gridDim = grid;
  blockDim = threads;
  kernel = std::move(body);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block(static_cast<int>(threads.x * threads.y * threads.z));
      }
    }
  }
}

inline Barrier& own_warp() { return block.warps[block.current / kWarp]; }

}  // namespace emulator

// Threads that have returned no longer take part, as on the GPU.
inline void __syncthreads() { emulator::wait(emulator::block.all, emulator::block.live); }

inline void __syncwarp() { emulator::wait(emulator::own_warp(), emulator::kWarp); }

inline int __shfl_up_sync(unsigned, int value, int offset) {
  auto& block = emulator::block;
  const int lane = block.current % emulator::kWarp;
  block.exchange[block.current] = value;
  __syncwarp();
  const int result = lane >= offset ? block.exchange[block.current - offset] : value;
  __syncwarp();
  return result;
}

template <typename T>
inline T atomicAdd(T* target, T value) {
  const T before = *target;
  *target += value;
  return before;
}

// One block runs at a time, so memory is always in order.
inline void __threadfence() {}
inline void __threadfence_system() {}

inline unsigned atomicMin(unsigned* target, unsigned value) {
  const unsigned before = *target;
  if (value < before) *target = value;
  return before;
}

// What csrc/cuda/loop_control.cuh takes from the GPU itself.
namespace ddit_rt {

inline uint64_t device_time_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
}

void set_conditional(unsigned long long handle, unsigned value);  // whoever links the emulator

}  // namespace ddit_rt
