// Products of a handful of tokens: vectors hold outputs, because most lanes of a vector of tokens would be empty.
//
// Time is then what it takes to read the weights. Each structure adds to sums [tokens, outputs] of float, from inputs of float.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "partition.h"
#include "transpose.h"
#include "unroll.h"
#include "vectors.h"

namespace padst {

inline constexpr int64_t kHandful = 6;  // beyond, a panel of tokens is as fast

// Rows of tokens, `stride` apart.
struct TokenInputs {
  const float* data;
  int64_t stride, tokens;

  const float* row(int64_t token) const {
    return data + token * stride;
  }
};

struct TokenSums {
  float* data;
  int64_t stride;

  float* row(int64_t token) const {
    return data + token * stride;
  }
};

// sums[t, output + j] += weights[j] * x[t, column + j] for j < size and kTokens tokens from `first` on.
template <int kTokens>
inline void add_products(
    const float* weights, int64_t size, const TokenInputs& x, int64_t column, int64_t first, const TokenSums& sums, int64_t output) {
  const auto add = [&](int64_t j, int64_t width) {
    const Vec some = load_some(weights + j, width);
    PADST_UNROLL for (int t = 0; t < kTokens; ++t) {
      float* sum = sums.row(first + t) + output + j;
      store_some(load_some(sum, width) + some * load_some(x.row(first + t) + column + j, width), sum, width);
    }
  };
  int64_t j = std::min(size, round_up(output, kLanes) - output);  // sums are read and written, so they had better be aligned
  if (j > 0) {
    add(0, j);
  }
  for (; j + kLanes <= size; j += kLanes) {
    add(j, kLanes);
  }
  if (j < size) {
    add(j, size - j);
  }
}

// The same for all tokens.
inline void add_products(
    const float* weights, int64_t size, const TokenInputs& x, int64_t column, const TokenSums& sums, int64_t output) {
  int64_t t = 0;
  for (; t + 4 <= x.tokens; t += 4) {
    add_products<4>(weights, size, x, column, t, sums, output);
  }
  for (; t < x.tokens; ++t) {
    add_products<1>(weights, size, x, column, t, sums, output);
  }
}

// sums[t, output + v] += weights[slot, v] * x[t, groups[slot] + offsets[slot]] over all slots, for v < width <= kLanes and kTokens
// tokens from `first` on; weights are `stride` apart from slot to slot.
template <int kTokens>
inline void add_shared_lanes(
    const float* weights, int64_t stride, int64_t width, const uint8_t* offsets, const std::vector<int64_t>& groups,
    const TokenInputs& x, int64_t first, const TokenSums& sums, int64_t output) {
  Vec totals[kTokens];
  PADST_UNROLL for (int t = 0; t < kTokens; ++t) {
    totals[t] = load_some(sums.row(first + t) + output, width);
  }
  for (size_t slot = 0; slot < groups.size(); ++slot, weights += stride) {
    const int64_t column = groups[slot] + offsets[slot];
    const Vec some = load_some(weights, width);
    PADST_UNROLL for (int t = 0; t < kTokens; ++t) {
      totals[t] += some * splat(x.row(first + t)[column]);
    }
  }
  PADST_UNROLL for (int t = 0; t < kTokens; ++t) {
    store_some(totals[t], sums.row(first + t) + output, width);
  }
}

// The same for all tokens and any number of outputs that share their choice.
inline void add_shared_rows(
    const float* weights, int64_t stride, int64_t height, const uint8_t* offsets, const std::vector<int64_t>& groups,
    const TokenInputs& x, const TokenSums& sums, int64_t output) {
  for (int64_t v = 0; v < height; v += kLanes) {
    const int64_t width = std::min<int64_t>(kLanes, height - v);
    int64_t t = 0;
    for (; t + 4 <= x.tokens; t += 4) {
      add_shared_lanes<4>(weights + v, stride, width, offsets, groups, x, t, sums, output + v);
    }
    for (; t < x.tokens; ++t) {
      add_shared_lanes<1>(weights + v, stride, width, offsets, groups, x, t, sums, output + v);
    }
  }
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)

// The most inputs of a group of N:M of which one instruction picks one for every lane; TokenInputs reach so far beyond the last
// group.
inline constexpr int64_t kPickable = 2 * kLanes;

// kLanes rows of S with an N:M choice of their own, kLanes slots at a time: weights and offsets are turned so that a vector holds
// one slot of all rows.
class NmSquare {
 public:
  // Slots `slot` to `slot + count` of the rows `first` on; of rows beyond `last` those of `last`. [rows, slots] in memory.
  NmSquare(const float* values, const uint8_t* offsets, int64_t slots, int64_t first, int64_t last, int64_t slot, int64_t count) {
    alignas(kLanes) uint8_t padded[kLanes][kLanes];
    const float* choices[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) {
      __builtin_prefetch(values + std::min(first + r + kAhead * kLanes, last) * slots + slot);
      const int64_t place = std::min(first + r, last) * slots + slot;
      const uint8_t* choice = offsets + place;
      if (count < kLanes) {  // beyond may lie no memory
        _mm_store_si128(reinterpret_cast<__m128i*>(padded[r]), _mm_maskz_loadu_epi8(first_lanes(count), choice));
        choice = padded[r];
      }
      choices[r] = reinterpret_cast<const float*>(choice);
      weights_[r] = load_some(values + place, count);
    }
    transpose(weights_);
    load_columns(choices, 0, offsets_);
  }

