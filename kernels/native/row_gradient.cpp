// The gradient of N:M and diagonal weights: for every active weight, the sum over tokens of its output's gradient times its input.
//
// Tokens are taken in tiles, turned feature-major: a weight's gradient is then the inner product of two rows. A row of one side
// stays in registers while it meets the rows of the other that its weights read; those are taken in chunks that stay in L2: in L1
// there is room for so few that the ends of lists would take longer than the products.
// Turning them absorbs the permutations.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "checks.h"
#include "kernels.h"
#include "partition.h"
#include "structure_checks.h"
#include "transposed_tile.h"

namespace padst {
namespace {

constexpr int kWidth = 8;                              // vectors of tokens in a tile
constexpr int64_t kTile = kWidth * kLanes;             // tokens in a tile
constexpr int64_t kChunk = (int64_t{160} << 10) / (kTile * static_cast<int64_t>(sizeof(float)));  // rows that stay in L2

// Inner products of rows with others, added to values in memory kLanes at a time.
class InnerProducts {
 public:
  InnerProducts(const float* others, int64_t stride, float* values) : others_(others), stride_(stride), values_(values) {}

  void start(const float* row) {
    for (int w = 0; w < kWidth; ++w) {
      row_[w] = load(row + w * kLanes);
    }
  }

  // The value at `index` gains the product of the present row with row `other`.
  void add(int64_t other, int64_t index) {
    const float* source = others_ + other * stride_;
    Vec sum = row_[0] * load(source);
    for (int w = 1; w < kWidth; ++w) {
      sum += row_[w] * load(source + w * kLanes);
    }
    sums_[count_] = sum;
    indices_[count_] = index;
    if (++count_ == kLanes) {
      flush();
    }
  }

  void flush() {
    std::fill(sums_ + count_, sums_ + kLanes, Vec{});
    const Vec totals = sum_lanes(sums_);
    for (int i = 0; i < count_; ++i) {
      values_[indices_[i]] += totals[i];
    }
    count_ = 0;
  }

 private:
  const float* others_;
  int64_t stride_;
  float* values_;
  Vec row_[kWidth], sums_[kLanes];
  int64_t indices_[kLanes];
  int count_ = 0;
};

// Rows are outputs, and read inputs: visit(input, index of the value).
struct NmPattern {
  int64_t n, m, vector, slots;
  const uint8_t* offsets;

  int64_t chunk_step() const {
    return m;
  }

  template <typename Visit>
  void for_each(int64_t row, Range inputs, const Visit& visit) const {
    const int64_t row_group = row / vector;
    const uint8_t* offset = offsets + row_group * slots;
    int64_t slot = inputs.begin / m * n;
    for (int64_t group = inputs.begin; group < inputs.end; group += m) {
      for (const int64_t end = slot + n; slot < end; ++slot) {
        visit(group + offset[slot], (row_group * slots + slot) * vector + row % vector);
      }
    }
  }
};

// Rows are the features of the shorter side, which every diagonal meets once; what they read are those of the longer one.
struct DiagonalPattern {
  int64_t length, period, diagonals;
  const int32_t* offsets;  // ascending

  int64_t chunk_step() const {
    return 1;
  }

  template <typename Visit>
  void for_each(int64_t row, Range longer, const Visit& visit) const {
    for (const int64_t base : {row, row - period}) {
      const int32_t* first = std::lower_bound(offsets, offsets + diagonals, longer.begin - base);
      for (; first != offsets + diagonals && base + *first < longer.end; ++first) {
        visit(base + *first, (first - offsets) * length + row);
      }
    }
  }
};

// One side of the weights: tokens [tokens, features], in which feature f is row target[f] of S, or row f without a table.
struct Side {
  const at::Tensor& tokens;
  const int32_t* target;

