// y = act(permute_out(S permute_in(x)) + bias) * gate + residual for an S whose rows are short lists of (input, weight).
//
// A panel of tokens is transposed to feature-major, which absorbs the input permutation: feature f is stored at row
// inverse[f]. A few rows of S at a time are then sums of weights times panel rows, tokens in vector lanes. Transposing the
// sums back absorbs the output permutation. Inputs are taken in chunks whose part of the panel stays in L1, while the sums
// wait in L2.
//
// A structure S is described by a class with
//   in_features, out_features
//   kExtraRows                            rows of the panel beyond in_features, which extend(panel) fills
//   chunk_step(), row_step()              what boundaries between chunks of inputs and parts of the rows are multiples of
//   multiply(panel, inputs, rows, sums)   adds the chunk `inputs` of a panel to the sums of `rows`
//   kAddsTokens                           whether a few tokens are multiplied without a panel (few_tokens.h), by
//     few_tokens()                          the most tokens for which that takes less time, and
//     add_tokens(x, rows, sums)             adds `rows` of S times x to sums
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <vector>

#include "epilogue.h"
#include "panels.h"
#include "partition.h"
#include "transpose.h"
#include "unroll.h"
#include "vectors.h"

namespace padst {

// What part of the panel one chunk of inputs may take in L1, beside the weights and the sums.
inline constexpr int64_t kChunkBytes = int64_t{48} << 10;

// Rows of `kRows` sums over a panel of kWidth vectors of tokens, in registers.
template <int kRows, int kWidth>
class RowSums {
 public:
  static constexpr int64_t kTokens = kWidth * kLanes;

  explicit RowSums(const float* panel) : panel_(panel) {}

  // The sums so far, which are none before the first chunk of inputs.
  void start(bool first, const float* source) {
    if (first) {
      clear();
    } else {
      load_sums(source);
    }
  }
  void load_sums(const float* source) {
    PADST_UNROLL for (int r = 0; r < kRows; ++r) {
      PADST_UNROLL for (int w = 0; w < kWidth; ++w) {
        sums_[r][w] = load(source + r * kTokens + w * kLanes);
      }
    }
  }
  void store_sums(float* target) const {
    PADST_UNROLL for (int r = 0; r < kRows; ++r) {
      PADST_UNROLL for (int w = 0; w < kWidth; ++w) {
        store(sums_[r][w], target + r * kTokens + w * kLanes);
      }
    }
  }

  // Row r gains `weight` times a feature.
  void add(int r, int64_t column, float weight) {
    const float* source = panel_ + column * kTokens;
    PADST_UNROLL for (int w = 0; w < kWidth; ++w) {
      sums_[r][w] += weight * load(source + w * kLanes);
    }
  }

  // Every row r gains weights[r] times feature `column + r * kShift`.
  template <int kShift>
  void add_all(int64_t column, const float* weights) {
    PADST_UNROLL for (int r = 0; r < kRows; ++r) {
      add(r, column + r * kShift, weights[r]);
    }
  }

 private:
  void clear() {
    for (auto& row : sums_) {
      for (Vec& sum : row) {
        sum = Vec{};
      }
    }
  }

  const float* panel_;
  Vec sums_[kRows][kWidth];
};

// Tokens x [tokens, features] -> panel [features, kTokens]; feature f goes to row target[f]. Missing tokens become zeros.
template <int64_t kTokens, typename T>
void pack_panel(const T* x, int64_t features, int64_t tokens, const int32_t* target, float* panel) {
  for (int64_t t = 0; t < kTokens; t += kLanes) {
    for (int64_t f = 0; f < features; f += kLanes) {
      const int64_t width = std::min<int64_t>(kLanes, features - f);
      Vec square[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const T* source = x + (t + i) * features + f;
        square[i] = t + i < tokens ? load_some(source, width) : Vec{};
      }
      transpose(square);
      for (int64_t i = 0; i < width; ++i) {
        store(square[i], panel + (target != nullptr ? target[f + i] : f + i) * kTokens + t);
      }
    }
  }
}

template <typename T>
struct PanelInput {
  const T* x;
  bool panels;            // whether x is [panels, features, kPanel] rather than [tokens, features]
  const int32_t* target;  // feature f is stored at row target[f] of the panel, or nullptr

  template <int64_t kTokens>
  void pack(int64_t first, int64_t tokens, int64_t features, float* panel) const {
    if (panels) {
      copy_panel<kTokens>(x + first * features, features, target, panel);
    } else {
      pack_panel<kTokens>(x + first * features, features, tokens, target, panel);
    }
  }
};

template <typename T>
struct PanelOutput {
  T* y;
  bool panels;  // as for PanelInput
  int64_t features;
  Epilogue<T> epilogue;
  const int32_t* permutation;  // y[j] = sums[permutation[j]], or nullptr
  const int32_t* inverse;      // set where workers share the outputs of a token, and for panels

