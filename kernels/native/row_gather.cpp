// N:M and diagonal layers in terms of row_gather.h; 16-bit values are converted once and summed in float.
#include "row_gather.h"

#include <ATen/ops/empty.h>

#include <numeric>
#include <vector>

#include "checks.h"
#include "epilogue.h"
#include "few_tokens.h"
#include "kernels.h"
#include "structure_checks.h"
#include "token_output.h"

namespace padst {
namespace {

// W[g * vector + v, (s / n) * m + offsets[g, s]] = values[g, s, v]
struct NmMatrix {
  int64_t in_features, out_features, n, m, vector, slots;
  const uint8_t* offsets;
  const float* values;

  static constexpr int64_t kExtraRows = 0;
  static constexpr bool kAddsTokens = true;

  int64_t chunk_step() const {
    return m;
  }
  int64_t row_step() const {
    return vector;
  }

  template <int64_t kTokens>
  void extend(float*) const {}

  template <int kWidth>
  void multiply(const float* panel, Range inputs, Range rows, float* sums) const {
    int64_t row = rows.begin;
    for (; vector == 1 && row + 2 <= rows.end; row += 2) {
      multiply_pair<kWidth>(panel, inputs, row, sums);
    }
    for (; row < rows.end; row += vector) {
      const int64_t height = std::min(vector, rows.end - row);
      int64_t v = 0;
      for (; v + 4 <= height; v += 4) {
        multiply_shared<4, kWidth>(panel, inputs, row / vector, v, sums);
      }
      for (; v < height; ++v) {
        multiply_shared<1, kWidth>(panel, inputs, row / vector, v, sums);
      }
    }
  }

  // The most tokens for which add_tokens takes less time than a panel.
  int64_t few_tokens() const {
    return (vector > 1 ? 2 * vector >= kLanes : m <= kPickable) ? kHandful : 0;
  }

  // Adds `rows` of S times a few tokens to sums.
  void add_tokens(const TokenInputs& x, Range rows, const TokenSums& sums) const {
    std::vector<int64_t> groups(slots);
    for_each_slot({0, in_features}, [&](int64_t slot, int64_t group) { groups[slot] = group; });
    if (vector > 1) {
      for (int64_t row = rows.begin; row < rows.end; row += vector) {
        const int64_t first = row / vector * slots;
        add_shared_rows(
            values + first * vector, vector, std::min(vector, rows.end - row), offsets + first, groups, x, sums, row);
      }
      return;
    }
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const auto add = m <= kLanes ? add_nm_rows<false> : add_nm_rows<true>;
    add(values, offsets, groups, rows, x, sums);
#endif
  }

  // visit(slot, first input of its group); the inner loop would cost as much as the work where n is 1.
  template <typename Visit>
  void for_each_slot(Range inputs, const Visit& visit) const {
    int64_t slot = inputs.begin / m * n;
    if (n == 1) {
      for (int64_t group = inputs.begin; group < inputs.end; group += m, ++slot) {
        visit(slot, group);
      }
      return;
    }
    for (int64_t group = inputs.begin; group < inputs.end; group += m) {
      for (const int64_t end = slot + n; slot < end; ++slot) {
        visit(slot, group);
      }
    }
  }

 private:
  // kRows rows that share their offsets.
  template <int kRows, int kWidth>
  void multiply_shared(const float* panel, Range inputs, int64_t row_group, int64_t v, float* sums) const {
    RowSums<kRows, kWidth> total(panel);
    float* target = sums + (row_group * vector + v) * total.kTokens;
    total.start(inputs.begin == 0, target);
    const uint8_t* offset = offsets + row_group * slots;
    const float* weights = values + row_group * slots * vector + v;
    for_each_slot(inputs, [&](int64_t slot, int64_t group) {
      total.template add_all<0>(group + offset[slot], weights + slot * vector);
    });
    total.store_sums(target);
  }

