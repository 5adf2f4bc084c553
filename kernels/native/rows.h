// Copies of one row of features: permuted, converted, finished with a bias.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "vectors.h"

namespace padst {

// target[j] = source[table[j]]
template <typename Source, typename Target>
inline void gather(
    const Source* __restrict__ source, const int32_t* __restrict__ table, int64_t size, Target* __restrict__ target) {
  for (int64_t j = 0; j < size; ++j) {
    target[j] = static_cast<Target>(source[table[j]]);
  }
}

template <typename Source, typename Target>
inline void convert(const Source* __restrict__ source, int64_t size, Target* __restrict__ target) {
  if constexpr (std::is_same_v<Source, Target>) {
    std::copy_n(source, size, target);
  } else {
    for (int64_t j = 0; j < size; ++j) {
      target[j] = static_cast<Target>(source[j]);
    }
  }
}

// y = z + bias, rounded to T.
template <typename T>
inline void finish_row(const float* __restrict__ z, const float* __restrict__ bias, int64_t size, T* __restrict__ y) {
  int64_t j = 0;
  for (; j + kLanes <= size; j += kLanes) {
    store(bias != nullptr ? load(z + j) + load(bias + j) : load(z + j), y + j);
  }
  for (; j < size; ++j) {
    y[j] = static_cast<T>(bias != nullptr ? z[j] + bias[j] : z[j]);
  }
}

// y[table[i]] = z[i] + bias[table[i]], for the rows of an output that several workers share.
template <typename T>
inline void scatter_row(const float* z, const float* bias, const int32_t* table, int64_t size, T* y) {
  for (int64_t i = 0; i < size; ++i) {
    const int32_t j = table[i];
    y[j] = static_cast<T>(bias != nullptr ? z[i] + bias[j] : z[i]);
  }
}

}  // namespace padst
