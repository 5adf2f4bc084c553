// y = block_linear(block_linear(x, S1, activation), S2, residual), the hidden features in cache.
//
// A tile of tokens goes through both products before the next begins: its hidden features stay in scratch, where the second
// product reads them as the panel that it would otherwise copy them into. The permutations between the products are the order
// in which they get there.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>

#include <algorithm>
#include <vector>

#include "block_product.h"
#include "kernels.h"

namespace padst {
namespace {

// The hidden features of a tile of tokens, rounded to T as in memory.
template <typename T, typename C>
class HiddenTile {
 public:
  HiddenTile(int64_t features, int64_t tokens, const Epilogue<T>& epilogue, const int32_t* permutation)
      : features_(features),
        panel_(features, tokens),
        rounded_(kSame ? 0 : tokens * features),
        output_(start(), features, kSame ? panel_.stride() : features, epilogue, permutation, nullptr) {}

  // From the sums [tokens, features] of the first product, in rows `stride` apart.
  void finish(int64_t tokens, const float* sums, int64_t stride) {
    output_.finish(0, tokens, sums, stride, {0, features_});
    for (int64_t t = 0; t < tokens; ++t) {
      if constexpr (!kSame) {
        convert(rounded_.data() + t * features_, features_, panel_.row(t));
      }
      panel_.end_row(t);
    }
  }

  const Panel<C>& panel() const {
    return panel_;
  }

 private:
  static constexpr bool kSame = std::is_same_v<T, C>;

  T* start() const {
    if constexpr (kSame) {
      return panel_.row(0);
    } else {
      return rounded_.data();
    }
  }

  int64_t features_;
  Panel<C> panel_;
  Scratch<T> rounded_;
  Output<T> output_;
};

// One of the two matrices.
template <typename C>
struct Product {
  const BlockMatrix& s;
  PackedBlocks<C> blocks;

  Product(const BlockMatrix& s, const at::Tensor& values) : s(s), blocks(s, values) {}

  void multiply(const Panel<C>& inputs, int64_t tokens, float* sums) const {
    for (int64_t block_row = 0; block_row < s.block_rows; ++block_row) {
      multiply_block_row(s, blocks, block_row, inputs, tokens, sums + block_row * s.rows, sums_stride(s));
    }
  }
};

template <typename T, typename C>
void run(
    const Product<C>& first, const Product<C>& second, const T* x, const int32_t* input_permutation, int64_t total_tokens,
    int64_t token_tile, const Epilogue<T>& between, const int32_t* between_table, const Output<T>& output) {
  const int64_t tile = balanced_tile(total_tokens, token_tile, at::get_num_threads());
  const int64_t hidden_stride = sums_stride(first.s), stride = sums_stride(second.s);
  at::parallel_for(0, ceil_div(total_tokens, tile), 1, [&](int64_t begin, int64_t end) {
    const MicroKernelScope<C> scope;
    TokenTile<T, C> inputs(first.s, x, input_permutation, tile);
    HiddenTile<T, C> hidden(first.s.out_features, tile, between, between_table);
    const Scratch<float> sums(tile * std::max(hidden_stride, stride));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t start = item * tile, tokens = std::min(tile, total_tokens - start);
      inputs.load(start, tokens);
      first.multiply(inputs.panel(), tokens, sums.data());
      hidden.finish(tokens, sums.data(), hidden_stride);
      second.multiply(hidden.panel(), tokens, sums.data());
      output.finish(start, tokens, sums.data(), stride, {0, second.s.out_features});
    }
  });
}

// The order in which the second product reads the rows of the first, and the bias in that order.
class Between {
 public:
  Between(const OptionalTensor& first_output, const OptionalTensor& second_input, const OptionalTensor& bias, int64_t features)
      : table_(permutation_pointer(first_output, features, "first_output_permutation")), bias_(bias) {
    const int32_t* reads = permutation_pointer(second_input, features, "second_input_permutation");
    if (reads == nullptr) {
      return;
    }
    if (table_ != nullptr) {
      composed_.resize(features);
      std::transform(reads, reads + features, composed_.begin(), [&](int32_t feature) { return table_[feature]; });
    }
    table_ = table_ != nullptr ? composed_.data() : reads;
    if (bias_.has_value()) {
      TORCH_CHECK(bias_->dim() == 1 && bias_->numel() == features, "first_bias must be [", features, "], got ", bias_->sizes());
      bias_ = bias_->index_select(0, *second_input);
    }
  }

  const int32_t* table() const {
    return table_;
  }
  const OptionalTensor& bias() const {
    return bias_;
  }

 private:
  const int32_t* table_;
  std::vector<int32_t> composed_;
  OptionalTensor bias_;
};

}  // namespace

at::Tensor block_mlp(
    const at::Tensor& x_in, const at::Tensor& first_values_in, const at::Tensor& first_row_pointers,
    const at::Tensor& first_columns, const OptionalTensor& first_bias, const OptionalTensor& first_input_permutation,
    const OptionalTensor& first_output_permutation, int64_t hidden_features, const at::Tensor& second_values_in,
    const at::Tensor& second_row_pointers, const at::Tensor& second_columns, const OptionalTensor& second_bias,
    const OptionalTensor& second_input_permutation, const OptionalTensor& second_output_permutation, int64_t out_features,
    std::string_view activation, const OptionalTensor& residual, int64_t token_tile) {
  check_operands(x_in, first_values_in, hidden_features);
  check_operands(x_in, second_values_in, out_features);
  TORCH_CHECK(block_linear_supports(x_in.scalar_type()), "block_mlp has no micro-kernel for ", x_in.scalar_type(), " here");
  TORCH_CHECK(token_tile >= 0, "token_tile must not be negative, got ", token_tile);
  const at::Tensor x = x_in.contiguous(), first_values = first_values_in.contiguous();
  const at::Tensor second_values = second_values_in.contiguous();
  const BlockMatrix s1 = describe(x.size(-1), first_values, first_row_pointers, first_columns, hidden_features);
  const BlockMatrix s2 = describe(hidden_features, second_values, second_row_pointers, second_columns, out_features);
  const int32_t* in_table = permutation_pointer(first_input_permutation, s1.in_features, "first_input_permutation");
  const int32_t* out_table = permutation_pointer(second_output_permutation, out_features, "second_output_permutation");
  const Between between(first_output_permutation, second_input_permutation, first_bias, hidden_features);
  const std::vector<int64_t> hidden_sizes = output_sizes(x, hidden_features), sizes = output_sizes(x, out_features);
  const EpilogueOperands hidden(x, hidden_sizes, hidden_features, between.bias(), activation, std::nullopt, std::nullopt);
  const EpilogueOperands epilogue(x, sizes, out_features, second_bias, "none", residual, std::nullopt);

  at::Tensor y = at::empty(sizes, x.options());
  if (y.numel() == 0) {
    return y;
  }
  with_dtypes(x.scalar_type(), [&](auto t, auto c) {
    using T = decltype(t);
    using C = decltype(c);
    const Product<C> first(s1, first_values), second(s2, second_values);
    const Output<T> output(y.mutable_data_ptr<T>(), out_features, out_features, epilogue.pointers<T>(), out_table, nullptr);
    run<T, C>(
        first, second, x.const_data_ptr<T>(), in_table, x.numel() / s1.in_features, token_tile > 0 ? token_tile : kTokenTile<C>,
        hidden.pointers<T>(), between.table(), output);
  });
  return y;
}

}  // namespace padst
