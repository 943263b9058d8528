// torch.quantile with linear interpolation: which order statistics it needs, how it blends them.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "ddit_rt/macros.h"

namespace ddit_rt {

// Maps floats to integers in the same order (-NaN < -inf < ... < -0 < +0 < ... < inf < NaN), so
// that an integer sort or radix select orders floats.
DDIT_RT_HD uint32_t ordered_key(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 31) != 0 ? 0xFFFFFFFFu : 0x80000000u);
}

DDIT_RT_HD float from_ordered_key(uint32_t key) {
  const uint32_t bits = key ^ ((key >> 31) != 0 ? 0x80000000u : 0xFFFFFFFFu);
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

DDIT_RT_HD bool is_number(float x) { return x == x; }

struct Rank {
  int64_t below;  // 0-based index into the sorted values
  float weight;   // of the next value, in [0, 1); 0 means that it is not needed
};

// The rank is rounded to float32 as torch.quantile does for float32 input, so the results are
// equal.
DDIT_RT_HD Rank quantile_rank(float quantile, int64_t count) {
  const float rank = quantile * static_cast<float>(count - 1);
  const float below = floorf(rank);
  return {static_cast<int64_t>(below), rank - below};
}

// at::native::lerp (ATen/native/Lerp.h): exact at both ends.
DDIT_RT_HD float lerp(float a, float b, float weight) {
  return weight < 0.5f ? a + weight * (b - a) : b - (b - a) * (1.0f - weight);
}

}  // namespace ddit_rt
