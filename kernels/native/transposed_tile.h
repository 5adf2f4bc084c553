// A tile of tokens turned feature-major, for sums over tokens.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "partition.h"
#include "transpose.h"
#include "vectors.h"

namespace padst {

// Some tokens, feature-major: [features, stride]. Feature f of a token is row target[f], or row f without a table: whole rows are
// stored, so a permutation costs nothing here.
template <typename T, typename C>
class TransposedTile {
 public:
  // tile: the most tokens, a multiple of kLanes; rows lie a cache line further apart, off the power of two.
  TransposedTile(int64_t features, int64_t tile, const int32_t* target)
      : features_(features), stride_(tile + kCacheLine / sizeof(C)), target_(target), scratch_(features * stride_) {}

  // Missing tokens up to `filled` become zeros.
  void load(const T* x, int64_t tokens, int64_t filled) {
    at::parallel_for(0, ceil_div(features_, kLanes), 4, [&](int64_t begin, int64_t end) {
      for (int64_t square = begin; square < end; ++square) {
        for (int64_t t = 0; t < filled; t += kLanes) {
          load_square(x, tokens, square * kLanes, t);
        }
      }
    });
  }

  const C* feature(int64_t f) const {
    return scratch_.data() + f * stride_;
  }
  int64_t stride() const {
    return stride_;
  }

 private:
  void load_square(const T* x, int64_t tokens, int64_t f, int64_t t) {
    const int64_t width = std::min<int64_t>(kLanes, features_ - f);
    Vec square[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      square[i] = t + i < tokens ? load_some(x + (t + i) * features_ + f, width) : Vec{};
    }
    transpose(square);
    for (int64_t i = 0; i < width; ++i) {
      store(square[i], scratch_.data() + (target_ != nullptr ? target_[f + i] : f + i) * stride_ + t);
    }
  }

  int64_t features_, stride_;
  const int32_t* target_;
  Scratch<C> scratch_;
};

}  // namespace padst