  int64_t features() const {
    return tokens.size(1);
  }
};

template <typename T, typename P>
void accumulate(const P& pattern, const Side& rows, const Side& others, float* values) {
  const int64_t tokens = rows.tokens.size(0), row_count = rows.features(), other_count = others.features();
  const int64_t chunk = std::max<int64_t>(1, kChunk / pattern.chunk_step()) * pattern.chunk_step();
  TransposedTile<T, float> row_tile(row_count, kTile, rows.target), other_tile(other_count, kTile, others.target);
  for (int64_t first = 0; first < tokens; first += kTile) {
    const int64_t count = std::min(kTile, tokens - first);
    row_tile.load(rows.tokens.const_data_ptr<T>() + first * row_count, count, kTile);
    other_tile.load(others.tokens.const_data_ptr<T>() + first * other_count, count, kTile);
    at::parallel_for(0, row_count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t from = 0; from < other_count; from += chunk) {
        const Range part{from, std::min(from + chunk, other_count)};
        InnerProducts products(other_tile.feature(0), other_tile.stride(), values);
        for (int64_t row = begin; row < end; ++row) {
          products.start(row_tile.feature(row));
          pattern.for_each(row, part, [&](int64_t other, int64_t index) { products.add(other, index); });
        }
        products.flush();
      }
    });
  }
}

template <typename P>
at::Tensor gradient(const P& pattern, const Side& rows, const Side& others, at::IntArrayRef sizes) {
  const at::ScalarType dtype = rows.tokens.scalar_type();
  at::Tensor values = at::zeros(sizes, rows.tokens.options().dtype(at::kFloat));
  const auto kernel = dtype == at::kFloat ? accumulate<float, P>
      : dtype == at::kBFloat16            ? accumulate<at::BFloat16, P>
                                          : accumulate<at::Half, P>;
  kernel(pattern, rows, others, values.mutable_data_ptr<float>());
  return values.to(dtype);
}

}  // namespace

at::Tensor nm_value_gradient(
    const at::Tensor& grad_in, const at::Tensor& x_in, const at::Tensor& offsets, int64_t n, int64_t m, int64_t vector,
    const OptionalTensor& input_permutation, const OptionalTensor& output_permutation) {
  check_gradient_operands(grad_in, x_in);
  TORCH_CHECK(row_gather_supports(x_in.scalar_type()), "no native kernel for ", x_in.scalar_type());
  check_nm_offsets(offsets, x_in.size(1), grad_in.size(1), n, m, vector);
  const at::Tensor grad = grad_in.contiguous(), x = x_in.contiguous();
  const NmPattern pattern{n, m, vector, offsets.size(1), offsets.const_data_ptr<uint8_t>()};
  const PermutationTables into(input_permutation, x.size(1), "input_permutation");
  const PermutationTables out(output_permutation, grad.size(1), "output_permutation");
  return gradient(pattern, {grad, out.table()}, {x, into.inverse()}, {offsets.size(0), offsets.size(1), vector});
}

at::Tensor diagonal_value_gradient(
    const at::Tensor& grad_in, const at::Tensor& x_in, const at::Tensor& offsets_in, const OptionalTensor& input_permutation,
    const OptionalTensor& output_permutation) {
  check_gradient_operands(grad_in, x_in);
  TORCH_CHECK(row_gather_supports(x_in.scalar_type()), "no native kernel for ", x_in.scalar_type());
  const at::Tensor grad = grad_in.contiguous(), x = x_in.contiguous();
  const PermutationTables into(input_permutation, x.size(1), "input_permutation");
  const PermutationTables out(output_permutation, grad.size(1), "output_permutation");
  const Side inputs{x, into.inverse()}, outputs{grad, out.table()};
  const bool wide = inputs.features() >= outputs.features();
  const Side &shorter = wide ? outputs : inputs, &longer = wide ? inputs : outputs;
  const int32_t* offsets = diagonal_offsets(offsets_in, longer.features());
  const DiagonalPattern pattern{shorter.features(), longer.features(), offsets_in.numel(), offsets};
  return gradient(pattern, shorter, longer, {offsets_in.numel(), shorter.features()});
}

}  // namespace padst
