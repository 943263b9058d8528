// Count, mean and sum of squared deviations of a set of values, and how two sets merge.
#pragma once

#include <math.h>

#include "ddit_rt/macros.h"

namespace ddit_rt {

struct Moments {
  float count = 0.0f;
  float mean = 0.0f;
  float m2 = 0.0f;  // sum of (x - mean)^2
};

// Welford (1962): one more value, without the cancellation of sum(x^2) - sum(x)^2 / n.
DDIT_RT_HD Moments add(Moments a, float x) {
  const float count = a.count + 1.0f;
  const float delta = x - a.mean;
  const float mean = a.mean + delta / count;
  return {count, mean, a.m2 + delta * (x - mean)};
}

// Chan, Golub, LeVeque (1979): the moments of the union of two disjoint sets.
DDIT_RT_HD Moments merge(Moments a, Moments b) {
  const float count = a.count + b.count;
  if (count == 0.0f) return a;
  const float delta = b.mean - a.mean;
  const float share = b.count / count;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * (a.count * share)};
}

// Standard deviation with Bessel's correction (ddof = 1), as torch.std. NaN for a single value, and
// NaN instead of infinity when the values were not finite or their squares overflow float32.
DDIT_RT_HD float standard_deviation(Moments a) {
  const float variance = a.m2 / (a.count - 1.0f);
  // For an infinite x, (x - x) is NaN; for a finite one it is 0.
  return sqrtf(variance) + (variance - variance);
}

}  // namespace ddit_rt
