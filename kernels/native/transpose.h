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

inline constexpr int64_t kColumns = 4;

// The kColumns columns from `column` on of kLanes rows in memory. Pieces of rows are put in their lanes as they are loaded, so that
// the shuffles of half a transposition are left.
inline void load_columns(const float* const (&rows)[kLanes], int64_t column, Vec (&columns)[kColumns]) {
#if defined(__AVX512F__)
  __m512 pieces[kColumns];
  for (int i = 0; i < kColumns; ++i) {
    const auto piece = [&](int quarter) { return _mm_loadu_ps(rows[i + 4 * quarter] + column); };
    pieces[i] = _mm512_castps128_ps512(piece(0));
    pieces[i] = _mm512_mask_broadcast_f32x4(pieces[i], 0x00f0, piece(1));
    pieces[i] = _mm512_mask_broadcast_f32x4(pieces[i], 0x0f00, piece(2));
    pieces[i] = _mm512_mask_broadcast_f32x4(pieces[i], 0xf000, piece(3));
  }
  const auto low = [](__m512 a, __m512 b) { return _mm512_castps_pd(_mm512_unpacklo_ps(a, b)); };
  const auto high = [](__m512 a, __m512 b) { return _mm512_castps_pd(_mm512_unpackhi_ps(a, b)); };
  const __m512d a = low(pieces[0], pieces[1]), b = low(pieces[2], pieces[3]);
  const __m512d c = high(pieces[0], pieces[1]), d = high(pieces[2], pieces[3]);
  columns[0] = reinterpret_cast<Vec>(_mm512_unpacklo_pd(a, b));
  columns[1] = reinterpret_cast<Vec>(_mm512_unpackhi_pd(a, b));
  columns[2] = reinterpret_cast<Vec>(_mm512_unpacklo_pd(c, d));
  columns[3] = reinterpret_cast<Vec>(_mm512_unpackhi_pd(c, d));
#else
  for (int i = 0; i < kColumns; ++i) {
    for (int t = 0; t < kLanes; ++t) {
      columns[i][t] = rows[t][column + i];
    }
  }
#endif
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
