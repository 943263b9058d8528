// Vectors of floats of any length, which the compiler makes of the registers that there are.
#pragma once

#include <cstdint>

#include "ddit_rt/macros.h"

namespace ddit_rt {

template <int kLanes>
struct Vector {
  typedef float Floats __attribute__((vector_size(kLanes * sizeof(float)), may_alias, aligned(4)));
  typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(float))));
};
template <int kLanes>
using Floats = typename Vector<kLanes>::Floats;
template <int kLanes>
using Ints = typename Vector<kLanes>::Ints;

template <int kLanes>
DDIT_RT_HD Floats<kLanes>& at(float* values) {
  return *reinterpret_cast<Floats<kLanes>*>(values);
}

template <int kLanes>
DDIT_RT_HD const Floats<kLanes>& at(const float* values) {
  return *reinterpret_cast<const Floats<kLanes>*>(values);
}

}  // namespace ddit_rt
