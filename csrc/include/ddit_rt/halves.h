// 16-bit floats to float32 by integer arithmetic: vectorises without any instruction-set extension.
#pragma once

#include <stdint.h>
#include <string.h>

#include "ddit_rt/macros.h"

namespace ddit_rt {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

DDIT_RT_HD float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

DDIT_RT_HD float to_float(float x) { return x; }

DDIT_RT_HD float to_float(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }

// Moves exponent and mantissa into place, then multiplies by 2^112 to correct the exponent's bias:
// exact, for subnormal numbers too. Infinity and NaN need the exponent's upper bits set.
DDIT_RT_HD float to_float(Float16 x) {
  const uint32_t magnitude = (x.bits & 0x7FFFu);
  const float scaled = bits_to_float(magnitude << 13) * bits_to_float((127u + 112u) << 23);
  uint32_t bits;
  memcpy(&bits, &scaled, sizeof bits);
  bits |= magnitude >= 0x7C00u ? 0x7F800000u : 0u;
  bits |= (x.bits & 0x8000u) << 16;
  return bits_to_float(bits);
}

}  // namespace ddit_rt
