// What lets one header serve g++ and nvcc.
#pragma once

#ifdef __CUDACC__
#define DDIT_RT_HD __host__ __device__ __forceinline__
#else
// Always inlined, so that a caller built for a wider instruction set vectorises it too.
#define DDIT_RT_HD inline __attribute__((always_inline))
#endif

// Loop kernels of the CPU ops are built three times and picked when the library is loaded, so that
// one wheel runs on any x86-64 machine and still uses AVX-512 where it is there. The build turns
// multiply-add contraction off, so that all three give the same bits.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__CUDACC__) && !defined(__clang__)
#define DDIT_RT_CPU_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DDIT_RT_CPU_CLONES
#endif
