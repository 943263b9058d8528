// Vectors of sixteen floats, which the compiler makes of the registers that there are, and what
// products of matrices are made of.
//
// Lanes are rows of one matrix. A tile of a product is up to eight rows of the other by up to three
// vectors of these, summed in registers: each multiply-add reads one broadcast value and a vector
// that several of them share, so that the other matrix is read where it lies, unpacked.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "ddit_rt/macros.h"

namespace ddit_rt {

constexpr int kLanes = 16;
constexpr int kTile = 8;    // rows of a tile: 8 x 3 sums in 32 registers
constexpr int kWidest = 3;  // vectors of a tile

typedef float Floats __attribute__((vector_size(kLanes * sizeof(float)), may_alias, aligned(4)));
typedef float Halves __attribute__((vector_size(kTile * sizeof(float)), may_alias, aligned(4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(float))));

using LaneIndices = std::make_integer_sequence<int, kLanes>;

DDIT_RT_HD Floats& at(float* values) { return *reinterpret_cast<Floats*>(values); }
DDIT_RT_HD const Floats& at(const float* values) {
  return *reinterpret_cast<const Floats*>(values);
}
DDIT_RT_HD Halves& half_at(float* values) { return *reinterpret_cast<Halves*>(values); }
DDIT_RT_HD const Halves& half_at(const float* values) {
  return *reinterpret_cast<const Halves*>(values);
}

// Lane i of the result is lane i ^ kDistance.
template <int kDistance, int... kLane>
DDIT_RT_HD Floats swapped(const Floats& values, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(values, values, (kLane ^ kDistance)...);
}

// Of two rows, kDistance apart, the same two columns, kDistance apart, change places.
template <int kDistance, int... kLane>
DDIT_RT_HD void exchange(Floats& low, Floats& high, std::integer_sequence<int, kLane...>) {
  const Floats before = low;
  low = __builtin_shufflevector(before, high,
                                (kLane & kDistance ? kLanes + (kLane ^ kDistance) : kLane)...);
  high = __builtin_shufflevector(before, high,
                                 (kLane & kDistance ? kLanes + kLane : kLane ^ kDistance)...);
}

// Transposes 8 x 8 values twice: lanes 0 to 7 of the rows, and lanes 8 to 15.
DDIT_RT_HD void transpose(Floats (&rows)[kTile]) {
#pragma GCC unroll 8
  for (int i = 0; i < kTile; i += 2) exchange<1>(rows[i], rows[i + 1], LaneIndices{});
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i)
    if (!(i & 2)) exchange<2>(rows[i], rows[i + 2], LaneIndices{});
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i)
    if (!(i & 4)) exchange<4>(rows[i], rows[i + 4], LaneIndices{});
}

// 2^x for x between -126 and 126, beyond which it stays; NaN stays NaN. 2^f, f in [-1/2, 1/2], is
// a polynomial of degree 6, that of Cephes: relative error 1e-7.
DDIT_RT_HD void exp2_(Floats& x) {
  x = x < -126.0f ? Floats{} - 126.0f : x;
  x = x > 126.0f ? Floats{} + 126.0f : x;
  // Adding 1.5 * 2^23 leaves the nearest integer in the lower bits.
  const Floats shifted = x + 12582912.0f;
  const Floats f = x - (shifted - 12582912.0f);
  Floats power = f * 1.5353362e-4f + 1.3398874e-3f;
  power = power * f + 9.6184373e-3f;
  power = power * f + 5.5503324e-2f;
  power = power * f + 2.4022648e-1f;
  power = power * f + 6.9314720e-1f;
  power = power * f + 1.0f;
  const Ints exponent = (reinterpret_cast<Ints>(shifted) + 127) << 23;
  x = power * reinterpret_cast<Floats>(exponent);
}

// Adds kRows broadcast rows times `count` vectors: out[r] += sum over i of row[r][i] * vectors[i],
// value i of row r at rows[r * row_step + i * step].
template <int kWide, int kRows>
DDIT_RT_HD void multiply_add(const float* rows, int64_t row_step, int64_t step,
                             const float* vectors, int64_t count, Floats (&out)[kRows][kWide]) {
  for (int64_t i = 0; i < count; ++i) {
    Floats shared[kWide];
#pragma GCC unroll 8
    for (int c = 0; c < kWide; ++c) shared[c] = at(vectors + (i * kWide + c) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float value = rows[r * row_step + i * step];
#pragma GCC unroll 8
      for (int c = 0; c < kWide; ++c) out[r][c] += shared[c] * value;
    }
  }
}

// Rows that lie `step` apart, of `width` values `channel` apart.
struct Rows {
  const float* data;
  int64_t step;
  int64_t channel;
};

// `count` rows as the lanes of [width][kWide] vectors; the last row fills the lanes that are left.
template <int kWide>
DDIT_RT_HD void to_lanes(const Rows& from, int64_t count, int64_t width, float scale,
                         float* vectors) {
  const auto row = [&](int lane) {
    return from.data + std::min<int64_t>(lane, count - 1) * from.step;
  };
  int64_t i = 0;
  for (; from.channel == 1 && i + kTile <= width; i += kTile) {
    for (int c = 0; c < kWide; ++c) {
      Floats tile[kTile];
#pragma GCC unroll 8
      for (int r = 0; r < kTile; ++r) {
        const int lane = c * kLanes + r;
        tile[r] = __builtin_shufflevector(half_at(row(lane) + i), half_at(row(lane + kTile) + i), 0,
                                          1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15) *
                  scale;
      }
      transpose(tile);
#pragma GCC unroll 8
      for (int r = 0; r < kTile; ++r) at(vectors + ((i + r) * kWide + c) * kLanes) = tile[r];
    }
  }
  for (; i < width; ++i)
    for (int lane = 0; lane < kWide * kLanes; ++lane)
      vectors[i * kWide * kLanes + lane] = row(lane)[i * from.channel] * scale;
}

// A tile's values of one vector to `count` rows, `step` apart, of eight values each.
DDIT_RT_HD void to_rows(Floats (&tile)[kTile], float* rows, int64_t step, int64_t count) {
  transpose(tile);
#pragma GCC unroll 8
  for (int r = 0; r < kTile; ++r) {
    if (r < count)
      half_at(rows + r * step) = __builtin_shufflevector(tile[r], tile[r], 0, 1, 2, 3, 4, 5, 6, 7);
    if (r + kTile < count)
      half_at(rows + (r + kTile) * step) =
          __builtin_shufflevector(tile[r], tile[r], 8, 9, 10, 11, 12, 13, 14, 15);
  }
}

// Calls `act` with as many vectors as `count` lanes need, as a type.
template <typename Act>
DDIT_RT_HD void with_vectors(int64_t count, const Act& act) {
  if (count > 2 * kLanes)
    act(std::integral_constant<int, 3>{});
  else if (count > kLanes)
    act(std::integral_constant<int, 2>{});
  else
    act(std::integral_constant<int, 1>{});
}

// Uninitialised memory that starts a line of the cache.
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : room_(count * sizeof(float) + kLine), memory_(new char[room_]) {}

  float* data() {
    void* start = memory_.get();
    size_t room = room_;
    return static_cast<float*>(std::align(kLine, room_ - kLine, start, room));
  }

 private:
  static constexpr size_t kLine = 64;
  size_t room_;
  std::unique_ptr<char[]> memory_;
};

}  // namespace ddit_rt
