// Runs CUDA kernels on the CPU, one block at a time, every thread of a block as a fiber.
//
// Slow and sequential, but it executes the kernel's own source: indexing, barriers, warp shuffles
// and atomics are those of the shipped code. Blocks, and the threads of a block, can be taken in
// any order, so that a result that depends on it shows. What it cannot show: races between blocks,
// memory ordering, speed.
#pragma once

#include <setjmp.h>
#include <time.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <numeric>
#include <random>
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

// A context starts a thread on a stack of its own; from then on it is left and entered by jumps,
// which unlike swapcontext() make no system call.
struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started;
  std::vector<char> stack;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<bool> finished;
  std::vector<Barrier> warps;
  std::vector<int> exchange;  // one word per thread for shuffles
  Barrier all;
  int live = 0;
  int current = 0;
  bool moved = false;  // a thread has reached a barrier or its end
};

inline unsigned order = 0;  // 0: blocks and threads in ascending order; else the seed of another
inline Block block;
inline jmp_buf scheduler;
inline std::function<void()> kernel;

// Leaves the current thread until the scheduler comes back to it.
inline void yield() {
  if (_setjmp(block.fibers[block.current].resume) == 0) _longjmp(scheduler, 1);
}

// Runs the current thread until it yields.
inline void resume() {
  if (_setjmp(scheduler) != 0) return;
  Fiber& fiber = block.fibers[block.current];
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void wait(Barrier& barrier, int expected) {
  block.moved = true;
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
  block.moved = true;
  block.finished[block.current] = true;
  --block.live;
  yield();
}

inline void set_thread(int index) {
  block.current = index;
  threadIdx = {index % blockDim.x, index / blockDim.x % blockDim.y,
               index / (blockDim.x * blockDim.y)};
}

// 0 to count - 1, in the order that `order` asks for.
inline std::vector<int> sequence(int count) {
  std::vector<int> result(count);
  std::iota(result.begin(), result.end(), 0);
  if (order != 0) std::shuffle(result.begin(), result.end(), std::mt19937(order));
  return result;
}

inline void prepare_block(int threads) {
  // Stacks are kept: to make them anew takes longer than most kernels.
  while (block.fibers.size() < static_cast<size_t>(threads)) {
    block.fibers.emplace_back().stack.resize(kStackBytes);
  }
  block.finished.assign(threads, false);
  block.warps.assign((threads + kWarp - 1) / kWarp, {});
  block.exchange.assign(threads, 0);
  block.all = {};
  block.live = threads;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.started = false;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
  }
}

inline void run_block(int threads) {
  prepare_block(threads);
  const std::vector<int> turns = sequence(threads);
  while (block.live > 0) {
    block.moved = false;
    for (const int i : turns) {
      if (block.finished[i]) continue;
      set_thread(i);
      resume();
    }
    if (!block.moved) throw std::logic_error("a barrier that not every thread reaches");
  }
}

inline void launch(dim3 grid, dim3 threads, std::function<void()> body) {
  gridDim = grid;
  blockDim = threads;
  kernel = std::move(body);
  for (const int i : sequence(static_cast<int>(grid.x * grid.y * grid.z))) {
    const auto at = static_cast<unsigned>(i);
    blockIdx = {at % grid.x, at / grid.x % grid.y, at / (grid.x * grid.y)};
    run_block(static_cast<int>(threads.x * threads.y * threads.z));
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
