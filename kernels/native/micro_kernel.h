// ATen's batch-reduce GEMM micro-kernel (oneDNN), whether this CPU has one for a dtype, and the weight layout it reads.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <type_traits>
#include <vector>

#include "partition.h"

namespace padst {

template <typename T>
struct MicroKernel {
  // 16-bit weights are read as interleaved pairs of inputs (VNNI), so the depth is even.
  static constexpr bool kPairs = !std::is_same_v<T, float>;
  static constexpr int64_t kStep = kPairs ? 2 : 1;

  // c [m, n] (+)= a [m, k] b [k, n]
  static void multiply(
      int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc, bool add) {
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, kPairs);
  }
};

// Hands the tile registers back when a worker ends, however it ends.
template <typename T>
class MicroKernelScope {
 public:
  MicroKernelScope() = default;
  ~MicroKernelScope() {
    at::native::cpublas::brgemm_release(MicroKernel<T>::kPairs);
  }
  MicroKernelScope(const MicroKernelScope&) = delete;
  MicroKernelScope& operator=(const MicroKernelScope&) = delete;
};

// Two rows of `size` weights -> [size, 2], little end first; whole words, because those the compiler vectorises.
template <typename T>
inline void interleave(const T* __restrict__ even, const T* __restrict__ odd, int64_t size, T* __restrict__ pairs) {
  static_assert(sizeof(T) == sizeof(uint16_t));
  for (int64_t j = 0; j < size; ++j) {
    uint16_t low, high;
    std::memcpy(&low, even + j, sizeof low);
    std::memcpy(&high, odd + j, sizeof high);
    const uint32_t pair = low | uint32_t{high} << 16;
    std::memcpy(pairs + 2 * j, &pair, sizeof pair);
  }
}

// Whether the micro-kernel runs here and multiplies as this library expects: there is no public query, and the layout of
// 16-bit weights differs between instruction sets. Small integers make the comparison exact.
template <typename T>
bool micro_kernel_works() {
  constexpr int64_t kSize = 32;
  std::vector<T> a(kSize * kSize), b(kSize * kSize), packed(kSize * kSize);
  std::vector<float> c(kSize * kSize, -1.0f);
  for (int64_t i = 0; i < kSize * kSize; ++i) {
    a[i] = static_cast<T>(static_cast<float>(i % 7 - 3));
    b[i] = static_cast<T>(static_cast<float>(i % 5 - 2));
  }
  if constexpr (MicroKernel<T>::kPairs) {
    for (int64_t k = 0; k < kSize; k += 2) {
      interleave(&b[k * kSize], &b[(k + 1) * kSize], kSize, &packed[k * kSize]);
    }
  } else {
    packed = b;
  }
  try {
    const MicroKernelScope<T> scope;
    MicroKernel<T>::multiply(kSize, kSize, kSize, a.data(), kSize, packed.data(), kSize, c.data(), kSize, false);
  } catch (const std::exception&) {
    return false;
  }
  for (int64_t i = 0; i < kSize; ++i) {
    for (int64_t j = 0; j < kSize; ++j) {
      float expected = 0.0f;
      for (int64_t k = 0; k < kSize; ++k) {
        expected += static_cast<float>(a[i * kSize + k]) * static_cast<float>(b[k * kSize + j]);
      }
      if (c[i * kSize + j] != expected) {
        return false;
      }
    }
  }
  return true;
}

template <typename T>
bool has_micro_kernel() {
  static const bool works = micro_kernel_works<T>();
  return works;
}

}  // namespace padst
