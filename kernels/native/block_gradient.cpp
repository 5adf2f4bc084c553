// The gradient of a block-sparse weight: for every active block, x.T grad over its inputs and outputs, and nothing else.
//
// Tokens are taken in tiles. Of each, x is transposed to feature-major and a block row's part of grad is made contiguous; both
// are then operands of one GEMM per active block, which adds to the block's gradient.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include "block_matrix.h"
#include "checks.h"
#include "kernels.h"
#include "micro_kernel.h"
#include "partition.h"
#include "rows.h"
#include "transposed_tile.h"

namespace padst {
namespace {

// Enough tokens that a GEMM does more than add to its result, few enough that a tile of x stays in L2.
constexpr int64_t kGradientTile = 256;

// The outputs of one block row for a tile of tokens, as the micro-kernel reads its right operand: [tokens, rows], 16-bit ones
// in pairs of tokens.
template <typename T, typename C>
class GradientPanel {
 public:
  explicit GradientPanel(int64_t rows)
      : rows_(rows), panel_(kGradientTile * rows), converted_(MicroKernel<C>::kPairs ? 2 * rows : 0) {}

  void load(const T* grad, int64_t stride, int64_t tokens, int64_t height) {
    if constexpr (MicroKernel<C>::kPairs) {
      for (int64_t t = 0; t < tokens; t += 2) {
        const T* odd = t + 1 < tokens ? grad + (t + 1) * stride : zeros(height);
        interleave(grad + t * stride, odd, height, panel_.data() + t * rows_);
      }
    } else {
      for (int64_t t = 0; t < tokens; ++t) {
        convert(grad + t * stride, height, panel_.data() + t * rows_);
      }
    }
  }

  const C* data() const {
    return panel_.data();
  }

 private:
  const C* zeros(int64_t height) {
    std::fill_n(converted_.data(), height, C(0.0f));
    return converted_.data();
  }

  int64_t rows_;
  Scratch<C> panel_, converted_;
};

// T: dtype of x and grad. C: dtype of the micro-kernel, float where there is none for T. values: [blocks, columns, rows], zero.
template <typename T, typename C>
void accumulate(const BlockMatrix& s, const T* grad, const T* x, int64_t tokens, float* values) {
  TransposedTile<T, C> inputs(s.in_features, kGradientTile);
  for (int64_t first = 0; first < tokens; first += kGradientTile) {
    const int64_t count = std::min(kGradientTile, tokens - first);
    inputs.load(x + first * s.in_features, count, round_up(count, MicroKernel<C>::kStep));
    at::parallel_for(0, s.block_rows, 1, [&](int64_t begin, int64_t end) {
      const MicroKernelScope<C> scope;
      GradientPanel<T, C> outputs(s.rows);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t height = s.height(row);
        outputs.load(grad + first * s.out_features + row * s.rows, s.out_features, count, height);
        for (int64_t block = s.row_pointers[row]; block < s.row_pointers[row + 1]; ++block) {
          const int64_t column = s.block_columns[block];
          MicroKernel<C>::multiply(
              s.width(column), height, round_up(count, MicroKernel<C>::kStep), inputs.feature(column * s.columns), inputs.stride(),
              outputs.data(), s.rows, values + block * s.columns * s.rows, s.rows, true);
        }
      }
    });
  }
}

template <typename T>
void accumulate_any(const BlockMatrix& s, const at::Tensor& grad, const at::Tensor& x, float* values) {
  const auto kernel = has_micro_kernel<T>() ? accumulate<T, T> : accumulate<T, float>;
  kernel(s, grad.const_data_ptr<T>(), x.const_data_ptr<T>(), x.size(0), values);
}

}  // namespace

at::Tensor block_value_gradient(
    const at::Tensor& grad_in, const at::Tensor& x_in, const at::Tensor& row_pointers, const at::Tensor& columns,
    int64_t block_rows, int64_t block_columns) {
  check_gradient_operands(grad_in, x_in);
  TORCH_CHECK(block_linear_supports(x_in.scalar_type()), "no micro-kernel for ", x_in.scalar_type(), " here");
  TORCH_CHECK(block_rows > 0 && block_columns > 0, "blocks must not be empty");
  const at::Tensor grad = grad_in.contiguous(), x = x_in.contiguous();
  const BlockMatrix s = describe_blocks(x.size(1), grad.size(1), block_rows, block_columns, row_pointers, columns);
  at::Tensor values = at::zeros({s.blocks(), block_columns, block_rows}, x.options().dtype(at::kFloat));
  if (x.scalar_type() == at::kFloat) {
    accumulate_any<float>(s, grad, x, values.mutable_data_ptr<float>());
  } else if (x.scalar_type() == at::kBFloat16) {
    accumulate_any<at::BFloat16>(s, grad, x, values.mutable_data_ptr<float>());
  } else {
    accumulate_any<at::Half>(s, grad, x, values.mutable_data_ptr<float>());
  }
  return values.to(x.scalar_type());
}

}  // namespace padst
