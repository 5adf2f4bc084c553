// A GEMM micro-kernel whose inputs are lines: the same feature of kLanes tokens, side by side.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "partition.h"
#include "unroll.h"
#include "vectors.h"

namespace padst {

// One call: z [tokens, height] (+)= lines [depth, tokens] transposed, times weights [depth, height].
struct LineProduct {
  const float* lines;  // lines are kLanes apart
  int64_t depth;
  const float* weights;
  int64_t weights_stride;
  int64_t height;
  float* z;
  int64_t z_stride;
  bool add;

  // The same for tokens from `token` on and outputs from `output` on.
  LineProduct from(int64_t token, int64_t output) const {
    return {lines + token, depth, weights + output, weights_stride, height - output, z + token * z_stride + output, z_stride, add};
  }
};

// Sums of kTokens tokens and kVectors vectors of outputs, kept in registers. kWhole: all lanes of the last vector exist.
template <int kTokens, int kVectors, bool kWhole>
inline void multiply_lines(const LineProduct& p) {
  const int64_t last = kWhole ? kLanes : p.height - (kVectors - 1) * kLanes;
  const auto width = [&](int v) { return kWhole || v + 1 < kVectors ? int64_t{kLanes} : last; };
  Vec sums[kTokens][kVectors];
  PADST_UNROLL for (int t = 0; t < kTokens; ++t) {
    PADST_UNROLL for (int v = 0; v < kVectors; ++v) {
      sums[t][v] = Vec{};
    }
  }
  for (int64_t k = 0; k < p.depth; ++k) {
    Vec weights[kVectors];
    PADST_UNROLL for (int v = 0; v < kVectors; ++v) {
      const float* row = p.weights + k * p.weights_stride + v * kLanes;
      weights[v] = load_some(row, width(v));
      __builtin_prefetch(row + p.depth * p.weights_stride);  // the next block, or nothing
    }
    PADST_UNROLL for (int t = 0; t < kTokens; ++t) {
      const Vec input = splat(p.lines[k * kLanes + t]);
      PADST_UNROLL for (int v = 0; v < kVectors; ++v) {
        sums[t][v] += input * weights[v];
      }
    }
  }
  PADST_UNROLL for (int t = 0; t < kTokens; ++t) {
    PADST_UNROLL for (int v = 0; v < kVectors; ++v) {
      float* z = p.z + t * p.z_stride + v * kLanes;
      store_some(p.add ? load_some(z, width(v)) + sums[t][v] : sums[t][v], z, width(v));
    }
  }
}

// Tokens whose sums fit the 32 registers beside a row of weights and an input.
inline constexpr int kTokensAtOnce[] = {8, 8, 8, 6};  // for 1, 2, 3 and 4 vectors of outputs

template <int kVectors, bool kWhole, int... kTokens>
inline void multiply_lines(const LineProduct& p, int64_t tokens, std::integer_sequence<int, kTokens...>) {
  using Function = void (*)(const LineProduct&);
  static constexpr Function kFunctions[] = {multiply_lines<kTokens + 1, kVectors, kWhole>...};
  kFunctions[tokens - 1](p);
}

// Up to kLanes tokens in parts of about equal size: a last one of one or two tokens would wait for its sums.
template <int kVectors, bool kWhole>
inline void multiply_lines(const LineProduct& p, int64_t tokens) {
  constexpr int kMost = kTokensAtOnce[kVectors - 1];
  int64_t parts = ceil_div(tokens, kMost);
  for (int64_t t = 0; parts > 0; --parts) {
    const int64_t some = ceil_div(tokens - t, parts);
    multiply_lines<kVectors, kWhole>(p.from(t, 0), some, std::make_integer_sequence<int, kMost>{});
    t += some;
  }
}

template <int kVectors>
inline void multiply_lines(const LineProduct& p, int64_t tokens) {
  p.height == kVectors * kLanes ? multiply_lines<kVectors, true>(p, tokens) : multiply_lines<kVectors, false>(p, tokens);
}

// z [tokens, height] (+)= ... for up to kLanes tokens and any height.
inline void multiply_lines(const LineProduct& p, int64_t tokens) {
  constexpr int64_t kMost = 4 * kLanes;
  for (int64_t output = 0; output < p.height; output += kMost) {
    LineProduct part = p.from(0, output);
    part.height = std::min(kMost, part.height);
    switch (ceil_div(part.height, kLanes)) {
      case 1:
        multiply_lines<1>(part, tokens);
        break;
      case 2:
        multiply_lines<2>(part, tokens);
        break;
      case 3:
        multiply_lines<3>(part, tokens);
        break;
      default:
        multiply_lines<4>(part, tokens);
    }
  }
}

}  // namespace padst