  // Two rows with offsets of their own: one alone waits for the latency of its additions.
  template <int kWidth>
  void multiply_pair(const float* panel, Range inputs, int64_t row, float* sums) const {
    RowSums<2, kWidth> total(panel);
    float* target = sums + row * total.kTokens;
    total.start(inputs.begin == 0, target);
    const uint8_t *offset = offsets + row * slots, *next_offset = offset + slots;
    const float *weight = values + row * slots, *next_weight = weight + slots;
    for_each_slot(inputs, [&](int64_t slot, int64_t group) {
      total.add(0, group + offset[slot], weight[slot]);
      total.add(1, group + next_offset[slot], next_weight[slot]);
    });
    total.store_sums(target);
  }
};

// The transpose of an NmMatrix as lists: of each row the inputs that it reads, ascending, and their weights. To make them, by
// counting, takes far less than to add every input of a panel to sums that are scattered over memory.
class NmTransposed {
 public:
  const int64_t in_features, out_features;

  static constexpr int64_t kExtraRows = 0;
  static constexpr bool kAddsTokens = false;

  explicit NmTransposed(const NmMatrix& s)
      : in_features(s.out_features),
        out_features(s.in_features),
        buckets_(ceil_div(in_features, kBucket)),
        first_(out_features * buckets_ + 1),
        inputs_(s.out_features * s.slots),
        weights_(s.out_features * s.slots) {
    for_each_entry(s, [&](int64_t row, int64_t input, float) { ++first_[bucket(row, input) + 1]; });
    std::partial_sum(first_.begin(), first_.end(), first_.begin());
    std::vector<int64_t> next(first_.begin(), first_.end() - 1);
    for_each_entry(s, [&](int64_t row, int64_t input, float weight) {
      const int64_t place = next[bucket(row, input)]++;
      inputs_[place] = static_cast<int32_t>(input);
      weights_[place] = weight;
    });
  }

  int64_t chunk_step() const {
    return kBucket;
  }
  int64_t row_step() const {
    return 2;
  }

  template <int64_t kTokens>
  void extend(float*) const {}

  template <int kWidth>
  void multiply(const float* panel, Range inputs, Range rows, float* sums) const {
    int64_t row = rows.begin;
    for (; row + 2 <= rows.end; row += 2) {
      RowSums<2, kWidth> total(panel);  // one alone waits for the latency of its additions
      total.start(inputs.begin == 0, sums + row * total.kTokens);
      const Range one = entries(row, inputs), other = entries(row + 1, inputs);
      const int64_t both = std::min(one.size(), other.size());
      for (int64_t i = 0; i < both; ++i) {
        add(total, 0, one.begin + i);
        add(total, 1, other.begin + i);
      }
      add_all(total, 0, {one.begin + both, one.end});
      add_all(total, 1, {other.begin + both, other.end});
      total.store_sums(sums + row * total.kTokens);
    }
    if (row < rows.end) {
      RowSums<1, kWidth> total(panel);
      total.start(inputs.begin == 0, sums + row * total.kTokens);
      add_all(total, 0, entries(row, inputs));
      total.store_sums(sums + row * total.kTokens);
    }
  }

 private:
  static constexpr int64_t kBucket = 64;  // inputs between two marks in a list

  template <typename Visit>
  static void for_each_entry(const NmMatrix& s, const Visit& visit) {
    for (int64_t input = 0; input < s.out_features; ++input) {
      const int64_t start = input / s.vector * s.slots;
      s.for_each_slot({0, s.in_features}, [&](int64_t slot, int64_t group) {
        visit(group + s.offsets[start + slot], input, s.values[(start + slot) * s.vector + input % s.vector]);
      });
    }
  }

  int64_t bucket(int64_t row, int64_t input) const {
    return row * buckets_ + input / kBucket;
  }
  // What a row reads of some inputs, a range that begins and ends with a bucket.
  Range entries(int64_t row, Range inputs) const {
    return {first_[bucket(row, inputs.begin)], first_[row * buckets_ + ceil_div(inputs.end, kBucket)]};
  }

