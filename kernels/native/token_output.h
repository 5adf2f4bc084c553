// The way of sums in rows of tokens into y: finished, and permuted where asked for.
#pragma once

#include <algorithm>
#include <cstdint>

#include "epilogue.h"
#include "packed_gather.h"
#include "partition.h"
#include "rows.h"

namespace padst {

// Where outputs go, and what happens to them on the way.
template <typename T>
class Output {
 public:
  // stride: elements from one token of y, gate and residual to the next.
  Output(
      T* y, int64_t features, int64_t stride, const Epilogue<T>& epilogue, const int32_t* permutation, const int32_t* target)
      : y_(y), features_(features), stride_(stride), epilogue_(epilogue), permutation_(permutation), target_(target) {}

  // The outputs `part` of S for some tokens: all of them, unless workers share a row. z has them in rows `stride` apart.
  void finish(int64_t first, int64_t tokens, const float* z, int64_t stride, Range part) const {
    if (permutation_ == nullptr) {
      finish_in_order(first, tokens, z, stride, part);
    } else if (target_ == nullptr) {
      gather(first, tokens, z, stride);
    } else {
      scatter(first, tokens, z, stride, part);
    }
  }

 private:
  static constexpr int64_t kPart = 512;  // permuted outputs wait in L1 for the rest

  void finish_in_order(int64_t first, int64_t tokens, const float* z, int64_t stride, Range part) const {
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t element = (first + t) * stride_ + part.begin;
      finish_row(z + t * stride, epilogue_.from(part.begin, element), part.size(), y_ + element);
    }
  }

  void scatter(int64_t first, int64_t tokens, const float* z, int64_t stride, Range part) const {
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t row = (first + t) * stride_;
      scatter_row(z + t * stride, epilogue_.from(0, row), target_ + part.begin, part.size(), y_ + row);
    }
  }

  void gather(int64_t first, int64_t tokens, const float* z, int64_t stride) const {
    PackedGather<float> words(permutation_, features_);
    const Scratch<float> rows(words.kRows * kPart);
    for (int64_t t = 0; t < tokens; t += words.kRows) {
      const int64_t count = std::min(words.kRows, tokens - t);
      words.pack(z + t * stride, stride, count);
      for (int64_t j = 0; j < features_; j += kPart) {
        const Range part{j, std::min(j + kPart, features_)};
        words.unpack(part, rows.data(), kPart, count);
        finish_in_order(first + t, count, rows.data(), kPart, part);
      }
    }
  }

  T* y_;
  int64_t features_, stride_;
  Epilogue<T> epilogue_;
  const int32_t* permutation_;  // y[j] = z[permutation[j]], or nullptr
  const int32_t* target_;       // its inverse where workers share a row, else nullptr
};

}  // namespace padst
