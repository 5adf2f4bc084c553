// y = act(permute_out(S permute_in(x)) + bias) * gate + residual for block-sparse S: one batch-reduce GEMM call per active block.
//
// Work is cut into token tiles. A tile of x is copied (and permuted) into scratch once, where it stays in cache while every
// block row reads it; its outputs collect in scratch too, and leave as whole rows.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "block_matrix.h"
#include "checks.h"
#include "epilogue.h"
#include "kernels.h"
#include "micro_kernel.h"
#include "packed_gather.h"
#include "partition.h"
#include "rows.h"

namespace padst {
namespace {

// Tokens per tile by default: a tile of outputs in float should stay in L2, and tiles feed 16-bit matrix units with more tokens.
template <typename C>
constexpr int64_t kTokenTile = MicroKernel<C>::kPairs ? 64 : 32;

// Whether values are interleaved already: [blocks, block columns / 2, block rows, 2].
bool is_interleaved(const at::Tensor& values) {
  return values.dim() == 4;
}

BlockMatrix describe(
    int64_t in_features, const at::Tensor& values, const at::Tensor& row_pointers, const at::Tensor& columns,
    int64_t out_features) {
  const bool interleaved = is_interleaved(values);
  TORCH_CHECK(
      (values.dim() == 3 || (interleaved && values.size(3) == 2)) && values.size(1) > 0 && values.size(2) > 0,
      "values must be [blocks, block columns, block rows], or interleaved, got ", values.sizes());
  TORCH_CHECK(columns.numel() == values.size(0), "columns has ", columns.numel(), " entries for ", values.size(0), " blocks");
  const int64_t width = values.size(1) * (interleaved ? 2 : 1);
  return describe_blocks(in_features, out_features, values.size(2), width, row_pointers, columns);
}

// The blocks of S as the micro-kernel for C reads them.
template <typename C>
struct PackedBlocks {
  const C* data;
  int64_t stride;  // elements from one block to the next
};

// values [blocks, columns, rows] -> [blocks, ceil(columns / 2), rows, 2]. Inputs beyond in_features get weight zero, because
// the even depth of the micro-kernel may reach one of them.
template <typename C>
void interleave_blocks(const BlockMatrix& s, const C* values, C* packed) {
  const int64_t pairs = ceil_div(s.columns, 2);
  const Scratch<C> zeros(s.rows);
  std::fill_n(zeros.data(), s.rows, C(0.0f));
  at::parallel_for(0, s.blocks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t width = s.width(s.block_columns[block]);
      for (int64_t pair = 0; pair < ceil_div(width, 2); ++pair) {
        const C* even = values + (block * s.columns + 2 * pair) * s.rows;
        const C* odd = 2 * pair + 1 < width ? even + s.rows : zeros.data();
        interleave(even, odd, s.rows, packed + (block * pairs + pair) * 2 * s.rows);
      }
    }
  });
}

// A tile of x, permuted where asked for, in rows whose distance keeps them out of each other's cache sets.
template <typename T, typename C>
class TokenTile {
 public:
  TokenTile(const BlockMatrix& s, const T* x, const int32_t* permutation, int64_t tile)
      : x_(x),
        permuted_(permutation != nullptr),
        gather_(permutation, s.in_features),
        features_(s.in_features),
        stride_(round_up(s.in_features, kLine) + kLine),
        scratch_(tile * stride_),
        converted_(permuted_ && !kSame ? kGroup * stride_ : 0) {}

  void load(int64_t first, int64_t tokens) {
    for (int64_t t = 0; t < tokens; t += kGroup) {
      load_group(x_ + (first + t) * features_, std::min(kGroup, tokens - t), scratch_.data() + t * stride_);
    }
  }

  const C* data() const {
    return scratch_.data();
  }
  int64_t stride() const {
    return stride_;
  }

