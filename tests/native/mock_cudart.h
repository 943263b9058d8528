// A CUDA runtime without a GPU: keeps the books of graphs, memory and events, enforces the rules
// that the driver documents, and executes kernels through the emulator. Everything runs at once, in
// the caller's thread.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

namespace mock {

struct Grid {
  unsigned x, y, z;
};

// How to run one kernel: sizes of its arguments, which a graph node copies, and the call.
struct KernelEntry {
  std::vector<size_t> argument_sizes;
  std::function<void(Grid blocks, Grid threads, void* const* arguments)> run;
};

void register_kernel(const void* function, KernelEntry entry);
void register_step_kernels();  // step_kernels.cpp

// Called by kernels.
void set_conditional(unsigned long long handle, unsigned value);

}  // namespace mock
