// What happens to finished sums on their way out: y = act(z + bias) * gate + residual.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string_view>

#include "activation.h"
#include "checks.h"
#include "vectors.h"

namespace padst {

template <typename T>
struct Epilogue {
  const float* bias;  // in the final order
  Activation activation;
  const T* gate;      // laid out like y, or nullptr
  const T* residual;  // likewise

  // The same for outputs from `feature` on, which is element `element` of y.
  Epilogue from(int64_t feature, int64_t element) const {
    return {
        bias + feature, activation, gate != nullptr ? gate + element : nullptr, residual != nullptr ? residual + element : nullptr};
  }

  // Whether `combine` does anything.
  bool combines() const {
    return gate != nullptr || residual != nullptr;
  }

  // activations * gate + residual for `width` outputs from element `element` of y on.
  Vec combine(Vec activations, int64_t element, int64_t width) const {
    if (gate != nullptr) {
      activations *= load_some(gate + element, width);
    }
    return residual != nullptr ? activations + load_some(residual + element, width) : activations;
  }

  // The same for one output.
  float combine(float activation, int64_t element) const {
    const float gated = gate != nullptr ? activation * static_cast<float>(gate[element]) : activation;
    return residual != nullptr ? gated + static_cast<float>(residual[element]) : gated;
  }
};

// Checks what an operator was given for its epilogue, and holds it.
class EpilogueOperands {
 public:
  // x: the activations, for their dtype; sizes: of the result, [..., out_features].
  EpilogueOperands(
      const at::Tensor& x, const std::vector<int64_t>& sizes, int64_t out_features, const OptionalTensor& bias,
      std::string_view activation, const OptionalTensor& residual, const OptionalTensor& gate)
      : bias_(float_bias(bias, out_features)),
        activation_(parse_activation(activation)),
        gate_(like_result(x, sizes, gate, "gate")),
        residual_(like_result(x, sizes, residual, "residual")) {}

  bool has_residual() const {
    return residual_.defined();
  }

  template <typename T>
  Epilogue<T> pointers() const {
    return {bias_.const_data_ptr<float>(), activation_, pointer<T>(gate_), pointer<T>(residual_)};
  }

 private:
  // The contiguous values of an operand, or an undefined tensor.
  static at::Tensor like_result(
      const at::Tensor& x, const std::vector<int64_t>& sizes, const OptionalTensor& operand, const char* name) {
    if (!operand.has_value()) {
      return {};
    }
    TORCH_CHECK(operand->device().is_cpu(), name, " must be on the CPU, got ", operand->device());
    TORCH_CHECK(operand->scalar_type() == x.scalar_type(), "x is ", x.scalar_type(), " but ", name, " is ", operand->scalar_type());
    TORCH_CHECK(operand->sizes() == sizes, name, " must be ", sizes, ", got ", operand->sizes());
    return operand->contiguous();
  }

  template <typename T>
  static const T* pointer(const at::Tensor& operand) {
    return operand.defined() ? operand.const_data_ptr<T>() : nullptr;
  }

  at::Tensor bias_;
  Activation activation_;
  at::Tensor gate_;
  at::Tensor residual_;
};

}  // namespace padst
