// Registers the native kernels as torch.ops.padst_native.*.
#include <ATen/core/enum_tag.h>
#include <torch/library.h>

#include "kernels.h"

TORCH_LIBRARY(padst_native, m) {
  m.def("block_linear_supports(ScalarType dtype) -> bool", &padst::block_linear_supports);
  m.def("block_linear_interleaves(ScalarType dtype) -> bool", &padst::block_linear_interleaves);
  m.def("panel_tokens() -> int", &padst::panel_tokens);
  m.def("handful_of_tokens() -> int", &padst::handful_of_tokens);
  m.def("nm_linear_supports(ScalarType dtype) -> bool", &padst::row_gather_supports);
  m.def("diagonal_linear_supports(ScalarType dtype) -> bool", &padst::row_gather_supports);

  // Contiguous inputs spare the kernels a copy; Inductor would otherwise pass whatever strides it finds.
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag, at::Tag::needs_contiguous_strides};
  m.def(
      "interleave_blocks(Tensor values, Tensor row_pointers, Tensor columns, int in_features, int out_features) -> Tensor", tags);
  m.def(
      "block_linear(Tensor x, Tensor values, Tensor row_pointers, Tensor columns, Tensor? bias, "
      "Tensor? input_permutation, Tensor? output_permutation, int out_features, str activation=\"none\", "
      "Tensor? residual=None, Tensor? gate=None, int token_tile=0) -> Tensor",
      tags);
  m.def(
      "block_mlp(Tensor x, Tensor first_values, Tensor first_row_pointers, Tensor first_columns, Tensor? first_bias, "
      "Tensor? first_input_permutation, int hidden_features, Tensor second_values, "
      "Tensor second_row_pointers, Tensor second_columns, Tensor? second_bias, Tensor? second_input_permutation, "
      "Tensor? second_output_permutation, int out_features, str activation=\"none\", Tensor? residual=None, "
      "int token_tile=0) -> Tensor",
      tags);
  m.def(
      "block_input_gradient(Tensor grad, Tensor values, Tensor row_pointers, Tensor columns, int in_features, "
      "Tensor? input_permutation=None, Tensor? output_permutation=None, int token_tile=0) -> Tensor",
      tags);
  m.def(
      "block_value_gradient(Tensor grad, Tensor x, Tensor row_pointers, Tensor columns, int block_rows, int block_columns, "
      "Tensor? input_permutation=None, Tensor? output_permutation=None) -> Tensor",
      tags);
  m.def(
      "nm_linear(Tensor x, Tensor values, Tensor offsets, Tensor? bias, Tensor? input_permutation, "
      "Tensor? output_permutation, int out_features, int n, int m, str activation=\"none\", Tensor? residual=None, "
      "Tensor? gate=None, SymInt[]? panels_of=None, bool to_panels=False) -> Tensor",
      tags);
  m.def(
      "diagonal_linear(Tensor x, Tensor values, Tensor offsets, Tensor? bias, Tensor? input_permutation, "
      "Tensor? output_permutation, int out_features, str activation=\"none\", Tensor? residual=None, "
      "Tensor? gate=None, SymInt[]? panels_of=None, bool to_panels=False) -> Tensor",
      tags);
  m.def(
      "nm_input_gradient(Tensor grad, Tensor values, Tensor offsets, int in_features, int n, int m, "
      "Tensor? grad_permutation=None, Tensor? result_permutation=None) -> Tensor",
      tags);
  m.def(
      "nm_value_gradient(Tensor grad, Tensor x, Tensor offsets, int n, int m, int vector, Tensor? input_permutation=None, "
      "Tensor? output_permutation=None) -> Tensor",
      tags);
  m.def(
      "diagonal_value_gradient(Tensor grad, Tensor x, Tensor offsets, Tensor? input_permutation=None, "
      "Tensor? output_permutation=None) -> Tensor",
      tags);
}

TORCH_LIBRARY_IMPL(padst_native, CPU, m) {
  m.impl("interleave_blocks", &padst::interleave_blocks);
  m.impl("block_linear", &padst::block_linear);
  m.impl("block_mlp", &padst::block_mlp);
  m.impl("block_input_gradient", &padst::block_input_gradient);
  m.impl("block_value_gradient", &padst::block_value_gradient);
  m.impl("nm_linear", &padst::nm_linear);
  m.impl("diagonal_linear", &padst::diagonal_linear);
  m.impl("nm_input_gradient", &padst::nm_input_gradient);
  m.impl("nm_value_gradient", &padst::nm_value_gradient);
  m.impl("diagonal_value_gradient", &padst::diagonal_value_gradient);
}
