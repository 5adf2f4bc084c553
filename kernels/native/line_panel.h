// Permutations for nothing: a tile of activations as lines, one for each feature, of that feature of kLanes tokens.
//
// A GEMM micro-kernel reads its inputs one number at a time, and weights by the vector, so that the inputs may as well be those
// of several tokens in one line. A tile of them is copied once in any case. Transposed on the way, it consists of whole lines,
// which cost the same wherever they are stored: there is no gather.
//
// The sums of some tokens and outputs fill the 32 registers of AVX-512; elsewhere rows are gathered (packed_gather.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "block_matrix.h"
#include "checks.h"
#include "line_kernel.h"
#include "partition.h"
#include "rows.h"
#include "transpose.h"
#include "vectors.h"

namespace padst {

inline constexpr bool kHasLines = kLanes == 16;
inline constexpr int64_t kFewTokens = kLanes / 2;  // below, lines are too empty

class LinePanel {
 public:
  // table: input k of the product is feature table[k] of what is stored.
  LinePanel(const int32_t* table, int64_t features, int64_t tokens)
      : features_(features),
        line_of_(inverse_permutation(table, features, "input_permutation")),
        scratch_(ceil_div(tokens, kLanes) * features * kLanes) {}

  // finish(a vector of one feature, which feature) for features of up to kLanes tokens from `token` on, a multiple of kLanes.
  // rows: [tokens, features.size()], `stride` apart.
  template <typename Finish>
  void store(const float* rows, int64_t stride, int64_t token, int64_t tokens, Range features, const Finish& finish) {
    const float* from[kLanes];  // missing tokens repeat the last
    for (int64_t t = 0; t < kLanes; ++t) {
      from[t] = rows + std::min(t, tokens - 1) * stride;
    }
    float* group = lines(token);
    const auto put = [&](Vec column, int64_t f) {
      __builtin_prefetch(group + line_of_[std::min(features.begin + f + kAhead, features_ - 1)] * kLanes, 1);
      padst::store(finish(column, features.begin + f), group + line_of_[features.begin + f] * kLanes);
    };
    int64_t f = 0;
    for (Vec columns[kColumns]; f + kColumns <= features.size(); f += kColumns) {
      load_columns(from, f, columns);
      for (int i = 0; i < kColumns; ++i) {
        put(columns[i], f + i);
      }
    }
    for (Vec column; f < features.size(); ++f) {
      for (int t = 0; t < kLanes; ++t) {
        column[t] = from[t][f];
      }
      put(column, f);
    }
  }

  // z [tokens, height] (+)= the inputs of a block column times a block.
  void multiply(
      const BlockMatrix& s, int64_t column, int64_t tokens, int64_t height, const float* block, float* z, int64_t z_stride,
      bool add) const {
    for (int64_t token = 0; token < tokens; token += kLanes) {
      const float* inputs = lines(token) + column * s.columns * kLanes;
      multiply_lines(
          {inputs, s.width(column), block, s.rows, height, z + token * z_stride, z_stride, add},
          std::min<int64_t>(kLanes, tokens - token));
    }
  }

 private:
  static constexpr int64_t kAhead = 32;  // hardware foresees no stores in such an order

  float* lines(int64_t token) const {
    return scratch_.data() + token * features_;
  }

  int64_t features_;
  std::vector<int32_t> line_of_;
  Scratch<float> scratch_;
};

// A tile of x as lines.
template <typename T>
class LineTile {
 public:
  static constexpr int64_t kStep = kLanes;  // tokens that are as cheap together as fewer

  LineTile(const BlockMatrix& s, const T* x, const int32_t* permutation, int64_t tile)
      : x_(x),
        features_(s.in_features),
        panel_(permutation, features_, tile),
        converted_(std::is_same_v<T, float> ? 0 : kLanes * features_) {}

  void load(int64_t first, int64_t tokens) {
    for (int64_t t = 0; t < tokens; t += kLanes) {
      const int64_t some = std::min<int64_t>(kLanes, tokens - t);
      const float* rows = floats(x_ + (first + t) * features_, some * features_);
      panel_.store(rows, features_, t, some, {0, features_}, [](Vec column, int64_t) { return column; });
    }
  }

  const LinePanel& panel() const {
    return panel_;
  }

 private:
  const float* floats(const T* rows, int64_t count) const {
    if constexpr (std::is_same_v<T, float>) {
      return rows;
    } else {
      convert(rows, count, converted_.data());
      return converted_.data();
    }
  }

  const T* x_;
  int64_t features_;
  LinePanel panel_;
  Scratch<float> converted_;
};

}  // namespace padst