  // The outputs `rows` of S for a panel of tokens from `first` on.
  template <int64_t kTokens>
  void store_sums(int64_t first, int64_t tokens, const float* sums, Range rows) const {
    if (panels) {
      finish_panel<kTokens>(sums, rows, epilogue.from(0, first * features), inverse, y + first * features);
    } else if (rows.size() == features) {
      finish<kTokens>(first, tokens, sums);
    } else {
      finish_part<kTokens>(first, tokens, sums, rows);
    }
  }

 private:
  // sums [features, kTokens] -> y [tokens, features], from token `first` on.
  template <int64_t kTokens>
  void finish(int64_t first, int64_t tokens, const float* sums) const {
    for (int64_t t = 0; t < tokens; t += kLanes) {
      for (int64_t j = 0; j < features; j += kLanes) {
        const int64_t width = std::min<int64_t>(kLanes, features - j);
        Vec square[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          const int64_t k = std::min(j + i, features - 1);
          square[i] = load(sums + (permutation != nullptr ? permutation[k] : k) * kTokens + t);
        }
        prefetch_outputs((first + t) * features + j + 2 * kLanes, std::min<int64_t>(kLanes, tokens - t));
        transpose(square);
        finish_square(square, (first + t) * features + j, std::min<int64_t>(kLanes, tokens - t), j, width);
      }
    }
  }

  // The outputs `rows` of S only; stored element by element, because this is for few tokens.
  template <int64_t kTokens>
  void finish_part(int64_t first, int64_t tokens, const float* sums, Range rows) const {
    with_activation(epilogue.activation, [&](auto activation) {
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        const int64_t j = inverse != nullptr ? inverse[i] : i;
        for (int64_t t = 0; t < tokens; t += kLanes) {
          const Vec v = activation(load(sums + i * kTokens + t) + epilogue.bias[j]);
          store_column(v, (first + t) * features + j, std::min<int64_t>(kLanes, tokens - t));
        }
      }
    });
  }

  // Hardware foresees no stores to lines that are rows apart.
  void prefetch_outputs(int64_t start, int64_t tokens) const {
    for (int64_t i = 0; i < tokens; ++i) {
      __builtin_prefetch(y + start + i * features, 1);
    }
  }

  // Vector i of a square becomes the outputs j to j + width of one token, at y[start + i * features].
  void finish_square(const Vec (&square)[kLanes], int64_t start, int64_t tokens, int64_t j, int64_t width) const {
    with_activation(epilogue.activation, [&](auto activation) {
      const Vec shift = load_some(epilogue.bias + j, width);
      for (int64_t i = 0; i < tokens; ++i) {
        const int64_t element = start + i * features;
        store_some(epilogue.combine(activation(square[i] + shift), element, width), y + element, width);
      }
    });
  }

  // Lane i becomes an output of one token, at y[start + i * features].
  void store_column(Vec v, int64_t start, int64_t tokens) const {
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t element = start + i * features;
      y[element] = static_cast<T>(epilogue.combine(v[i], element));
    }
  }
};

// The rows `rows` of S times a whole panel.
template <int kWidth, typename S>
void multiply_panel(const S& s, const float* panel, Range rows, float* sums) {
  constexpr int64_t kTokens = kWidth * kLanes;
  const int64_t features = kChunkBytes / (kTokens * static_cast<int64_t>(sizeof(float)));
  const int64_t step = std::max<int64_t>(1, features / s.chunk_step()) * s.chunk_step();
  for (int64_t begin = 0; begin < s.in_features; begin += step) {
    s.template multiply<kWidth>(panel, {begin, std::min(begin + step, s.in_features)}, rows, sums);
  }
}

template <int kWidth, typename T, typename S>
void process_panel(
    const S& s, const PanelInput<T>& input, const PanelOutput<T>& output, int64_t first, int64_t tokens, Range rows, float* panel,
    float* sums) {
  constexpr int64_t kTokens = kWidth * kLanes;
  input.template pack<kTokens>(first, tokens, s.in_features, panel);
  s.template extend<kTokens>(panel);
  multiply_panel<kWidth>(s, panel, rows, sums);
  output.template store_sums<kTokens>(first, tokens, sums, rows);
}

template <typename T, typename S>
void row_gather(const S& s, const PanelInput<T>& input, int64_t tokens, const PanelOutput<T>& output, int64_t parts) {
  const int64_t panels = ceil_div(tokens, kPanel);
  const int64_t rows_per_part = round_up(ceil_div(s.out_features, parts), s.row_step());
  at::parallel_for(0, panels * parts, 1, [&](int64_t begin, int64_t end) {
    const Scratch<float> panel((s.in_features + S::kExtraRows) * kPanel), sums((s.out_features + S::kExtraRows) * kPanel);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / parts * kPanel, count = std::min(kPanel, tokens - first);
      const int64_t row = item % parts * rows_per_part;
      const Range rows{std::min(row, s.out_features), std::min(row + rows_per_part, s.out_features)};
      const auto process = count <= kLanes ? process_panel<1, T, S>
          : count <= 2 * kLanes            ? process_panel<2, T, S>
                                           : process_panel<kWidest, T, S>;
      process(s, input, output, first, count, rows, panel.data(), sums.data());
    }
  });
}

}  // namespace padst
