// A permutation of the features of several tokens at once: target[row][j] = source[row][table[j]].
//
// A gather costs one load per element, whatever its width. So the same feature of several tokens is packed into a 64-bit word
// first, which costs a few shuffles per cache line, and the words are gathered: half or a quarter of the loads. Words of
// 128 bits would take fewer loads still, but those of one wide row leave the L1 cache. What remains is the rate of gathers;
// while they run, the next rows are fetched into the L1 cache.
//
// Call `pack` with up to kRows rows, then `unpack` for as many parts of them as one likes. Without AVX-512 the shuffles cost
// more than they save: rows are gathered one by one.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "partition.h"

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#endif

namespace padst {

#if defined(__AVX512BW__) && defined(__AVX512VL__)

template <typename T>
class PackedGather {
 public:
  static constexpr int64_t kRows = sizeof(uint64_t) / sizeof(T);

  // No table is the identity, which needs no gather and no memory.
  PackedGather(const int32_t* table, int64_t features)
      : table_(table), features_(features), words_(table != nullptr ? round_up(features, kStep) : 0) {}

  void pack(const T* source, int64_t stride, int64_t rows) {
    const T* from[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      from[r] = source + std::min(r, rows - 1) * stride;  // missing rows repeat the last
    }
    in_steps(features_, [&](int64_t f, __mmask16 some) {
      store_words(half_words(from, 0, f, some), half_words(from, kRows / 2, f, some), words_.data() + f);
    });
    next_ = source + rows * stride;
    next_stride_ = stride;
  }

  // The outputs `part` of the packed rows, the first of them to target[0].
  void unpack(Range part, T* target, int64_t stride, int64_t rows) const {
    T* to[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      to[r] = target + std::min(r, rows - 1) * stride;
    }
    const int32_t* table = table_ + part.begin;
    in_steps(part.size(), [&](int64_t j, __mmask16 some) {
      prefetch_next(part.begin + j);
      const __m512i index = _mm512_maskz_loadu_epi32(some, table + j);  // of missing outputs 0, which is a feature too
      store_rows(gather(_mm512_castsi512_si256(index)), gather(_mm512_extracti64x4_epi64(index, 1)), to, j, some);
    });
  }

 private:
  static constexpr int64_t kStep = 16;

  // step(first, which of the 16 from there on exist), for all of them.
  template <typename Step>
  static void in_steps(int64_t size, const Step& step) {
    int64_t f = 0;
    for (; f + kStep <= size; f += kStep) {
      step(f, static_cast<__mmask16>(-1));
    }
    if (f < size) {
      step(f, static_cast<__mmask16>((1 << (size - f)) - 1));
    }
  }

  // Gathers keep the ports for loads busy, not the memory: the rows that follow can come closer meanwhile. Behind the last
  // ones lie other tokens or none, of which a prefetch takes no notice.
  void prefetch_next(int64_t f) const {
    for (int64_t r = 0; r < kRows; ++r) {
      _mm_prefetch(reinterpret_cast<const char*>(next_ + r * next_stride_ + f), _MM_HINT_T0);
    }
  }

  // The 32 bits that the rows from `row` on contribute to each of 16 words.
  static __m512i half_words(const T* const (&from)[kRows], int64_t row, int64_t f, __mmask16 some) {
    if constexpr (sizeof(T) == 4) {
      return _mm512_maskz_loadu_epi32(some, from[row] + f);
    } else {
      const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from[row] + f));
      const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from[row + 1] + f));
      return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
    }
  }

  static void store_words(__m512i low, __m512i high, uint64_t* words) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    _mm512_store_si512(words, _mm512_permutex2var_epi32(low, first, high));
    _mm512_store_si512(words + kStep / 2, _mm512_permutex2var_epi32(low, second, high));
  }

  __m512i gather(__m256i index) const {
    return _mm512_i32gather_epi64(index, words_.data(), sizeof(uint64_t));
  }

  // Splits 16 words into rows.
  static void store_rows(__m512i first, __m512i second, T* const (&to)[kRows], int64_t j, __mmask16 some) {
    if constexpr (sizeof(T) == 4) {
      const __m512i low = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(1));
      _mm512_mask_storeu_epi32(to[0] + j, some, _mm512_permutex2var_epi32(first, low, second));
      _mm512_mask_storeu_epi32(to[1] + j, some, _mm512_permutex2var_epi32(first, high, second));
    } else {
      // Two neighbouring words become four pairs of features, one per row; then the pairs of each row come together.
      const __m512i pairs = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
      const __m512i rows = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
      first = _mm512_shuffle_epi8(first, pairs);
      second = _mm512_shuffle_epi8(second, pairs);
      for (int r = 0; r < kRows; r += 2) {
        const __m512i both = _mm512_permutex2var_epi32(first, _mm512_add_epi32(rows, _mm512_set1_epi32(r)), second);
        _mm256_mask_storeu_epi16(to[r] + j, some, _mm512_castsi512_si256(both));
        _mm256_mask_storeu_epi16(to[r + 1] + j, some, _mm512_extracti64x4_epi64(both, 1));
      }
    }
  }

  const int32_t* table_;
  int64_t features_;
  Scratch<uint64_t> words_;
  const T* next_ = nullptr;
  int64_t next_stride_ = 0;
};

#else

template <typename T>
class PackedGather {
 public:
  static constexpr int64_t kRows = 1;

  PackedGather(const int32_t* table, int64_t) : table_(table) {}

  void pack(const T* source, int64_t, int64_t) {
    source_ = source;
  }

  void unpack(Range part, T* __restrict__ target, int64_t, int64_t) const {
    const int32_t* __restrict__ table = table_ + part.begin;
    const T* __restrict__ source = source_;
    for (int64_t j = 0; j < part.size(); ++j) {
      target[j] = source[table[j]];
    }
  }

 private:
  const int32_t* table_;
  const T* source_ = nullptr;
};

#endif

// Tokens [tokens, features] -> target, in rows `stride` apart: target[t][j] = source[t][table[j]].
template <typename T>
void gather_rows(const T* source, int64_t features, int64_t tokens, const int32_t* table, T* target, int64_t stride) {
  constexpr int64_t kGroup = PackedGather<T>::kRows;
  at::parallel_for(0, ceil_div(tokens, kGroup), 8, [&](int64_t begin, int64_t end) {
    PackedGather<T> words(table, features);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * kGroup, count = std::min(kGroup, tokens - first);
      words.pack(source + first * features, features, count);
      words.unpack({0, features}, target + first * stride, stride, count);
    }
  });
}

}  // namespace padst
