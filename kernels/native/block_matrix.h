// A block-sparse matrix as its index tensors describe it, checked.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <functional>

#include "checks.h"
#include "partition.h"

namespace padst {

struct BlockMatrix {
  int64_t in_features, out_features, block_rows, rows, columns;  // rows x columns: size of one block
  const int32_t* row_pointers;
  const int32_t* block_columns;

  int64_t blocks() const {
    return row_pointers[block_rows];
  }
  int64_t height(int64_t block_row) const {
    return std::min(rows, out_features - block_row * rows);
  }
  int64_t width(int64_t block_column) const {
    return std::min(columns, in_features - block_column * columns);
  }
};

// Blocks of `rows` x `columns`: row_pointers [block rows + 1], block_columns [blocks].
inline BlockMatrix describe_blocks(
    int64_t in_features, int64_t out_features, int64_t rows, int64_t columns, const at::Tensor& row_pointers,
    const at::Tensor& block_columns) {
  const BlockMatrix s{
      in_features, out_features, ceil_div(out_features, rows), rows, columns, int32_pointer(row_pointers, "row_pointers"),
      int32_pointer(block_columns, "columns")};
  TORCH_CHECK(
      row_pointers.numel() == s.block_rows + 1, "row_pointers has ", row_pointers.numel(), " entries for ", s.block_rows,
      " block rows");
  check_indices(s.block_columns, block_columns.numel(), ceil_div(s.in_features, s.columns), "columns");
  TORCH_CHECK(
      s.row_pointers[0] == 0 && s.blocks() == block_columns.numel(), "row_pointers must run from 0 to the number of blocks");
  for (int64_t r = 0; r < s.block_rows; ++r) {
    TORCH_CHECK(s.row_pointers[r] <= s.row_pointers[r + 1], "row_pointers must not decrease");
  }
  for (int64_t r = 0; r < s.block_rows; ++r) {
    const int32_t *begin = s.block_columns + s.row_pointers[r], *end = s.block_columns + s.row_pointers[r + 1];
    TORCH_CHECK(
        std::adjacent_find(begin, end, std::greater_equal<>()) == end, "the columns of a block row must ascend, each at most once");
  }
  return s;
}

}  // namespace padst
