// The gradient of the inputs of a block-sparse product: the product with S.T, which is block-sparse too.
//
// S.T is made anew at each call. It is a tenth of a dense weight, and its blocks change at every step of an optimizer.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <vector>

#include "block_matrix.h"
#include "block_product.h"
#include "checks.h"
#include "kernels.h"

namespace padst {
namespace {

// S.T as `block_linear` takes it.
struct TransposedBlocks {
  at::Tensor values, row_pointers, columns;
};

// Counts the blocks of each block column of S, and puts them there in the order of their block rows.
std::vector<int32_t> transpose_index(const BlockMatrix& s, int32_t* pointers, int32_t* block_rows) {
  const int64_t count = ceil_div(s.in_features, s.columns);
  std::fill_n(pointers, count + 1, 0);
  for (int64_t block = 0; block < s.blocks(); ++block) {
    ++pointers[s.block_columns[block] + 1];
  }
  for (int64_t column = 0; column < count; ++column) {
    pointers[column + 1] += pointers[column];
  }
  std::vector<int32_t> next(pointers, pointers + count), source(s.blocks());
  for (int64_t row = 0; row < s.block_rows; ++row) {
    for (int32_t block = s.row_pointers[row]; block < s.row_pointers[row + 1]; ++block) {
      const int32_t place = next[s.block_columns[block]]++;
      block_rows[place] = static_cast<int32_t>(row);
      source[place] = block;
    }
  }
  return source;
}

template <typename T>
void transpose_values(const BlockMatrix& s, const std::vector<int32_t>& source, const T* values, T* transposed) {
  const int64_t size = s.rows * s.columns;
  at::parallel_for(0, s.blocks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const T* from = values + source[block] * size;
      T* to = transposed + block * size;
      for (int64_t row = 0; row < s.rows; ++row) {
        for (int64_t column = 0; column < s.columns; ++column) {
          to[row * s.columns + column] = from[column * s.rows + row];
        }
      }
    }
  });
}

TransposedBlocks transpose_blocks(const BlockMatrix& s, const at::Tensor& values, const at::TensorOptions& index) {
  const TransposedBlocks t{
      at::empty({s.blocks(), s.rows, s.columns}, values.options()), at::empty(ceil_div(s.in_features, s.columns) + 1, index),
      at::empty(s.blocks(), index)};
  const std::vector<int32_t> source =
      transpose_index(s, t.row_pointers.mutable_data_ptr<int32_t>(), t.columns.mutable_data_ptr<int32_t>());
  with_dtypes(values.scalar_type(), [&](auto dtype, auto) {
    using T = decltype(dtype);
    transpose_values(s, source, values.const_data_ptr<T>(), t.values.mutable_data_ptr<T>());
  });
  return t;
}

// The inverse of an optional permutation, checked.
OptionalTensor inverse_tensor(const OptionalTensor& permutation, int64_t size, const char* name) {
  const PermutationTables tables(permutation, size, name);
  if (tables.inverse() == nullptr) {
    return std::nullopt;
  }
  at::Tensor inverse = at::empty(size, permutation->options());
  std::copy_n(tables.inverse(), size, inverse.mutable_data_ptr<int32_t>());
  return inverse;
}

}  // namespace

at::Tensor block_input_gradient(
    const at::Tensor& grad, const at::Tensor& values_in, const at::Tensor& row_pointers, const at::Tensor& columns,
    int64_t in_features, const OptionalTensor& input_permutation, const OptionalTensor& output_permutation, int64_t token_tile) {
  check_operands(grad, values_in, in_features);
  TORCH_CHECK(block_linear_supports(grad.scalar_type()), "block_input_gradient has no micro-kernel for ", grad.scalar_type());
  TORCH_CHECK(!is_interleaved(values_in), "gradients take values as they are trained, not interleaved");
  const at::Tensor values = values_in.contiguous();
  const BlockMatrix s = describe(in_features, values, row_pointers, columns, grad.size(-1));
  const TransposedBlocks t = transpose_blocks(s, values, columns.options());
  const OptionalTensor before = inverse_tensor(output_permutation, s.out_features, "output_permutation");
  const OptionalTensor behind = inverse_tensor(input_permutation, in_features, "input_permutation");
  return block_linear(
      grad, t.values, t.row_pointers, t.columns, std::nullopt, before, behind, in_features, "none", std::nullopt, std::nullopt,
      token_tile);
}

}  // namespace padst
