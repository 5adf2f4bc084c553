// Copies of one row of features: converted, or finished with bias, activation, gate and residual.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "epilogue.h"
#include "vectors.h"

namespace padst {

// To the same type or to float.
template <typename Source, typename Target>
inline void convert(const Source* __restrict__ source, int64_t size, Target* __restrict__ target) {
  if constexpr (std::is_same_v<Source, Target>) {
    std::copy_n(source, size, target);
  } else {
    int64_t j = 0;
    for (; j + kLanes <= size; j += kLanes) {
      store(load(source + j), target + j);
    }
    store_some(load_some(source + j, size - j), target + j, size - j);
  }
}

// y[j] = finish(z[j] + bias[j], j, width) for a vector of `width` outputs at a time.
template <typename T, typename Finish>
inline void finish_vectors(const float* z, const float* bias, int64_t size, T* y, const Finish& finish) {
  int64_t j = 0;
  for (; j + kLanes <= size; j += kLanes) {
    store(finish(load(z + j) + load(bias + j), j, kLanes), y + j);
  }
  if (const int64_t rest = size - j; rest > 0) {
    store_some(finish(load_some(z + j, rest) + load_some(bias + j, rest), j, rest), y + j, rest);
  }
}

// y = act(z + bias) * gate + residual for a row or a part of one.
template <typename T>
inline void finish_row(const float* z, const Epilogue<T>& epilogue, int64_t size, T* y) {
  with_activation(epilogue.activation, [&](auto activation) {
    if (epilogue.combines()) {
      finish_vectors(z, epilogue.bias, size, y, [=](Vec sums, int64_t j, int64_t width) {
        return epilogue.combine(activation(sums), j, width);
      });
    } else {
      finish_vectors(z, epilogue.bias, size, y, [=](Vec sums, int64_t, int64_t) { return activation(sums); });
    }
  });
}

// y[j] = act(z[i] + bias[j]) * gate[j] + residual[j] with j = table[i], for the rows of an output that several workers share.
template <typename T>
inline void scatter_row(const float* z, const Epilogue<T>& epilogue, const int32_t* table, int64_t size, T* y) {
  with_activation(epilogue.activation, [&](auto activation) {
    for (int64_t i = 0; i < size; i += kLanes) {
      const int64_t width = std::min<int64_t>(kLanes, size - i);
      float lanes[kLanes] = {};
      for (int64_t l = 0; l < width; ++l) {
        lanes[l] = epilogue.bias[table[i + l]];
      }
      store(activation(load_some(z + i, width) + load(lanes)), lanes);
      for (int64_t l = 0; l < width; ++l) {
        const int32_t j = table[i + l];
        y[j] = static_cast<T>(epilogue.combine(lanes[l], j));
      }
    }
  });
}

}  // namespace padst
