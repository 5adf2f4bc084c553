// The product of a block-sparse S and a tile of tokens, in parts: blocks as the micro-kernel reads them, the tile of inputs, one
// batch-reduce GEMM call per active block, and the outputs on their way out.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "block_matrix.h"
#include "checks.h"
#include "line_panel.h"
#include "micro_kernel.h"
#include "packed_gather.h"
#include "partition.h"
#include "rows.h"
#include "token_output.h"

namespace padst {

// Tokens per tile by default: a tile of outputs in float should stay in L2, and tiles feed 16-bit matrix units with more tokens.
template <typename C>
inline constexpr int64_t kTokenTile = MicroKernel<C>::kPairs ? 64 : 32;

// Whether values are interleaved already: [blocks, block columns / 2, block rows, 2].
inline bool is_interleaved(const at::Tensor& values) {
  return values.dim() == 4;
}

inline BlockMatrix describe(
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

// The blocks of S as the micro-kernel for C reads them; interleaved here where it needs that and they are not.
template <typename C>
class PackedBlocks {
 public:
  PackedBlocks(const BlockMatrix& s, const at::Tensor& values)
      : operand_(values.to(c10::CppTypeToScalarType<C>::value)),
        stride_(round_up(s.columns, MicroKernel<C>::kStep) * s.rows),
        packed_(MicroKernel<C>::kPairs && !is_interleaved(values) ? s.blocks() * stride_ : 0),
        data_(operand_.const_data_ptr<C>()) {
    TORCH_CHECK(
        !is_interleaved(values) || MicroKernel<C>::kPairs, "no micro-kernel reads interleaved blocks of ", values.scalar_type());
    if constexpr (MicroKernel<C>::kPairs) {
      if (!is_interleaved(values)) {
        interleave_blocks(s, data_, packed_.data());
        data_ = packed_.data();
      }
    }
  }

  const C* block(int64_t index) const {
    return data_ + index * stride_;
  }

 private:
  at::Tensor operand_;
  int64_t stride_;  // elements from one block to the next
  Scratch<C> packed_;
  const C* data_;
};

// Operands of the micro-kernel for a tile of tokens, in rows whose distance keeps them out of each other's cache sets.
template <typename C>
class Panel {
 public:
  Panel(int64_t features, int64_t tokens)
      : features_(features), stride_(round_up(features, kLine) + kLine), scratch_(tokens * stride_) {}

  // Ends the row of a token, once it is written: an odd number of inputs has a partner for its last.
  void end_row(int64_t token) {
    row(token)[features_] = C(0.0f);
  }

  // z [tokens, height] (+)= the inputs of a block column times a block.
  void multiply(
      const BlockMatrix& s, int64_t column, int64_t tokens, int64_t height, const C* block, float* z, int64_t z_stride,
      bool add) const {
    MicroKernel<C>::multiply(
        tokens, height, round_up(s.width(column), MicroKernel<C>::kStep), row(0) + column * s.columns, stride_, block, s.rows, z,
        z_stride, add);
  }

  C* row(int64_t token) const {
    return scratch_.data() + token * stride_;
  }
  int64_t stride() const {
    return stride_;
  }

 private:
  static constexpr int64_t kLine = kCacheLine / sizeof(C);

  int64_t features_;
  int64_t stride_;
  Scratch<C> scratch_;
};

template <typename T>
struct Tag {
  using Type = T;
};

// A tile of x, permuted where asked for.
template <typename T, typename C>
class TokenTile {
 public:
  static constexpr int64_t kStep = 1;  // tokens that are as cheap together as fewer

  TokenTile(const BlockMatrix& s, const T* x, const int32_t* permutation, int64_t tile)
      : x_(x),
        permuted_(permutation != nullptr),
        gather_(permutation, s.in_features),
        features_(s.in_features),
        panel_(features_, tile),
        converted_(permuted_ && !kSame ? kGroup * features_ : 0) {}

  void load(int64_t first, int64_t tokens) {
    for (int64_t t = 0; t < tokens; t += kGroup) {
      load_group(x_ + (first + t) * features_, t, std::min(kGroup, tokens - t));
    }
  }

  const Panel<C>& panel() const {
    return panel_;
  }

 private:
  static constexpr int64_t kGroup = PackedGather<C>::kRows;
  static constexpr bool kSame = std::is_same_v<T, C>;

  void load_group(const T* source, int64_t first, int64_t tokens) {
    C* target = panel_.row(first);
    if (!permuted_) {
      convert_group(source, tokens, target, panel_.stride());
    } else if constexpr (kSame) {
      gather_.pack(source, features_, tokens);
      gather_.unpack({0, features_}, target, panel_.stride(), tokens);
    } else {
      convert_group(source, tokens, converted_.data(), features_);
      gather_.pack(converted_.data(), features_, tokens);
      gather_.unpack({0, features_}, target, panel_.stride(), tokens);
    }
    for (int64_t t = first; t < first + tokens; ++t) {
      panel_.end_row(t);
    }
  }

  void convert_group(const T* source, int64_t tokens, C* target, int64_t stride) const {
    for (int64_t t = 0; t < tokens; ++t) {
      convert(source + t * features_, features_, target + t * stride);
    }
  }

  const T* x_;
  bool permuted_;
  PackedGather<C> gather_;
  int64_t features_;
  Panel<C> panel_;
  Scratch<C> converted_;
};

// visit(a tag with the type of tile that suits a layer): lines where inputs are permuted and float, else rows.
template <typename T, typename C, typename Visit>
void with_tile(const int32_t* permutation, int64_t tokens, const Visit& visit) {
  if constexpr (kHasLines && std::is_same_v<C, float>) {
    if (permutation != nullptr && tokens >= kFewTokens) {
      return visit(Tag<LineTile<T>>{});
    }
  }
  visit(Tag<TokenTile<T, C>>{});
}

// z [tokens, height] = one block row of S times a panel.
template <typename C, typename Inputs>
void multiply_block_row(
    const BlockMatrix& s, const PackedBlocks<C>& blocks, int64_t block_row, const Inputs& inputs, int64_t tokens, float* z,
    int64_t z_stride) {
  const int64_t first = s.row_pointers[block_row], last = s.row_pointers[block_row + 1], height = s.height(block_row);
  if (first == last) {
    for (int64_t t = 0; t < tokens; ++t) {
      std::fill_n(z + t * z_stride, height, 0.0f);
    }
  }
  for (int64_t block = first; block < last; ++block) {
    inputs.multiply(s, s.block_columns[block], tokens, height, blocks.block(block), z, z_stride, block > first);
  }
}

// kernel<T, C> with the micro-kernel's dtype C that fits the dtype T of activations: itself, or float where it has none.
template <typename Visit>
void with_dtypes(at::ScalarType dtype, const Visit& visit) {
  const auto visit_for = [&](auto t) {
    using T = decltype(t);
    has_micro_kernel<T>() ? visit(T(), T()) : visit(T(), 0.0f);
  };
  if (dtype == at::kFloat) {
    visit_for(0.0f);
  } else if (dtype == at::kBFloat16) {
    visit_for(at::BFloat16());
  } else {
    visit_for(at::Half());
  }
}

}  // namespace padst
