// The operators of the library. Each computes y = act(permute_out(S permute_in(x)) + bias) * gate + residual over the last axis
// of x; activation.h has the names of activations. gate and residual are laid out like y.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>

namespace padst {

bool block_linear_supports(at::ScalarType dtype);
bool row_gather_supports(at::ScalarType dtype);

// Whether block_linear is faster with interleaved values of this dtype, because its micro-kernel reads them so.
bool block_linear_interleaves(at::ScalarType dtype);

// values [blocks, block columns, rows] -> [blocks, block columns / 2, rows, 2] for an even number of columns; weights of inputs
// beyond in_features become zero.
at::Tensor interleave_blocks(
    const at::Tensor& values, const at::Tensor& row_pointers, const at::Tensor& columns, int64_t in_features,
    int64_t out_features);

// S in block compressed rows: row_pointers [block rows + 1], columns [blocks], values [blocks, block columns, rows], or the same
// interleaved.
// token_tile: tokens that are worked on at a time, 0 for the default; a matter of speed alone.
at::Tensor block_linear(
    const at::Tensor& x, const at::Tensor& values, const at::Tensor& row_pointers, const at::Tensor& columns,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& input_permutation,
    const std::optional<at::Tensor>& output_permutation, int64_t out_features, std::string_view activation,
    const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& gate, int64_t token_tile);

// block_linear(h, second ..) + residual with h = act(block_linear(x, first ..)), rounded to the dtype of x as if it were a tensor.
at::Tensor block_mlp(
    const at::Tensor& x, const at::Tensor& first_values, const at::Tensor& first_row_pointers, const at::Tensor& first_columns,
    const std::optional<at::Tensor>& first_bias, const std::optional<at::Tensor>& first_input_permutation,
    int64_t hidden_features, const at::Tensor& second_values,
    const at::Tensor& second_row_pointers, const at::Tensor& second_columns, const std::optional<at::Tensor>& second_bias,
    const std::optional<at::Tensor>& second_input_permutation, const std::optional<at::Tensor>& second_output_permutation,
    int64_t out_features, std::string_view activation, const std::optional<at::Tensor>& residual, int64_t token_tile);

// The gradient of the inputs of block_linear: grad [.., out_features], and its permutations.
at::Tensor block_input_gradient(
    const at::Tensor& grad, const at::Tensor& values, const at::Tensor& row_pointers, const at::Tensor& columns,
    int64_t in_features, const std::optional<at::Tensor>& input_permutation, const std::optional<at::Tensor>& output_permutation,
    int64_t token_tile);

// The gradient of the values of block_linear: grad [tokens, out_features], x [tokens, in_features], and its permutations.
at::Tensor block_value_gradient(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& row_pointers, const at::Tensor& columns, int64_t block_rows,
    int64_t block_columns, const std::optional<at::Tensor>& input_permutation,
    const std::optional<at::Tensor>& output_permutation);

// Tokens in a panel. The two kernels below can leave their activations to each other in feature-major panels, see panels.h:
// panels_of says that x is such, of tokens with these sizes; to_panels asks for such a result.
int64_t panel_tokens();

// Up to so many tokens outside panels are multiplied without transposing them, see few_tokens.h.
int64_t handful_of_tokens();

// S with n of every m inputs: offsets uint8 [row groups, slots], values [row groups, slots, vector].
at::Tensor nm_linear(
    const at::Tensor& x, const at::Tensor& values, const at::Tensor& offsets, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& input_permutation, const std::optional<at::Tensor>& output_permutation,
    int64_t out_features, int64_t n, int64_t m, std::string_view activation, const std::optional<at::Tensor>& residual,
    const std::optional<at::Tensor>& gate, at::OptionalIntArrayRef panels_of, bool to_panels);

// permute_result(permute_grad(grad) S) for such an S, grad [.., out_features]: undoing the permutations of nm_linear takes their
// inverses.
at::Tensor nm_input_gradient(
    const at::Tensor& grad, const at::Tensor& values, const at::Tensor& offsets, int64_t in_features, int64_t n, int64_t m,
    const std::optional<at::Tensor>& grad_permutation, const std::optional<at::Tensor>& result_permutation);

// The gradient of the values of nm_linear: grad [tokens, out_features], x [tokens, in_features], and its permutations.
at::Tensor nm_value_gradient(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& offsets, int64_t n, int64_t m, int64_t vector,
    const std::optional<at::Tensor>& input_permutation, const std::optional<at::Tensor>& output_permutation);

// S as wrapped diagonals: offsets [diagonals] ascending, values [diagonals, min(in, out)].
at::Tensor diagonal_linear(
    const at::Tensor& x, const at::Tensor& values, const at::Tensor& offsets, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& input_permutation, const std::optional<at::Tensor>& output_permutation,
    int64_t out_features, std::string_view activation, const std::optional<at::Tensor>& residual,
    const std::optional<at::Tensor>& gate, at::OptionalIntArrayRef panels_of, bool to_panels);

// The gradient of its values; grad [tokens, out_features], x [tokens, in_features], and its permutations. That of x is the
// product with S.T, which is a matrix of diagonals too.
at::Tensor diagonal_value_gradient(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& offsets, const std::optional<at::Tensor>& input_permutation,
    const std::optional<at::Tensor>& output_permutation);

}  // namespace padst
