// y = act(permute_out(S permute_in(x)) + bias) * gate + residual for block-sparse S: one batch-reduce GEMM call per active block.
//
// Work is cut into token tiles. A tile of x is copied (and permuted) into scratch once, where it stays in cache while every
// block row reads it; its outputs collect in scratch too, and leave as whole rows.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "block_product.h"
#include "kernels.h"

namespace padst {
namespace {

// The first block row of each of `parts` parts with about equal work; an empty block row costs about a tenth of a block.
std::vector<int64_t> split_block_rows(const BlockMatrix& s, int64_t parts) {
  std::vector<int64_t> bounds(parts + 1, s.block_rows);
  const auto work = [&](int64_t block_row) { return 10 * int64_t{s.row_pointers[block_row]} + block_row; };
  int64_t block_row = 0;
  for (int64_t part = 0; part < parts; ++part) {
    while (block_row < s.block_rows && work(block_row) * parts < work(s.block_rows) * part) {
      ++block_row;
    }
    bounds[part] = block_row;
  }
  return bounds;
}

template <typename Tile, typename T, typename C>
void run(
    const BlockMatrix& s, const PackedBlocks<C>& blocks, const T* x, const int32_t* permutation, int64_t total_tokens,
    int64_t token_tile, const Output<T>& output, const std::vector<int64_t>& bounds) {
  const int64_t threads = at::get_num_threads(), parts = static_cast<int64_t>(bounds.size()) - 1;
  const int64_t tile = balanced_tile(total_tokens, token_tile, threads, Tile::kStep);
  const int64_t z_stride = padded_stride(s.out_features);
  at::parallel_for(0, ceil_div(total_tokens, tile) * parts, 1, [&](int64_t begin, int64_t end) {
    const MicroKernelScope<C> scope;
    Tile inputs(s, x, permutation, tile);
    const Scratch<float> z(tile * z_stride);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / parts * tile, tokens = std::min(tile, total_tokens - first), part = item % parts;
      inputs.load(first, tokens);
      for (int64_t block_row = bounds[part]; block_row < bounds[part + 1]; ++block_row) {
        multiply_block_row(s, blocks, block_row, inputs.panel(), tokens, z.data() + block_row * s.rows, z_stride);
      }
      const Range rows{bounds[part] * s.rows, std::min(bounds[part + 1] * s.rows, s.out_features)};
      output.finish(first, tokens, z.data() + rows.begin, z_stride, rows);
    }
  });
}

// T: dtype of x, values and y. C: dtype of the micro-kernel, float where there is none for T.
template <typename T, typename C>
void dispatch(
    const BlockMatrix& s, const at::Tensor& x, const at::Tensor& values, const EpilogueOperands& epilogue,
    const int32_t* input_permutation, const int32_t* output_permutation, int64_t token_tile, at::Tensor& y) {
  const PackedBlocks<C> blocks(s, values);
  const int64_t tokens = x.numel() / s.in_features, threads = at::get_num_threads();
  const int64_t tile = token_tile > 0 ? token_tile : kTokenTile<C>;
  const bool few_tokens = tokens < threads * tile;
  const std::vector<int64_t> bounds = split_block_rows(s, few_tokens ? std::min(threads, s.block_rows) : 1);
  std::vector<int32_t> target;
  if (output_permutation != nullptr && bounds.size() > 2) {
    target = inverse_permutation(output_permutation, s.out_features, "output_permutation");
  }
  const Output<T> output(
      y.mutable_data_ptr<T>(), s.out_features, s.out_features, epilogue.pointers<T>(), output_permutation,
      target.empty() ? nullptr : target.data());
  with_tile<T, C>(input_permutation, tokens, [&](auto tag) {
    using Tile = typename decltype(tag)::Type;
    run<Tile>(s, blocks, x.const_data_ptr<T>(), input_permutation, tokens, tile, output, bounds);
  });
}

template <typename T>
at::Tensor interleaved(const BlockMatrix& s, const at::Tensor& values) {
  at::Tensor packed = at::empty({s.blocks(), ceil_div(s.columns, 2), s.rows, 2}, values.options());
  interleave_blocks(s, values.const_data_ptr<T>(), packed.mutable_data_ptr<T>());
  return packed;
}

}  // namespace

bool block_linear_interleaves(at::ScalarType dtype) {
  return (dtype == at::kBFloat16 && has_micro_kernel<at::BFloat16>()) || (dtype == at::kHalf && has_micro_kernel<at::Half>());
}

at::Tensor interleave_blocks(
    const at::Tensor& values_in, const at::Tensor& row_pointers, const at::Tensor& columns, int64_t in_features,
    int64_t out_features) {
  const at::Tensor values = values_in.contiguous();
  TORCH_CHECK(values.device().is_cpu() && block_linear_interleaves(values.scalar_type()), "no interleaving for ", values.toString());
  TORCH_CHECK(values.dim() == 3 && values.size(1) % 2 == 0, "values must be [blocks, an even number, rows], got ", values.sizes());
  const BlockMatrix s = describe(in_features, values, row_pointers, columns, out_features);
  return values.scalar_type() == at::kHalf ? interleaved<at::Half>(s, values) : interleaved<at::BFloat16>(s, values);
}

bool block_linear_supports(at::ScalarType dtype) {
  // 16-bit activations are converted where only the float micro-kernel exists.
  return (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf) && has_micro_kernel<float>();
}

at::Tensor block_linear(
    const at::Tensor& x_in, const at::Tensor& values_in, const at::Tensor& row_pointers, const at::Tensor& columns,
    const OptionalTensor& bias, const OptionalTensor& input_permutation, const OptionalTensor& output_permutation,
    int64_t out_features, std::string_view activation, const OptionalTensor& residual, const OptionalTensor& gate,
    int64_t token_tile) {
  check_operands(x_in, values_in, out_features);
  TORCH_CHECK(block_linear_supports(x_in.scalar_type()), "block_linear has no micro-kernel for ", x_in.scalar_type(), " here");
  TORCH_CHECK(token_tile >= 0, "token_tile must not be negative, got ", token_tile);
  const at::Tensor x = x_in.contiguous(), values = values_in.contiguous();
  const BlockMatrix s = describe(x.size(-1), values, row_pointers, columns, out_features);
  const int32_t* in_table = permutation_pointer(input_permutation, s.in_features, "input_permutation");
  const int32_t* out_table = permutation_pointer(output_permutation, out_features, "output_permutation");
  const EpilogueOperands epilogue(x, output_sizes(x, out_features), out_features, bias, activation, residual, gate);

  at::Tensor y = at::empty(output_sizes(x, out_features), x.options());
  if (y.numel() == 0) {
    return y;
  }
  with_dtypes(x.scalar_type(), [&](auto t, auto c) {
    dispatch<decltype(t), decltype(c)>(s, x, values, epilogue, in_table, out_table, token_tile, y);
  });
  return y;
}

}  // namespace padst
