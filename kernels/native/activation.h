// The activations that a kernel can apply to its sums, on vectors of float.
#pragma once

#include <c10/util/Exception.h>

#include <iterator>
#include <string_view>

#include "vectors.h"

namespace padst {

enum class Activation { kNone, kRelu, kGelu, kGeluTanh, kSilu };

inline Activation parse_activation(std::string_view name) {
  constexpr std::string_view kNames[] = {"none", "relu", "gelu", "gelu_tanh", "silu"};
  for (int i = 0; i < static_cast<int>(std::size(kNames)); ++i) {
    if (name == kNames[i]) {
      return static_cast<Activation>(i);
    }
  }
  TORCH_CHECK(false, "activation must be none, relu, gelu, gelu_tanh or silu, got ", name);
}

// sum coefficients[i] x^i
template <int kCount>
inline Vec polynomial(const float (&coefficients)[kCount], Vec x) {
  Vec sum = splat(coefficients[kCount - 1]);
  for (int i = kCount - 2; i >= 0; --i) {
    sum = sum * x + coefficients[i];
  }
  return sum;
}

// x = n log 2 + rest with an integer n, by the constants of Cody and Waite.
struct Reduced {
  explicit Reduced(Vec x) : shifted(x * 1.44269504f + kShift) {
    const Vec n = shifted - kShift;
    rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  }

  static constexpr float kShift = 0x1.8p23f;  // rounds to an integer, which then stands in the low bits
  Vec shifted, rest;
};

// exp(x) for |x| <= 87; the polynomial is off by at most 2^-23.6 of it.
inline Vec exponential(Reduced x) {
  constexpr float kCoefficients[] = {1.000000072f,  0.9999996916f,  0.4999889398f,
                                     0.1666757545f, 0.04191548088f, 0.008297640842f};
  const Lanes power = reinterpret_cast<Lanes>(x.shifted) << 23;
  return reinterpret_cast<Vec>(reinterpret_cast<Lanes>(polynomial(kCoefficients, x.rest)) + power);
}

struct Identity {
  Vec operator()(Vec x) const {
    return x;
  }
};

struct Relu {
  Vec operator()(Vec x) const {
    return at_least(x, 0.0f);
  }
};

// x Phi(x) = max(x, 0) - a Phi(-a) with a = |x|, which cancels nowhere.
//
// Phi(-a) = exp(-a^2 / 2) R(a), where R(a) = t P(t), t = 1 / (1 + 0.34 a). P minimises the relative error for a <= 13.2, which
// is 2^-25.3; the whole is off by at most 8 * 2^-24 of the result. Beyond 13 the product is below 8e-38 and taken to be what it
// is there: from 13.15 on it would be subnormal, which processors compute a hundred times more slowly.
struct Gelu {
  Vec operator()(Vec x) const {
    constexpr float kCoefficients[] = {0.1356186063f,   0.1361469186f, 0.1149332236f,  0.1164557022f, -0.04743341496f,
                                       0.2063052323f, -0.2768940895f, 0.1413908744f, -0.02652304074f};
    const Vec a = at_most(absolute(x), 13.0f), half = -0.5f * a, square = half * a;
    Reduced exponent(square);
    exponent.rest += multiply_subtract(half, a, square);  // what rounding took from the square
    const Vec t = reciprocal(1.0f + 0.34f * a);
    return at_least(x, 0.0f) - (a * t) * exponential(exponent) * polynomial(kCoefficients, t);
  }
};

// x / (1 + exp(-v)). Below -kLimit that is smaller than 1e-35, and taken to be what it is at -kLimit.
template <typename Exponent>
inline Vec gate(Vec x, float limit, const Exponent& exponent) {
  const Vec numerator = at_least(x, -limit);
  return numerator * reciprocal(1.0f + exponential(Reduced(-exponent(at_most(numerator, limit)))));
}

struct Silu {
  Vec operator()(Vec x) const {
    return gate(x, 87.0f, [](Vec v) { return v; });
  }
};

// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) = x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
struct GeluTanh {
  Vec operator()(Vec x) const {
    return gate(x, 9.95f, [](Vec v) { return v * (1.5957691216f + 0.0713548163f * (v * v)); });
  }
};

// Calls `visit` with the function object of an activation: one branch for a whole row.
template <typename Visit>
inline void with_activation(Activation activation, const Visit& visit) {
  switch (activation) {
    case Activation::kNone:
      return visit(Identity{});
    case Activation::kRelu:
      return visit(Relu{});
    case Activation::kGelu:
      return visit(Gelu{});
    case Activation::kGeluTanh:
      return visit(GeluTanh{});
    case Activation::kSilu:
      return visit(Silu{});
  }
}

}  // namespace padst
