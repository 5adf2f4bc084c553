// What happens to finished sums on their way out: y = act(z + bias) + residual.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string_view>

#include "activation.h"
#include "checks.h"

namespace padst {

template <typename T>
struct Epilogue {
  const float* bias;  // in the final order
  Activation activation;
  const T* residual;  // laid out like y, or nullptr

  // The same for outputs from `feature` on, which is element `element` of y.
  Epilogue from(int64_t feature, int64_t element) const {
    return {bias + feature, activation, residual != nullptr ? residual + element : nullptr};
  }
};

// Checks what an operator was given for its epilogue, and holds it.
class EpilogueOperands {
 public:
  // x: the activations, for their dtype; sizes: of the result, [..., out_features].
  EpilogueOperands(
      const at::Tensor& x, const std::vector<int64_t>& sizes, int64_t out_features, const OptionalTensor& bias,
      std::string_view activation, const OptionalTensor& residual)
      : bias_(float_bias(bias, out_features)), activation_(parse_activation(activation)) {
    if (residual.has_value()) {
      TORCH_CHECK(residual->device().is_cpu(), "residual must be on the CPU, got ", residual->device());
      TORCH_CHECK(residual->scalar_type() == x.scalar_type(), "x is ", x.scalar_type(), " but residual is ", residual->scalar_type());
      TORCH_CHECK(residual->sizes() == sizes, "residual must be ", sizes, ", got ", residual->sizes());
      residual_ = residual->contiguous();
    }
  }

  bool has_residual() const {
    return residual_.defined();
  }

  template <typename T>
  Epilogue<T> pointers() const {
    return {bias_.const_data_ptr<float>(), activation_, residual_.defined() ? residual_.const_data_ptr<T>() : nullptr};
  }

 private:
  at::Tensor bias_;
  Activation activation_;
  at::Tensor residual_;
};

}  // namespace padst
