// Vectors of float as wide as the target's registers, and their conversion from and to the dtypes of activations.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

namespace padst {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Lanes __attribute__((vector_size(kLanes * sizeof(int32_t))));  // the bits of a Vec

inline Vec splat(float value) {
  return value - Vec{};
}

inline Vec absolute(Vec x) {
  return reinterpret_cast<Vec>(reinterpret_cast<Lanes>(x) & 0x7fffffff);
}

// The larger of x and a bound; NaN stays NaN.
inline Vec at_least(Vec x, float bound) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_max_ps(_mm512_set1_ps(bound), reinterpret_cast<__m512>(x)));
#else
  const Vec limit = splat(bound);
  return x < limit ? limit : x;
#endif
}

// The smaller of x and a bound; NaN stays NaN.
inline Vec at_most(Vec x, float bound) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_min_ps(_mm512_set1_ps(bound), reinterpret_cast<__m512>(x)));
#else
  const Vec limit = splat(bound);
  return x > limit ? limit : x;
#endif
}

// a b - c, rounded once.
inline Vec multiply_subtract(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(
      _mm512_fmsub_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<Vec>(
      _mm256_fmsub_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  for (int i = 0; i < kLanes; ++i) {
    a[i] = std::fma(a[i], b[i], -c[i]);
  }
  return a;
#endif
}

// 1 / x within 1.1 * 2^-24 of it, for normal x below 2^126 and NaN.
inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  // An estimate of 14 bits and a step of Newton's method take a fifth of the time of a division.
  const __m512 d = reinterpret_cast<__m512>(x), y = _mm512_rcp14_ps(d);
  return reinterpret_cast<Vec>(_mm512_fmadd_ps(y, _mm512_fnmadd_ps(d, y, _mm512_set1_ps(1.0f)), y));
#else
  return 1.0f / x;
#endif
}

// Anywhere in memory. A copy of bytes would do, but keeps compilers from leaving arrays of vectors in registers.
typedef float LooseVec __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));

inline Vec load(const float* source) {
  return *reinterpret_cast<const LooseVec*>(source);
}

inline void store(Vec v, float* target) {
  *reinterpret_cast<LooseVec*>(target) = v;
}

// One lane at a time; the compiler vectorises what it can where no instruction is named below.
template <typename T>
inline Vec load(const T* source) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) {
    v[i] = static_cast<float>(source[i]);
  }
  return v;
}

template <typename T>
inline void store(Vec v, T* target) {
  for (int i = 0; i < kLanes; ++i) {
    target[i] = static_cast<T>(v[i]);
  }
}

#if defined(__AVX512F__)

template <>
inline Vec load<c10::BFloat16>(const c10::BFloat16* source) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return reinterpret_cast<Vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

template <>
inline Vec load<c10::Half>(const c10::Half* source) {
  return reinterpret_cast<Vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source))));
}

template <>
inline void store<c10::Half>(Vec v, c10::Half* target) {
  const __m256i bits = _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), bits);
}

#endif

#if defined(__AVX512BF16__)

template <>
inline void store<c10::BFloat16>(Vec v, c10::BFloat16* target) {
  const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), bits);
}

#endif

// What a vector is after it was stored as T.
template <typename T>
inline Vec rounded(Vec v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else {
    T lanes[kLanes];
    store(v, lanes);
    return load(lanes);
  }
}

// The first `count` lanes; the others are zero.
template <typename T>
inline Vec load_some(const T* source, int64_t count) {
  if (count >= kLanes) {
    return load(source);
  }
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    lanes[i] = static_cast<float>(source[i]);
  }
  return load(lanes);
}

template <typename T>
inline void store_some(Vec v, T* target, int64_t count) {
  if (count >= kLanes) {
    return store(v, target);
  }
  T lanes[kLanes];
  store(v, lanes);
  std::memcpy(target, lanes, count * sizeof(T));
}

#if defined(__AVX512F__)

inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1 << count) - 1);
}

template <>
inline Vec load_some<float>(const float* source, int64_t count) {
  return count >= kLanes ? load(source) : reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(first_lanes(count), source));
}

template <>
inline void store_some<float>(Vec v, float* target, int64_t count) {
  count >= kLanes ? store(v, target) : _mm512_mask_storeu_ps(target, first_lanes(count), reinterpret_cast<__m512>(v));
}

#endif

}  // namespace padst
