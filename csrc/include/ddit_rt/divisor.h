// Division by a number that is known when a kernel is launched, as a multiplication and a shift.
#pragma once

#include <stdint.h>

#include "ddit_rt/macros.h"

namespace ddit_rt {

// quotient(n) = n / value, exactly, for 0 <= n < 2^31 and 1 <= value < 2^31.
//
// With s the least integer such that value <= 2^s and m = ceil(2^(31 + s) / value), which is below
// 2^32: m * value = 2^(31 + s) + e with e < 2^s, so n * m / 2^(31 + s) exceeds n / value by
// n * e / (value * 2^(31 + s)) < 1 / value, too little to reach the next integer. (Granlund and
// Montgomery, Division by Invariant Integers using Multiplication, 1994.)
struct Divisor {
  uint32_t value = 1;
  uint32_t multiplier = 1u << 31;
  int32_t shift = 31;

  Divisor() = default;

  explicit Divisor(int64_t divisor) : value(static_cast<uint32_t>(divisor)) {
    while ((int64_t{1} << (shift - 31)) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + value - 1) / value);
  }

  DDIT_RT_HD uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>(uint64_t{n} * multiplier >> shift);
  }

  // quotient(n) must be given, because who needs a remainder needs it too.
  DDIT_RT_HD uint32_t remainder(uint32_t n, uint32_t quotient) const {
    return n - quotient * value;
  }
};

}  // namespace ddit_rt
