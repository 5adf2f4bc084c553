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
#include <numeric>
#include <type_traits>
#include <vector>

#include "block_matrix.h"
#include "checks.h"
#include "line_kernel.h"
#include "lines_to_lines.h"
#include "partition.h"
#include "rows.h"
#include "transpose.h"
#include "vectors.h"

namespace padst {

inline constexpr bool kHasLines = kLanes == 16;
inline constexpr int64_t kFewTokens = kLanes / 2;  // below, lines are too empty

// What a product reads: groups of kLanes tokens, each a line of every feature.
class LineView {
 public:
  LineView(const float* lines, int64_t features) : lines_(lines), features_(features) {}

  // Of tokens from `token` on, a multiple of kLanes.
  LineView from(int64_t token) const {
    return {lines_ + token * features_, features_};
  }

  // z [tokens, height] (+)= the inputs of a block column times a block.
  void multiply(
      const BlockMatrix& s, int64_t column, int64_t tokens, int64_t height, const float* block, float* z, int64_t z_stride,
      bool add) const {
    for (int64_t token = 0; token < tokens; token += kLanes) {
      const float* inputs = lines_ + token * features_ + column * s.columns * kLanes;
      multiply_lines(
          {inputs, s.width(column), block, s.rows, height, z + token * z_stride, z_stride, add},
          std::min<int64_t>(kLanes, tokens - token));
    }
  }

  // The same with z in lines, [groups, height, kLanes].
  void multiply_to_lines(
      const BlockMatrix& s, int64_t column, int64_t groups, int64_t height, const float* block, float* z, bool add) const {
    const float* inputs = lines_ + column * s.columns * kLanes;
    padst::multiply_to_lines(
        {inputs, features_ * kLanes, s.width(column), block, s.rows, z, height * kLanes, add}, groups, height);
  }

 private:
  const float* lines_;
  int64_t features_;
};

class LinePanel {
 public:
  // table: input k of the product is feature table[k] of what is stored, or feature k.
  LinePanel(const int32_t* table, int64_t features, int64_t tokens)
      : features_(features),
        line_of_(table == nullptr ? identity(features) : inverse_permutation(table, features, "input_permutation")),
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
    int64_t f = 0;
    for (Vec columns[kColumns]; f + kColumns <= features.size(); f += kColumns) {
      load_columns(from, f, columns);
      for (int i = 0; i < kColumns; ++i) {
        put(columns[i], features.begin + f + i, group, finish);
      }
    }
    for (Vec column; f < features.size(); ++f) {
      for (int t = 0; t < kLanes; ++t) {
        column[t] = from[t][f];
      }
      put(column, features.begin + f, group, finish);
    }
  }

  // The same from lines of those features.
  template <typename Finish>
  void store_lines(const float* lines_in, int64_t token, Range features, const Finish& finish) {
    float* group = lines(token);
    for (int64_t f = features.begin; f < features.end; ++f, lines_in += kLanes) {
      put(load(lines_in), f, group, finish);
    }
  }

  LineView view() const {
    return {scratch_.data(), features_};
  }

 private:
  static constexpr int64_t kAhead = 32;  // hardware foresees no stores in such an order

  static std::vector<int32_t> identity(int64_t features) {
    std::vector<int32_t> table(features);
    std::iota(table.begin(), table.end(), 0);
    return table;
  }

  template <typename Finish>
  void put(Vec line, int64_t feature, float* group, const Finish& finish) const {
    __builtin_prefetch(group + line_of_[std::min(feature + kAhead, features_ - 1)] * kLanes, 1);
    padst::store(finish(line, feature), group + line_of_[feature] * kLanes);
  }

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

  LineView panel() const {
    return panel_.view();
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