 private:
  static constexpr int64_t kLine = kCacheLine / sizeof(C), kGroup = PackedGather<C>::kRows;
  static constexpr bool kSame = std::is_same_v<T, C>;

  void load_group(const T* source, int64_t tokens, C* target) {
    if (!permuted_) {
      convert_group(source, tokens, target);
    } else if constexpr (kSame) {
      gather_.pack(source, features_, tokens);
      gather_.unpack({0, features_}, target, stride_, tokens);
    } else {
      convert_group(source, tokens, converted_.data());
      gather_.pack(converted_.data(), stride_, tokens);
      gather_.unpack({0, features_}, target, stride_, tokens);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      target[t * stride_ + features_] = C(0.0f);  // an odd number of inputs has a partner for its last
    }
  }

  void convert_group(const T* source, int64_t tokens, C* target) const {
    for (int64_t t = 0; t < tokens; ++t) {
      convert(source + t * features_, features_, target + t * stride_);
    }
  }

  const T* x_;
  bool permuted_;
  PackedGather<C> gather_;
  int64_t features_;
  int64_t stride_;
  Scratch<C> scratch_;
  Scratch<C> converted_;
};

// z [tokens, height] = one block row of S times the tile.
template <typename T, typename C>
void multiply_block_row(
    const BlockMatrix& s, const PackedBlocks<C>& blocks, int64_t block_row, const TokenTile<T, C>& inputs, int64_t tokens,
    float* z, int64_t z_stride) {
  const int64_t first = s.row_pointers[block_row], last = s.row_pointers[block_row + 1], height = s.height(block_row);
  if (first == last) {
    for (int64_t t = 0; t < tokens; ++t) {
      std::fill_n(z + t * z_stride, height, 0.0f);
    }
  }
  for (int64_t block = first; block < last; ++block) {
    const int64_t column = s.block_columns[block];
    MicroKernel<C>::multiply(
        tokens, height, round_up(s.width(column), MicroKernel<C>::kStep), inputs.data() + column * s.columns, inputs.stride(),
        blocks.data + block * blocks.stride, s.rows, z, z_stride, block > first);
  }
}

// Where outputs go, and what happens to them on the way.
template <typename T>
class Output {
 public:
  Output(T* y, int64_t features, const Epilogue<T>& epilogue, const int32_t* permutation, const int32_t* target)
      : y_(y), features_(features), epilogue_(epilogue), permutation_(permutation), target_(target) {}

  // The outputs `part` of S for some tokens: all of them, unless workers share a row. z has them in rows `stride` apart.
  void finish(int64_t first, int64_t tokens, const float* z, int64_t stride, Range part) const {
    if (permutation_ == nullptr) {
      finish_in_order(first, tokens, z, stride, part);
    } else if (target_ == nullptr) {
      gather(first, tokens, z, stride);
    } else {
      scatter(first, tokens, z, stride, part);
    }
  }

 private:
  static constexpr int64_t kPart = 512;  // permuted outputs wait in L1 for the rest

  void finish_in_order(int64_t first, int64_t tokens, const float* z, int64_t stride, Range part) const {
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t element = (first + t) * features_ + part.begin;
      finish_row(z + t * stride, epilogue_.from(part.begin, element), part.size(), y_ + element);
    }
  }

  void scatter(int64_t first, int64_t tokens, const float* z, int64_t stride, Range part) const {
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t row = (first + t) * features_;
      scatter_row(z + t * stride, epilogue_.from(0, row), target_ + part.begin, part.size(), y_ + row);
    }
  }

  void gather(int64_t first, int64_t tokens, const float* z, int64_t stride) const {
    PackedGather<float> words(permutation_, features_);
    const Scratch<float> rows(words.kRows * kPart);
    for (int64_t t = 0; t < tokens; t += words.kRows) {
      const int64_t count = std::min(words.kRows, tokens - t);
      words.pack(z + t * stride, stride, count);
      for (int64_t j = 0; j < features_; j += kPart) {
        const Range part{j, std::min(j + kPart, features_)};
        words.unpack(part, rows.data(), kPart, count);
        finish_in_order(first + t, count, rows.data(), kPart, part);
      }
    }
  }

  T* y_;
  int64_t features_;
  Epilogue<T> epilogue_;
  const int32_t* permutation_;  // y[j] = z[permutation[j]], or nullptr
  const int32_t* target_;       // its inverse where workers share a row, else nullptr
};

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

