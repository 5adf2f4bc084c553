// y = block_linear(block_linear(x, S1, activation), S2, residual), the hidden features in cache.
//
// A tile of tokens goes through both products before the next begins. Each block row of S1 is finished while its sums are in the
// L1 cache, and becomes part of the panel that S2 reads, in the order in which S2 reads it. In float the hidden features are made
// as lines (line_panel.h): they cost the same wherever they go, and both products are faster than with rows.
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
  // The same for whole groups of tokens, sums in lines: [groups, height, kLanes].
  void multiply_to_lines(int64_t block_row, const LineView& inputs, int64_t groups, float* sums) const {
    const int64_t begin = s.row_pointers[block_row], end = s.row_pointers[block_row + 1], height = s.height(block_row);
    if (begin == end) {
      std::fill_n(sums, groups * height * kLanes, 0.0f);
    }
    for (int64_t block = begin; block < end; ++block) {
      inputs.multiply_to_lines(s, s.block_columns[block], groups, height, blocks.block(block), sums, block > begin);
    }
  }
};

// The hidden features of a tile of tokens, rounded to T as in memory, in rows. A permutation gathers them once they are there.
template <typename T, typename C>
class HiddenRows {
 public:
  static constexpr int64_t kStep = 1;

  HiddenRows(
      const Product<C>& first, const BlockMatrix& second, const Epilogue<T>& epilogue, const int32_t* permutation, int64_t tile)
      : first_(first),
        epilogue_(epilogue),
        features_(second.in_features),
        stride_(round_up(first.s.rows, kLanes)),
        direct_(std::is_same_v<T, C> && permutation == nullptr),
        sums_(tile * stride_),
        rows_(direct_ ? 0 : tile * features_),
        tile_(second, rows_.data(), permutation, tile) {}

  // The outputs of a block row of the first product.
  template <typename Inputs>
  void add(int64_t block_row, const Inputs& inputs, int64_t tokens) {
    first_.multiply(block_row, inputs, tokens, sums_.data(), stride_);
    const Range part = first_.outputs(block_row);
    for (int64_t t = 0; t < tokens; ++t) {
      finish_row(sums_.data() + t * stride_, epilogue_.from(part.begin, 0), part.size(), row(t) + part.begin);
    }
  }

  // The panel of all of them.
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

  const Product<C>& first_;
  Epilogue<T> epilogue_;
  int64_t features_, stride_;
  bool direct_;
  Scratch<float> sums_;  // of a block row: [tokens, block rows]
  Scratch<T> rows_;
  TokenTile<T, C> tile_;
};

// The same in lines, from lines: each block row goes to where the second product reads it.
template <typename T>
class HiddenLines {
 public:
  static constexpr int64_t kStep = kLanes;

  HiddenLines(
      const Product<float>& first, const BlockMatrix& second, const Epilogue<T>& epilogue, const int32_t* permutation, int64_t tile)
      : first_(first),
        epilogue_(epilogue),
        panel_(permutation, second.in_features, tile),
        stride_(round_up(first.s.rows, kLanes)),
        sums_(round_up(tile, kLanes) * stride_) {}

  void add(int64_t block_row, const LineView& inputs, int64_t tokens) {
    const int64_t rest = tokens % kLanes, in_lines = rest < kWorthALine ? tokens - rest : round_up(tokens, kLanes);
    with_activation(epilogue_.activation, [&](auto activation) {
      const auto finish = [=, bias = epilogue_.bias](Vec z, int64_t feature) { return rounded<T>(activation(z + bias[feature])); };
      add_lines(block_row, inputs, in_lines / kLanes, finish);
      if (in_lines < tokens) {
        add_rows(block_row, inputs.from(in_lines), in_lines, rest, finish);
      }
    });
  }

  LineView panel(int64_t) const {
    return panel_.view();
  }

 private:
  static constexpr int64_t kWorthALine = 12;  // tokens; fewer are faster as rows, transposed

  template <typename Finish>
  void add_lines(int64_t block_row, const LineView& inputs, int64_t groups, const Finish& finish) {
    const Range part = first_.outputs(block_row);
    first_.multiply_to_lines(block_row, inputs, groups, sums_.data());
    for (int64_t group = 0; group < groups; ++group) {
      panel_.store_lines(sums_.data() + group * part.size() * kLanes, group * kLanes, part, finish);
    }
  }

  template <typename Finish>
  void add_rows(int64_t block_row, const LineView& inputs, int64_t token, int64_t tokens, const Finish& finish) {
    first_.multiply(block_row, inputs, tokens, sums_.data(), stride_);
    panel_.store(sums_.data(), stride_, token, tokens, first_.outputs(block_row), finish);
  }

  const Product<float>& first_;
  Epilogue<T> epilogue_;
  LinePanel panel_;
  int64_t stride_;
  Scratch<float> sums_;  // of a block row: [groups, block rows, kLanes], or [tokens, block rows]
};

template <typename Inputs, typename Hidden, typename T, typename C>
void run(
    const Product<C>& first, const Product<C>& second, const T* x, const int32_t* input_permutation, int64_t total_tokens,
    int64_t token_tile, const Epilogue<T>& between, const int32_t* between_table, const Output<T>& output) {
  const int64_t tile = balanced_tile(total_tokens, token_tile, at::get_num_threads(), std::max(Inputs::kStep, Hidden::kStep));
  const int64_t stride = padded_stride(second.s.out_features);
  at::parallel_for(0, ceil_div(total_tokens, tile), 1, [&](int64_t begin, int64_t end) {
    const MicroKernelScope<C> scope;
    Inputs inputs(first.s, x, input_permutation, tile);
    Hidden hidden(first, second.s, between, between_table, tile);
    const Scratch<float> sums(tile * stride);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t start = item * tile, tokens = std::min(tile, total_tokens - start);
      inputs.load(start, tokens);
      for (int64_t row = 0; row < first.s.block_rows; ++row) {
        hidden.add(row, inputs.panel(), tokens);
      }
      const auto& panel = hidden.panel(tokens);
      for (int64_t row = 0; row < second.s.block_rows; ++row) {
        second.multiply(row, panel, tokens, sums.data() + row * second.s.rows, stride);
      }
      output.finish(start, tokens, sums.data(), stride, {0, second.s.out_features});
    }
  });
}

// visit(tags with the types of inputs and of hidden features): lines in float, also where no table asks for them.
template <typename T, typename C, typename Visit>
void with_layout(int64_t tokens, const Visit& visit) {
  if constexpr (kHasLines && std::is_same_v<C, float>) {
    if (tokens >= kFewTokens) {
      return visit(Tag<LineTile<T>>{}, Tag<HiddenLines<T>>{});
    }
  }
  visit(Tag<TokenTile<T, C>>{}, Tag<HiddenRows<T, C>>{});
}

}  // namespace

at::Tensor block_mlp(
    const at::Tensor& x_in, const at::Tensor& first_values_in, const at::Tensor& first_row_pointers,
    const at::Tensor& first_columns, const OptionalTensor& first_bias, const OptionalTensor& first_input_permutation,
    int64_t hidden_features, const at::Tensor& second_values_in, const at::Tensor& second_row_pointers,
    const at::Tensor& second_columns, const OptionalTensor& second_bias,
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
    with_layout<T, C>(tokens, [&](auto inputs, auto between) {
      run<typename decltype(inputs)::Type, typename decltype(between)::Type>(
          first, second, x.const_data_ptr<T>(), in_table, tokens, tile, hidden.pointers<T>(), between_table, output);
    });
  });
  return y;
}

}  // namespace padst