  template <typename Sums>
  void add(Sums& total, int r, int64_t entry) const {
    total.add(r, inputs_[entry], weights_[entry]);
  }
  template <typename Sums>
  void add_all(Sums& total, int r, Range list) const {
    for (int64_t entry = list.begin; entry < list.end; ++entry) {
      add(total, r, entry);
    }
  }

  int64_t buckets_;
  std::vector<int64_t> first_;  // of each row and bucket, its first entry
  std::vector<int32_t> inputs_;
  std::vector<float> weights_;
};

// Diagonal o holds W[k, (k + o) % in] (wide, inputs at least as many as outputs) or W[(k + o) % out, k] (tall), k < length.
class DiagonalMatrix {
 public:
  const int64_t in_features, out_features;

  // A group of rows reads kRows - 1 features beyond the last, which are the first again.
  static constexpr int kRows = 4;
  static constexpr int64_t kExtraRows = kRows - 1;
  static constexpr bool kAddsTokens = true;

  DiagonalMatrix(int64_t in_features, int64_t out_features, const int32_t* offsets, int64_t diagonals, const float* values)
      : in_features(in_features),
        out_features(out_features),
        length_(std::min(in_features, out_features)),
        period_(std::max(in_features, out_features)),
        offsets_(offsets),
        values_(values),
        first_(period_ + 1) {
    int64_t d = 0;
    for (int64_t offset = 0; offset <= period_; ++offset) {
      first_[offset] = static_cast<int32_t>(d);
      d += d < diagonals && offsets[d] == offset ? 1 : 0;
    }
  }

  int64_t chunk_step() const {
    return 1;
  }
  int64_t row_step() const {
    return kRows;
  }
  int64_t few_tokens() const {
    return kHandful;
  }

  void add_tokens(const TokenInputs& x, Range rows, const TokenSums& sums) const {
    constexpr int64_t kPart = 1024;  // outputs whose sums stay close
    for (int64_t begin = rows.begin; begin < rows.end; begin += kPart) {
      const Range part{begin, std::min(begin + kPart, rows.end)};
      for (int64_t d = 0; d < first_[period_]; ++d) {
        add_diagonal(d, x, part, sums);
      }
    }
  }

  template <int64_t kTokens>
  void extend(float* panel) const {
    for (int64_t i = 0; i < kExtraRows; ++i) {
      std::copy_n(panel + i % in_features * kTokens, kTokens, panel + (in_features + i) * kTokens);
    }
  }

  template <int kWidth>
  void multiply(const float* panel, Range inputs, Range rows, float* sums) const {
    int64_t row = rows.begin;
    for (; in_features >= kRows && row + kRows <= rows.end; row += kRows) {
      multiply_rows<kRows, kWidth>(panel, inputs, row, sums);
    }
    for (; row < rows.end; ++row) {
      multiply_rows<1, kWidth>(panel, inputs, row, sums);
    }
  }

 private:
  // The diagonals with begin <= offset < end.
  Range diagonals(int64_t begin, int64_t end) const {
    const int64_t from = std::clamp<int64_t>(begin, 0, period_), to = std::clamp<int64_t>(end, from, period_);
    return {first_[from], first_[to]};
  }

  template <int kRowCount, int kWidth>
  void multiply_rows(const float* panel, Range inputs, int64_t row, float* sums) const {
    RowSums<kRowCount, kWidth> total(panel);
    float* target = sums + row * total.kTokens;
    total.start(inputs.begin == 0, target);
    if (in_features >= out_features) {
      add_wide(total, inputs, row);
    } else {
      add_tall(total, inputs, row);
    }
    total.store_sums(target);
    if (in_features < out_features && kRowCount > 1) {
      add_corners<kRowCount, kWidth>(panel, inputs, row, sums);
    }
  }

