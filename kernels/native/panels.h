// Activations as one row-gather kernel leaves them for the next: panels [tokens / kPanel, features, kPanel], in which the last
// panel's missing tokens have no meaning. Neither kernel transposes then, and a permutation is an order of whole rows.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "epilogue.h"
#include "partition.h"
#include "vectors.h"

namespace padst {

inline constexpr int kWidest = 4;                     // vectors of tokens in a panel
inline constexpr int64_t kPanel = kWidest * kLanes;  // tokens in a panel

// How an operator's activations lie in memory.
class Layout {
 public:
  // panels_of: where x comes in panels, the sizes that its tokens have otherwise.
  Layout(const at::Tensor& x, const at::OptionalIntArrayRef& panels_of, bool to_panels)
      : from_panels_(panels_of.has_value()), to_panels_(to_panels) {
    if (from_panels_) {
      TORCH_CHECK(x.dim() == 3 && x.size(2) == kPanel, "x must be panels [n, in_features, ", kPanel, "], got ", x.sizes());
      leading_ = panels_of->vec();
    } else {
      TORCH_CHECK(x.dim() > 0, "x must be [..., in_features], got ", x.sizes());
      leading_ = x.sizes().slice(0, x.dim() - 1).vec();
    }
    for (const int64_t size : leading_) {
      TORCH_CHECK(size >= 0, "panels_of must not be negative, got ", leading_);
      tokens_ *= size;
    }
    in_features_ = x.size(from_panels_ ? 1 : x.dim() - 1);
    TORCH_CHECK(in_features_ > 0, "x must have features, got ", x.sizes());
    TORCH_CHECK(!from_panels_ || x.size(0) == panels(), "x has ", x.size(0), " panels for ", tokens_, " tokens");
  }

  bool from_panels() const {
    return from_panels_;
  }
  bool to_panels() const {
    return to_panels_;
  }
  int64_t tokens() const {
    return tokens_;
  }
  int64_t in_features() const {
    return in_features_;
  }
  std::vector<int64_t> output_sizes(int64_t out_features) const {
    if (to_panels_) {
      return {panels(), out_features, kPanel};
    }
    std::vector<int64_t> sizes = leading_;
    sizes.push_back(out_features);
    return sizes;
  }

 private:
  int64_t panels() const {
    return ceil_div(tokens_, kPanel);
  }

  bool from_panels_, to_panels_;
  std::vector<int64_t> leading_;
  int64_t tokens_ = 1, in_features_ = 0;
};

// One panel x [features, kPanel] -> panel [features, kTokens], its first tokens; feature f goes to row target[f].
template <int64_t kTokens, typename T>
void copy_panel(const T* x, int64_t features, const int32_t* target, float* panel) {
  for (int64_t f = 0; f < features; ++f) {
    float* row = panel + (target != nullptr ? target[f] : f) * kTokens;
    for (int64_t t = 0; t < kTokens; t += kLanes) {
      store(load(x + f * kPanel + t), row + t);
    }
  }
}

// The sums `rows` [features, kTokens] of one panel -> y [features, kPanel]: row i becomes output target[i]. A gate is laid out
// like y.
template <int64_t kTokens, typename T>
void finish_panel(const float* sums, Range rows, const Epilogue<T>& epilogue, const int32_t* target, T* y) {
  with_activation(epilogue.activation, [&](auto activation) {
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const int64_t j = target != nullptr ? target[i] : i;
      const Vec shift = splat(epilogue.bias[j]);
      for (int64_t t = 0; t < kTokens; t += kLanes) {
        const int64_t element = j * kPanel + t;
        store(epilogue.combine(activation(load(sums + i * kTokens + t) + shift), element, kLanes), y + element);
      }
    }
  });
}

}  // namespace padst
