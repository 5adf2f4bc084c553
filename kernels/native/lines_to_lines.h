// A GEMM micro-kernel from lines to lines: of its outputs, too, kLanes tokens are side by side.
//
// Vectors are of tokens here, and weights are read one number at a time, so that nothing is transposed between two products.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "line_kernel.h"
#include "partition.h"
#include "vectors.h"

namespace padst {

// One call: z [groups, height, kLanes] (+)= weights [depth, height] transposed, times lines [groups, depth, kLanes].
struct LinesToLines {
  const float* lines;
  int64_t lines_stride;  // from one group of kLanes tokens to the next
  int64_t depth;
  const float* weights;
  int64_t weights_stride;
  float* z;
  int64_t z_stride;  // from one group to the next
  bool add;
};

// The sums of kOutputs outputs and kGroups groups, kept in registers.
template <int kGroups, int kOutputs>
inline void multiply_to_lines(const LinesToLines& p) {
  Vec sums[kOutputs][kGroups];
  PADST_UNROLL for (int o = 0; o < kOutputs; ++o) {
    PADST_UNROLL for (int g = 0; g < kGroups; ++g) {
      sums[o][g] = Vec{};
    }
  }
  for (int64_t k = 0; k < p.depth; ++k) {
    const float* weights = p.weights + k * p.weights_stride;
    __builtin_prefetch(weights + p.depth * p.weights_stride);  // the next block, or nothing
    Vec inputs[kGroups];
    PADST_UNROLL for (int g = 0; g < kGroups; ++g) {
      inputs[g] = load(p.lines + g * p.lines_stride + k * kLanes);
    }
    PADST_UNROLL for (int o = 0; o < kOutputs; ++o) {
      const Vec weight = splat(weights[o]);
      PADST_UNROLL for (int g = 0; g < kGroups; ++g) {
        sums[o][g] += weight * inputs[g];
      }
    }
  }
  PADST_UNROLL for (int o = 0; o < kOutputs; ++o) {
    PADST_UNROLL for (int g = 0; g < kGroups; ++g) {
      float* z = p.z + g * p.z_stride + o * kLanes;
      store(p.add ? load(z) + sums[o][g] : sums[o][g], z);
    }
  }
}

inline constexpr int kGroupsAtOnce = 2;
inline constexpr int kOutputsAtOnce = 14;  // their sums fit the 32 registers beside a weight and two lines

template <int kGroups, int... kOutputs>
inline void multiply_to_lines(const LinesToLines& p, int64_t outputs, std::integer_sequence<int, kOutputs...>) {
  using Function = void (*)(const LinesToLines&);
  static constexpr Function kFunctions[] = {multiply_to_lines<kGroups, kOutputs + 1>...};
  kFunctions[outputs - 1](p);
}

// Outputs in parts of about equal size.
template <int kGroups>
inline void multiply_to_lines(LinesToLines p, int64_t height) {
  int64_t parts = ceil_div(height, kOutputsAtOnce);
  for (int64_t some; parts > 0; --parts, height -= some, p.weights += some, p.z += some * kLanes) {
    some = ceil_div(height, parts);
    multiply_to_lines<kGroups>(p, some, std::make_integer_sequence<int, kOutputsAtOnce>{});
  }
}

// z [groups, height, kLanes] (+)= ... for any number of groups and any height.
inline void multiply_to_lines(LinesToLines p, int64_t groups, int64_t height) {
  for (; groups >= kGroupsAtOnce; groups -= kGroupsAtOnce) {
    multiply_to_lines<kGroupsAtOnce>(p, height);
    p.lines += kGroupsAtOnce * p.lines_stride;
    p.z += kGroupsAtOnce * p.z_stride;
  }
  if (groups > 0) {
    multiply_to_lines<1>(p, height);
  }
}

}  // namespace padst
