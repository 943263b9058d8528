// Finite differences of the newest latents along the denoising trajectory (DDiT, section 3.2).
#pragma once

#include "ddit_rt/macros.h"

namespace ddit_rt {

inline constexpr int kMaxOrder = 3;       // highest difference that the patch scheduler uses
inline constexpr int kHistoryLength = 4;  // latents that it needs, and so the length of the ring

// z0 is the newest latent. The products are exact or rounded on their own, never fused with the
// sum: CPU and GPU must give the same bits.

// D1 = z0 - z1
DDIT_RT_HD float first_difference(float z0, float z1) { return z0 - z1; }

// D2 = z0 - 2 z1 + z2, as a difference of differences: for close latents those are exact.
DDIT_RT_HD float second_difference(float z0, float z1, float z2) { return (z0 - z1) - (z1 - z2); }

// D3 = z0 - 3 z1 + 3 z2 - z3. Beware of `d0 + d1 - 2 * (z0 - z2) / 2`, which is always zero.
DDIT_RT_HD float third_difference(float z0, float z1, float z2, float z3) {
  return (z0 - z3) + 3.0f * (z2 - z1);
}

template <int kOrder>
DDIT_RT_HD float difference(float z0, float z1, float z2, float z3) {
  static_assert(kOrder >= 1 && kOrder <= kMaxOrder);
  if constexpr (kOrder == 1) return first_difference(z0, z1);
  if constexpr (kOrder == 2) return second_difference(z0, z1, z2);
  return third_difference(z0, z1, z2, z3);
}

}  // namespace ddit_rt
