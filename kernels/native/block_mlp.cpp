// y = block_linear(block_linear(x, S1, activation), S2, residual), the hidden features in cache.
//
// A tile of tokens goes through both products before the next begins. Each block row of S1 is finished while its sums are in the
// L1 cache, and becomes part of the panel that S2 reads, in the order in which S2 reads it.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "block_product.h"
#include "kernels.h"

namespace padst {
namespace {

// One of the two matrices.
template <typename C>
struct Product {
  const BlockMatrix& s;
  PackedBlocks<C> blocks;

  Product(const BlockMatrix& s, const at::Tensor& values) : s(s), blocks(s, values) {}

  Range outputs(int64_t block_row) const {
    return {block_row * s.rows, block_row * s.rows + s.height(block_row)};
  }
  template <typename Inputs>
  void multiply(int64_t block_row, const Inputs& inputs, int64_t tokens, float* sums, int64_t stride) const {
    multiply_block_row(s, blocks, block_row, inputs, tokens, sums, stride);
  }
};

// The hidden features of a tile of tokens, rounded to T as in memory, in rows. A permutation gathers them once they are there.
template <typename T, typename C>
class HiddenRows {
 public:
  static constexpr int64_t kStep = 1;

  HiddenRows(const BlockMatrix& second, const Epilogue<T>& epilogue, const int32_t* permutation, int64_t tile)
      : features_(second.in_features),
        epilogue_(epilogue),
        direct_(std::is_same_v<T, C> && permutation == nullptr),
        rows_(direct_ ? 0 : tile * features_),
        tile_(second, rows_.data(), permutation, tile) {}

  // Some features of all tokens, from their sums in rows `stride` apart.
  void finish(Range part, int64_t tokens, const float* sums, int64_t stride) {
    for (int64_t t = 0; t < tokens; ++t) {
      finish_row(sums + t * stride, epilogue_.from(part.begin, 0), part.size(), row(t) + part.begin);
    }
  }

  // The panel of what was finished.
  const Panel<C>& panel(int64_t tokens) {
    if (!direct_) {
      tile_.load(0, tokens);
    }
    return tile_.panel();
  }

 private:
  T* row(int64_t token) const {
    if constexpr (std::is_same_v<T, C>) {
      if (direct_) {
        return tile_.panel().row(token);
      }
    }
    return rows_.data() + token * features_;
  }

  int64_t features_;
  Epilogue<T> epilogue_;
  bool direct_;
  Scratch<T> rows_;
  TokenTile<T, C> tile_;
};

// The same in lines: each block row goes to where the second product reads it.
template <typename T>
class HiddenLines {
 public:
  static constexpr int64_t kStep = kLanes;

  HiddenLines(const BlockMatrix& second, const Epilogue<T>& epilogue, const int32_t* permutation, int64_t tile)
      : epilogue_(epilogue), panel_(permutation, second.in_features, tile) {}

  void finish(Range part, int64_t tokens, const float* sums, int64_t stride) {
    with_activation(epilogue_.activation, [&](auto activation) {
      const auto finish = [=, bias = epilogue_.bias](Vec z, int64_t feature) { return rounded<T>(activation(z + bias[feature])); };
      for (int64_t first = 0; first < tokens; first += kLanes) {
        panel_.store(sums + first * stride, stride, first, std::min<int64_t>(kLanes, tokens - first), part, finish);
      }
    });
  }

  const LinePanel& panel(int64_t) const {
    return panel_;
  }

 private:
  Epilogue<T> epilogue_;
  LinePanel panel_;
};

template <typename Inputs, typename Hidden, typename T, typename C>
void run(
    const Product<C>& first, const Product<C>& second, const T* x, const int32_t* input_permutation, int64_t total_tokens,
    int64_t token_tile, const Epilogue<T>& between, const int32_t* between_table, const Output<T>& output) {
  const int64_t tile = balanced_tile(total_tokens, token_tile, at::get_num_threads(), std::max(Inputs::kStep, Hidden::kStep));
  const int64_t first_stride = round_up(first.s.rows, kLanes), stride = sums_stride(second.s);
  at::parallel_for(0, ceil_div(total_tokens, tile), 1, [&](int64_t begin, int64_t end) {
    const MicroKernelScope<C> scope;
    Inputs inputs(first.s, x, input_permutation, tile);
    Hidden hidden(second.s, between, between_table, tile);
    const Scratch<float> sums(tile * std::max(first_stride, stride));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t start = item * tile, tokens = std::min(tile, total_tokens - start);
      inputs.load(start, tokens);
      for (int64_t row = 0; row < first.s.block_rows; ++row) {
        first.multiply(row, inputs.panel(), tokens, sums.data(), first_stride);
        hidden.finish(first.outputs(row), tokens, sums.data(), first_stride);
      }
      const auto& panel = hidden.panel(tokens);
      for (int64_t row = 0; row < second.s.block_rows; ++row) {
        second.multiply(row, panel, tokens, sums.data() + row * second.s.rows, stride);
      }
      output.finish(start, tokens, sums.data(), stride, {0, second.s.out_features});
    }
  });
}

// visit(a tag with the type of hidden features), chosen as tiles of x are.
template <typename T, typename C, typename Visit>
void with_hidden(const int32_t* permutation, int64_t tokens, const Visit& visit) {
  with_tile<T, C>(permutation, tokens, [&](auto tile) {
    if constexpr (std::is_same_v<decltype(tile), Tag<LineTile<T>>>) {
      visit(Tag<HiddenLines<T>>{});
    } else {
      visit(Tag<HiddenRows<T, C>>{});
    }
  });
}

}  // namespace

at::Tensor block_mlp(
    const at::Tensor& x_in, const at::Tensor& first_values_in, const at::Tensor& first_row_pointers,
    const at::Tensor& first_columns, const OptionalTensor& first_bias, const OptionalTensor& first_input_permutation,
    int64_t hidden_features, const at::Tensor& second_values_in, const at::Tensor& second_row_pointers, const at::Tensor& second_columns, const OptionalTensor& second_bias,
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
  const int32_t* between_table = permutation_pointer(second_input_permutation, hidden_features, "second_input_permutation");
  const std::vector<int64_t> hidden_sizes = output_sizes(x, hidden_features), sizes = output_sizes(x, out_features);
  const EpilogueOperands hidden(x, hidden_sizes, hidden_features, first_bias, activation, std::nullopt, std::nullopt);
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
    const int64_t tokens = x.numel() / s1.in_features, tile = token_tile > 0 ? token_tile : kTokenTile<C>;
    with_tile<T, C>(in_table, tokens, [&](auto inputs) {
      with_hidden<T, C>(between_table, tokens, [&](auto between) {
        run<typename decltype(inputs)::Type, typename decltype(between)::Type>(
            first, second, x.const_data_ptr<T>(), in_table, tokens, tile, hidden.pointers<T>(), between_table, output);
      });
    });
  });
  return y;
}

}  // namespace padst
