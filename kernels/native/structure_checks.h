// Checks of the index tensors of N:M and diagonal layers.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <functional>

#include "checks.h"
#include "partition.h"

namespace padst {

// offsets uint8 [row groups, slots]: every one inside its group of m, and in the last, possibly shorter group inside in_features;
// those of a group ascend, for an input that occurs twice would count twice.
inline void check_nm_offsets(
    const at::Tensor& offsets, int64_t in_features, int64_t out_features, int64_t n, int64_t m, int64_t vector) {
  TORCH_CHECK(0 < n && n <= m && m <= 256, "N:M needs 0 < n <= m <= 256, got ", n, ":", m);
  TORCH_CHECK(vector > 0, "N:M needs a positive vector, got ", vector);
  TORCH_CHECK(offsets.device().is_cpu() && offsets.scalar_type() == at::kByte, "offsets must be uint8 on the CPU");
  const int64_t row_groups = ceil_div(out_features, vector), groups = ceil_div(in_features, m), slots = groups * n;
  TORCH_CHECK(
      offsets.is_contiguous() && offsets.dim() == 2 && offsets.size(0) == row_groups && offsets.size(1) == slots,
      "offsets must be contiguous [", row_groups, ", ", slots, "], got ", offsets.sizes());
  const uint8_t* offset = offsets.const_data_ptr<uint8_t>();
  const int64_t tail = in_features - (groups - 1) * m;
  uint8_t worst = 0, worst_tail = 0;
  for (int64_t i = 0; i < row_groups * slots; ++i) {
    worst = std::max(worst, offset[i]);
  }
  for (int64_t g = 0; g < row_groups; ++g) {
    for (int64_t slot = slots - n; slot < slots; ++slot) {
      worst_tail = std::max(worst_tail, offset[g * slots + slot]);
    }
  }
  TORCH_CHECK(worst < m && worst_tail < tail, "offsets must stay inside their group of ", m, " inputs");
  bool ascend = true;
  for (int64_t first = 0; n > 1 && first < row_groups * slots; first += n) {
    for (int64_t i = first + 1; i < first + n; ++i) {
      ascend &= offset[i - 1] < offset[i];
    }
  }
  TORCH_CHECK(ascend, "the offsets of a group must ascend");
}

// The ascending offsets of diagonals in [0, period).
inline const int32_t* diagonal_offsets(const at::Tensor& offsets, int64_t period) {
  const int32_t* first = int32_pointer(offsets, "offsets");
  check_indices(first, offsets.numel(), period, "offsets");
  const bool ascend = std::is_sorted(first, first + offsets.numel(), std::less_equal<int32_t>());
  TORCH_CHECK(ascend, "offsets must ascend without repetition");
  return first;
}

}  // namespace padst
