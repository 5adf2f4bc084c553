// Transposition of a square of vectors in registers.
#pragma once

#include <cstdint>
#include <utility>

#include "vectors.h"

namespace padst {

// One lane of a shuffle of two vectors (a: 0 … kLanes - 1, b: from kLanes on) that exchanges blocks of kStep lanes.
template <int kStep, bool kHigh>
constexpr int exchanged_lane(int lane) {
  if (kHigh) {
    return (lane & kStep) != 0 ? kLanes + lane : lane + kStep;
  }
  return (lane & kStep) != 0 ? kLanes + lane - kStep : lane;
}

template <int kStep, bool kHigh, int... kLane>
inline Vec exchange(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, exchanged_lane<kStep, kHigh>(kLane)...);
#else
  return __builtin_shuffle(a, b, Lanes{exchanged_lane<kStep, kHigh>(kLane)...});
#endif
}

// Exchanges the off-diagonal blocks of kStep lanes, then those inside each half.
template <int kStep = kLanes / 2>
inline void transpose(Vec (&rows)[kLanes]) {
  if constexpr (kStep > 0) {
    constexpr auto kSequence = std::make_integer_sequence<int, kLanes>{};
    for (int block = 0; block < kLanes; block += 2 * kStep) {
      for (int i = block; i < block + kStep; ++i) {
        const Vec a = rows[i], b = rows[i + kStep];
        rows[i] = exchange<kStep, false>(a, b, kSequence);
        rows[i + kStep] = exchange<kStep, true>(a, b, kSequence);
      }
    }
    transpose<kStep / 2>(rows);
  }
}

// Lane i of the result is the sum of the lanes of rows[i]; half the work of a transposition and its sum. Overwrites rows.
template <int kStep = kLanes / 2>
inline Vec sum_lanes(Vec (&rows)[kLanes]) {
  if constexpr (kStep > 0) {
    constexpr auto kSequence = std::make_integer_sequence<int, kLanes>{};
    for (int i = 0; i < kStep; ++i) {
      const Vec a = rows[i], b = rows[i + kStep];
      rows[i] = exchange<kStep, false>(a, b, kSequence) + exchange<kStep, true>(a, b, kSequence);
    }
    return sum_lanes<kStep / 2>(rows);
  } else {
    return rows[0];
  }
}

}  // namespace padst