  // What one diagonal adds to some outputs: row j reads column j + shift, in two pieces where it wraps.
  void add_diagonal(int64_t d, const TokenInputs& x, Range rows, const TokenSums& sums) const {
    const bool wide = in_features >= out_features;
    for (const int64_t shift : {wide ? offsets_[d] - period_ : -offsets_[d], wide ? offsets_[d] : period_ - offsets_[d]}) {
      const int64_t begin = std::max(rows.begin, -shift), end = std::min(rows.end, in_features - shift);
      if (begin < end) {
        const float* weights = values_ + d * length_ + (wide ? begin : begin + shift);
        add_products(weights, end - begin, x, begin + shift, sums, begin);
      }
    }
  }

  // Column row + o, or row + o - period once it wraps.
  template <int kRowCount, int kWidth>
  void add_wide(RowSums<kRowCount, kWidth>& total, Range inputs, int64_t row) const {
    for (const int64_t base : {row, row - period_}) {
      const Range range = diagonals(inputs.begin - base, inputs.end - base);
      for (int64_t d = range.begin; d < range.end; ++d) {
        total.template add_all<1>(base + offsets_[d], values_ + d * length_ + row);
      }
    }
  }

  // Column row - o, or row - o + period, where all rows of the group have one inside [0, in_features).
  template <int kRowCount, int kWidth>
  void add_tall(RowSums<kRowCount, kWidth>& total, Range inputs, int64_t row) const {
    const int64_t end = std::min(inputs.end, in_features - kRowCount + 1);
    for (const int64_t base : {row, row + period_}) {
      const Range range = diagonals(base - end + 1, base - inputs.begin + 1);
      for (int64_t d = range.begin; d < range.end; ++d) {
        const int64_t column = base - offsets_[d];
        total.template add_all<1>(column, values_ + d * length_ + column);
      }
    }
  }

  // The diagonals that start or end inside the group of rows, row by row.
  template <int kRowCount, int kWidth>
  void add_corners(const float* panel, Range inputs, int64_t row, float* sums) const {
    for (const int64_t base : {row, row + period_}) {
      for (int64_t r = 0; r < kRowCount; ++r) {
        if (inputs.begin == 0) {
          add_corner<kWidth>(panel, diagonals(base + 1, base + r + 1), base + r, sums + (row + r) * kWidth * kLanes);
        }
        if (inputs.end == in_features) {
          const Range ending = diagonals(base + r - in_features + 1, base + kRowCount - in_features);
          add_corner<kWidth>(panel, ending, base + r, sums + (row + r) * kWidth * kLanes);
        }
      }
    }
  }

  template <int kWidth>
  void add_corner(const float* panel, Range range, int64_t base, float* target) const {
    if (range.size() <= 0) {
      return;
    }
    RowSums<1, kWidth> total(panel);
    total.load_sums(target);
    for (int64_t d = range.begin; d < range.end; ++d) {
      const int64_t column = base - offsets_[d];
      total.template add_all<1>(column, values_ + d * length_ + column);
    }
    total.store_sums(target);
  }

  int64_t length_, period_;
  const int32_t* offsets_;
  const float* values_;
  std::vector<int32_t> first_;  // first_[o]: the first diagonal with an offset of at least o
};

// A few tokens of x as rows of float in the order of S, with what add_tokens may read beyond the last.
template <typename T>
void load_tokens(const T* x, int64_t features, int64_t tokens, const int32_t* table, float* target, int64_t stride) {
  for (int64_t t = 0; t < tokens; ++t, x += features, target += stride) {
    if (table == nullptr) {
      convert(x, features, target);
    } else {
      for (int64_t f = 0; f < features; ++f) {
        target[f] = static_cast<float>(x[table[f]]);
      }
    }
    std::fill(target + features, target + stride, 0.0f);
  }
}

template <typename T, typename S>
void run_few(
    const S& s, const at::Tensor& x, int64_t tokens, const Epilogue<T>& epilogue, const int32_t* in_table, const int32_t* out_table,
    at::Tensor& y) {
  const int64_t stride = padded_stride(s.in_features + kPickable), sums_stride = padded_stride(s.out_features);
  const int64_t threads = at::get_num_threads();
  const Scratch<float> inputs(tokens * stride), sums(tokens * sums_stride);
  load_tokens(x.const_data_ptr<T>(), s.in_features, tokens, in_table, inputs.data(), stride);
  std::fill_n(sums.data(), tokens * sums_stride, 0.0f);
  std::vector<int32_t> target;
  if (out_table != nullptr && threads > 1) {
    target = inverse_permutation(out_table, s.out_features, "output_permutation");
  }
  const Output<T> output(
      y.mutable_data_ptr<T>(), s.out_features, s.out_features, epilogue, out_table, target.empty() ? nullptr : target.data());
  const int64_t rows_per_part = round_up(ceil_div(s.out_features, threads), s.row_step());
  at::parallel_for(0, ceil_div(s.out_features, rows_per_part), 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const Range rows{part * rows_per_part, std::min((part + 1) * rows_per_part, s.out_features)};
      s.add_tokens({inputs.data(), stride, tokens}, rows, {sums.data(), sums_stride});
      output.finish(0, tokens, sums.data() + rows.begin, sums_stride, rows);
    }
  });
}