  // Adds `count` slots for kTokens tokens; the inputs of a slot begin at x[t] + groups[slot].
  template <int kTokens, bool kWide>
  void add(const int64_t* groups, int64_t count, const float* const (&x)[kTokens], Vec (&sums)[kTokens]) const {
    for (int64_t quarter = 0; 4 * quarter < count; ++quarter) {
      const __m512i offsets = _mm512_castps_si512(reinterpret_cast<__m512>(offsets_[quarter]));
      const int64_t slot = 4 * quarter;
      add_slot<kTokens, kWide>(offsets, weights_[slot], groups[slot], x, sums);
      if (slot + 1 < count) {
        add_slot<kTokens, kWide>(_mm512_srli_epi32(offsets, 8), weights_[slot + 1], groups[slot + 1], x, sums);
      }
      if (slot + 2 < count) {
        add_slot<kTokens, kWide>(_mm512_srli_epi32(offsets, 16), weights_[slot + 2], groups[slot + 2], x, sums);
      }
      if (slot + 3 < count) {
        add_slot<kTokens, kWide>(_mm512_srli_epi32(offsets, 24), weights_[slot + 3], groups[slot + 3], x, sums);
      }
    }
  }

 private:
  static_assert(kLanes == 4 * kColumns);
  static constexpr int64_t kAhead = 1;  // squares whose weights are fetched in advance: hardware foresees no strides

  // The rows choose from the group by the low bits of `offsets`; instructions ignore the higher ones.
  template <int kTokens, bool kWide>
  static void add_slot(__m512i offsets, Vec weights, int64_t group, const float* const (&x)[kTokens], Vec (&sums)[kTokens]) {
    PADST_UNROLL for (int t = 0; t < kTokens; ++t) {
      const float* inputs = x[t] + group;
      const __m512 low = reinterpret_cast<__m512>(load(inputs));
      if constexpr (kWide) {
        sums[t] += weights *
            reinterpret_cast<Vec>(_mm512_permutex2var_ps(low, offsets, reinterpret_cast<__m512>(load(inputs + kLanes))));
      } else {
        sums[t] += weights * reinterpret_cast<Vec>(_mm512_permutexvar_ps(offsets, low));
      }
    }
  }

  Vec weights_[kLanes];
  Vec offsets_[kColumns];  // four slots in each lane, a byte each
};

// sums[t, row] += kLanes rows of S times kTokens tokens; the inputs of a slot begin at groups[slot].
template <int kTokens, bool kWide>
inline void add_nm_lanes(
    const float* values, const uint8_t* offsets, const std::vector<int64_t>& groups, int64_t row, int64_t last,
    const TokenInputs& x, const TokenSums& sums) {
  const int64_t slots = static_cast<int64_t>(groups.size());
  const int64_t height = std::min<int64_t>(kLanes, last + 1 - row);
  const float* inputs[kTokens];
  Vec totals[kTokens];
  PADST_UNROLL for (int t = 0; t < kTokens; ++t) {
    inputs[t] = x.row(t);
    totals[t] = load_some(sums.row(t) + row, height);
  }
  for (int64_t slot = 0; slot < slots; slot += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, slots - slot);
    const NmSquare square(values, offsets, slots, row, last, slot, count);
    square.add<kTokens, kWide>(groups.data() + slot, count, inputs, totals);
  }
  PADST_UNROLL for (int t = 0; t < kTokens; ++t) {
    store_some(totals[t], sums.row(t) + row, height);
  }
}

// sums[t, row] += the rows `rows` of S times x, of at most kTokens tokens, in the order in which S lies in memory. All tokens at
// once, because turning weights costs more than multiplying them. groups[slot]: where its group begins.
template <bool kWide, int kTokens = kHandful>
void add_nm_rows(
    const float* values, const uint8_t* offsets, const std::vector<int64_t>& groups, Range rows, const TokenInputs& x,
    const TokenSums& sums) {
  if constexpr (kTokens > 1) {
    if (x.tokens < kTokens) {
      return add_nm_rows<kWide, kTokens - 1>(values, offsets, groups, rows, x, sums);
    }
  }
  for (int64_t row = rows.begin; row < rows.end; row += kLanes) {
    add_nm_lanes<kTokens, kWide>(values, offsets, groups, row, rows.end - 1, x, sums);
  }
}

#else

inline constexpr int64_t kPickable = 0;

#endif

}  // namespace padst
