// The gradient of a block-sparse weight: for every active block, x.T grad over its inputs and outputs, and nothing else.
//
// Tokens are taken in tiles. Of each, x is transposed to feature-major and a block row's part of grad is made contiguous; both
// are then operands of one GEMM per active block, which adds to the block's gradient. The transposition absorbs the input
// permutation; where the outputs are permuted, a tile of grad is put into the order of S first.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include "block_matrix.h"
#include "checks.h"
#include "kernels.h"
#include "micro_kernel.h"
#include "packed_gather.h"
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

// Tokens of grad in the order of the outputs of S: as they lie, or gathered a tile at a time.
template <typename T>
class OrderedTile {
 public:
  // table: output i of S is feature table[i] of grad, or nullptr.
  OrderedTile(const T* grad, int64_t features, const int32_t* table)
      : grad_(grad),
        features_(features),
        stride_(table != nullptr ? round_up(features, kLine) + kLine : features),
        table_(table),
        gathered_(table != nullptr ? kGradientTile * stride_ : 0) {}

  void load(int64_t first, int64_t tokens) {
    source_ = grad_ + first * features_;
    if (table_ != nullptr) {
      gather_rows(source_, features_, tokens, table_, gathered_.data(), stride_);
      source_ = gathered_.data();
    }
  }

  const T* data() const {
    return source_;
  }
  int64_t stride() const {
    return stride_;
  }

 private:
  static constexpr int64_t kLine = kCacheLine / sizeof(T);  // rows lie this much further apart, off the power of two

  const T* grad_;
  const T* source_ = nullptr;
  int64_t features_, stride_;
  const int32_t* table_;
  Scratch<T> gathered_;
};

// T: dtype of x and grad. C: dtype of the micro-kernel, float where there is none for T. values: [blocks, columns, rows], zero.
template <typename T, typename C>
void accumulate(
    const BlockMatrix& s, const T* grad, const int32_t* grad_source, const T* x, const int32_t* x_target, int64_t tokens,
    float* values) {
  TransposedTile<T, C> inputs(s.in_features, kGradientTile, x_target);
  OrderedTile<T> grads(grad, s.out_features, grad_source);
  for (int64_t first = 0; first < tokens; first += kGradientTile) {
    const int64_t count = std::min(kGradientTile, tokens - first);
    inputs.load(x + first * s.in_features, count, round_up(count, MicroKernel<C>::kStep));
    grads.load(first, count);
    at::parallel_for(0, s.block_rows, 1, [&](int64_t begin, int64_t end) {
      const MicroKernelScope<C> scope;
      GradientPanel<T, C> outputs(s.rows);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t height = s.height(row);
        outputs.load(grads.data() + row * s.rows, grads.stride(), count, height);
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
void accumulate_any(
    const BlockMatrix& s, const at::Tensor& grad, const int32_t* grad_source, const at::Tensor& x, const int32_t* x_target,
    float* values) {
  const auto kernel = has_micro_kernel<T>() ? accumulate<T, T> : accumulate<T, float>;
  kernel(s, grad.const_data_ptr<T>(), grad_source, x.const_data_ptr<T>(), x_target, x.size(0), values);
}

}  // namespace

at::Tensor block_value_gradient(
    const at::Tensor& grad_in, const at::Tensor& x_in, const at::Tensor& row_pointers, const at::Tensor& columns,
    int64_t block_rows, int64_t block_columns, const OptionalTensor& input_permutation, const OptionalTensor& output_permutation) {
  check_gradient_operands(grad_in, x_in);
  TORCH_CHECK(block_linear_supports(x_in.scalar_type()), "no micro-kernel for ", x_in.scalar_type(), " here");
  TORCH_CHECK(block_rows > 0 && block_columns > 0, "blocks must not be empty");
  const at::Tensor grad = grad_in.contiguous(), x = x_in.contiguous();
  const BlockMatrix s = describe_blocks(x.size(1), grad.size(1), block_rows, block_columns, row_pointers, columns);
  const PermutationTables into(input_permutation, s.in_features, "input_permutation");
  const PermutationTables out(output_permutation, s.out_features, "output_permutation");
  at::Tensor values = at::zeros({s.blocks(), block_columns, block_rows}, x.options().dtype(at::kFloat));
  const auto kernel = x.scalar_type() == at::kFloat ? accumulate_any<float>
      : x.scalar_type() == at::kBFloat16            ? accumulate_any<at::BFloat16>
                                                    : accumulate_any<at::Half>;
  kernel(s, grad, out.inverse(), x, into.inverse(), values.mutable_data_ptr<float>());
  return values.to(x.scalar_type());
}

}  // namespace padst
