// A CUDA runtime without a GPU: keeps the books of graphs, memory and events, enforces the rules
// that CUDA documents, and executes kernels through the emulator. Work runs at once, in the
// caller's thread, or, where a test asks for it, when it is told to or was asked about often
// enough.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

namespace mock {

struct Grid {
  unsigned x, y, z;
};

// How to run one kernel: sizes of its arguments, which a launch copies, and the call.
struct KernelEntry {
  std::string name;
  std::vector<size_t> argument_sizes;
  std::function<void(Grid blocks, Grid threads, void* const* arguments)> run;
};

void register_kernel(const void* function, KernelEntry entry);

// step_kernels.cpp
void register_step_kernels();
void set_order(unsigned seed);  // of blocks and threads; 0: ascending

// Called by kernels.
void set_conditional(unsigned long long handle, unsigned value);

}  // namespace mock