template <typename T, typename C>
void run(
    const BlockMatrix& s, const PackedBlocks<C>& blocks, const T* x, const int32_t* permutation, int64_t total_tokens,
    int64_t token_tile, const Output<T>& output, const std::vector<int64_t>& bounds) {
  const int64_t threads = at::get_num_threads(), parts = static_cast<int64_t>(bounds.size()) - 1;
  const int64_t tile = balanced_tile(total_tokens, token_tile, threads);
  const int64_t z_stride = round_up(s.out_features, kLanes) + kLanes;  // off the power of two that would share cache sets
  at::parallel_for(0, ceil_div(total_tokens, tile) * parts, 1, [&](int64_t begin, int64_t end) {
    const MicroKernelScope<C> scope;
    TokenTile<T, C> inputs(s, x, permutation, tile);
    const Scratch<float> z(tile * z_stride);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / parts * tile, tokens = std::min(tile, total_tokens - first), part = item % parts;
      inputs.load(first, tokens);
      for (int64_t block_row = bounds[part]; block_row < bounds[part + 1]; ++block_row) {
        multiply_block_row(s, blocks, block_row, inputs, tokens, z.data() + block_row * s.rows, z_stride);
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
  TORCH_CHECK(!is_interleaved(values) || MicroKernel<C>::kPairs, "no micro-kernel reads interleaved blocks of ", x.scalar_type());
  const at::Tensor operand = values.to(c10::CppTypeToScalarType<C>::value);
  const int64_t stride = round_up(s.columns, MicroKernel<C>::kStep) * s.rows;
  PackedBlocks<C> blocks{operand.const_data_ptr<C>(), stride};
  const bool interleave = MicroKernel<C>::kPairs && !is_interleaved(values);
  const Scratch<C> packed(interleave ? s.blocks() * stride : 0);
  if constexpr (MicroKernel<C>::kPairs) {
    if (interleave) {
      interleave_blocks(s, blocks.data, packed.data());
      blocks.data = packed.data();
    }
  }
  const int64_t tokens = x.numel() / s.in_features, threads = at::get_num_threads();
  const int64_t tile = token_tile > 0 ? token_tile : kTokenTile<C>;
  const bool few_tokens = tokens < threads * tile;
  const std::vector<int64_t> bounds = split_block_rows(s, few_tokens ? std::min(threads, s.block_rows) : 1);
  std::vector<int32_t> target;
  if (output_permutation != nullptr && bounds.size() > 2) {
    target = inverse_permutation(output_permutation, s.out_features, "output_permutation");
  }
  const Output<T> output(
      y.mutable_data_ptr<T>(), s.out_features, epilogue.pointers<T>(), output_permutation, target.empty() ? nullptr : target.data());
  run<T, C>(s, blocks, x.const_data_ptr<T>(), input_permutation, tokens, tile, output, bounds);
}

// The dispatch for T, with its own micro-kernel or, where it has none, float's.
template <typename T>
auto dispatch_for() {
  return has_micro_kernel<T>() ? dispatch<T, T> : dispatch<T, float>;
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
  const auto kernel = x.scalar_type() == at::kFloat ? dispatch_for<float>()
      : x.scalar_type() == at::kBFloat16            ? dispatch_for<at::BFloat16>()
                                                    : dispatch_for<at::Half>();
  kernel(s, x, values, epilogue, in_table, out_table, token_tile, y);
  return y;
}

}  // namespace padst