template <typename T, typename S>
void run(
    const S& s, const at::Tensor& x, const Layout& layout, const EpilogueOperands& epilogue,
    const OptionalTensor& input_permutation, const OptionalTensor& output_permutation, at::Tensor& y) {
  const int32_t* in_table = permutation_pointer(input_permutation, s.in_features, "input_permutation");
  const int32_t* out_table = permutation_pointer(output_permutation, s.out_features, "output_permutation");
  const int64_t tokens = layout.tokens(), threads = at::get_num_threads();
  if constexpr (S::kAddsTokens) {
    if (tokens <= s.few_tokens() && !layout.from_panels() && !layout.to_panels()) {
      run_few<T>(s, x, tokens, epilogue.pointers<T>(), in_table, out_table, y);
      return;
    }
  }
  std::vector<int32_t> target, inverse;
  if (in_table != nullptr) {
    target = inverse_permutation(in_table, s.in_features, "input_permutation");
  }
  const int64_t parts = tokens > (threads - 1) * kPanel ? 1 : threads;
  if (out_table != nullptr && (parts > 1 || layout.to_panels())) {
    inverse = inverse_permutation(out_table, s.out_features, "output_permutation");
  }
  const PanelInput<T> input{x.const_data_ptr<T>(), layout.from_panels(), target.empty() ? nullptr : target.data()};
  const PanelOutput<T> output{y.mutable_data_ptr<T>(),  layout.to_panels(), s.out_features,
                              epilogue.pointers<T>(), out_table,          inverse.empty() ? nullptr : inverse.data()};
  row_gather<T, S>(s, input, tokens, output, parts);
}

template <typename S>
at::Tensor dispatch(
    const S& s, const at::Tensor& x, const Layout& layout, const EpilogueOperands& epilogue,
    const OptionalTensor& input_permutation, const OptionalTensor& output_permutation) {
  TORCH_CHECK(!layout.to_panels() || !epilogue.has_residual(), "a residual is added to tokens, not to panels");
  at::Tensor y = at::empty(layout.output_sizes(s.out_features), x.options());
  if (y.numel() == 0) {
    return y;
  }
  const auto kernel = x.scalar_type() == at::kFloat ? run<float, S>
      : x.scalar_type() == at::kBFloat16            ? run<at::BFloat16, S>
                                                    : run<at::Half, S>;
  kernel(s, x, layout, epilogue, input_permutation, output_permutation, y);
  return y;
}

// S, its operands checked.
NmMatrix describe(
    int64_t in_features, const at::Tensor& values, const at::Tensor& offsets, int64_t out_features, int64_t n, int64_t m) {
  TORCH_CHECK(values.dim() == 3 && values.size(2) > 0, "values must be [row groups, slots, vector], got ", values.sizes());
  check_nm_offsets(offsets, in_features, out_features, n, m, values.size(2));
  TORCH_CHECK(
      values.sizes().slice(0, 2) == offsets.sizes(), "values must be [", offsets.size(0), ", ", offsets.size(1),
      ", vector], got ", values.sizes());
  return {in_features,    out_features, n, m, values.size(2), values.size(1), offsets.const_data_ptr<uint8_t>(),
          values.const_data_ptr<float>()};
}

}  // namespace

bool row_gather_supports(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

int64_t panel_tokens() {
  return kPanel;
}

int64_t handful_of_tokens() {
  return kHandful;
}

at::Tensor nm_linear(
    const at::Tensor& x_in, const at::Tensor& values_in, const at::Tensor& offsets, const OptionalTensor& bias,
    const OptionalTensor& input_permutation, const OptionalTensor& output_permutation,
    int64_t out_features, int64_t n, int64_t m, std::string_view activation, const OptionalTensor& residual,
    const OptionalTensor& gate, at::OptionalIntArrayRef panels_of, bool to_panels) {
  check_operands(x_in, values_in, out_features, /*float_values=*/true);
  TORCH_CHECK(row_gather_supports(x_in.scalar_type()), "nm_linear has no native kernel for ", x_in.scalar_type());
  const Layout layout(x_in, panels_of, to_panels);
  const at::Tensor x = x_in.contiguous(), values = values_in.to(at::kFloat).contiguous();
  const NmMatrix s = describe(layout.in_features(), values, offsets, out_features, n, m);
  const EpilogueOperands epilogue(x, layout.output_sizes(out_features), out_features, bias, activation, residual, gate);
  return dispatch(s, x, layout, epilogue, input_permutation, output_permutation);
}

at::Tensor nm_input_gradient(
    const at::Tensor& grad_in, const at::Tensor& values_in, const at::Tensor& offsets, int64_t in_features, int64_t n, int64_t m,
    const OptionalTensor& grad_permutation, const OptionalTensor& result_permutation) {
  check_operands(grad_in, values_in, in_features);
  TORCH_CHECK(row_gather_supports(grad_in.scalar_type()), "nm_input_gradient has no native kernel for ", grad_in.scalar_type());
  const Layout layout(grad_in, std::nullopt, false);
  const at::Tensor grad = grad_in.contiguous(), values = values_in.to(at::kFloat).contiguous();
  const NmMatrix s = describe(in_features, values, offsets, layout.in_features(), n, m);
  const EpilogueOperands epilogue(
      grad, layout.output_sizes(in_features), in_features, std::nullopt, "none", std::nullopt, std::nullopt);
  return dispatch(NmTransposed(s), grad, layout, epilogue, grad_permutation, result_permutation);
}

at::Tensor diagonal_linear(
    const at::Tensor& x_in, const at::Tensor& values_in, const at::Tensor& offsets_in, const OptionalTensor& bias,
    const OptionalTensor& input_permutation, const OptionalTensor& output_permutation, int64_t out_features,
    std::string_view activation, const OptionalTensor& residual, const OptionalTensor& gate, at::OptionalIntArrayRef panels_of,
    bool to_panels) {
  check_operands(x_in, values_in, out_features, /*float_values=*/true);
  TORCH_CHECK(row_gather_supports(x_in.scalar_type()), "diagonal_linear has no native kernel for ", x_in.scalar_type());
  const Layout layout(x_in, panels_of, to_panels);
  const int64_t in_features = layout.in_features(), length = std::min(in_features, out_features), diagonals = offsets_in.numel();
  TORCH_CHECK(
      values_in.dim() == 2 && values_in.size(0) == diagonals && values_in.size(1) == length, "values must be [", diagonals,
      ", ", length, "], got ", values_in.sizes());
  const int32_t* offsets = diagonal_offsets(offsets_in, std::max(in_features, out_features));
  const at::Tensor x = x_in.contiguous(), values = values_in.to(at::kFloat).contiguous();
  const DiagonalMatrix s(in_features, out_features, offsets, diagonals, values.const_data_ptr<float>());
  const EpilogueOperands epilogue(x, layout.output_sizes(out_features), out_features, bias, activation, residual, gate);
  return dispatch(s, x, layout, epilogue, input_permutation, output_permutation);
}

}  // namespace padst
