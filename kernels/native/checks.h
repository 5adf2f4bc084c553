// Argument checks: index buffers are user data, so every index is checked before it becomes an address.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace padst {

using OptionalTensor = std::optional<at::Tensor>;

inline const int32_t* int32_pointer(const at::Tensor& indices, const char* name) {
  TORCH_CHECK(indices.device().is_cpu(), name, " must be on the CPU, got ", indices.device());
  TORCH_CHECK(indices.scalar_type() == at::kInt, name, " must be int32, got ", indices.scalar_type());
  TORCH_CHECK(indices.dim() == 1, name, " must have one dimension, got ", indices.dim());
  TORCH_CHECK(indices.is_contiguous(), name, " must be contiguous");
  return indices.const_data_ptr<int32_t>();
}

// The maximum of the unsigned values, not an early exit, because that vectorises; negative ones become huge.
inline void check_indices(const int32_t* indices, int64_t count, int64_t limit, const char* name) {
  uint32_t worst = 0;
  for (int64_t i = 0; i < count; ++i) {
    worst = std::max(worst, static_cast<uint32_t>(indices[i]));
  }
  TORCH_CHECK(count == 0 || worst < static_cast<uint64_t>(limit), name, " holds an index outside [0, ", limit, ")");
}

// The table of an optional permutation, or nullptr for the identity.
inline const int32_t* permutation_pointer(const OptionalTensor& permutation, int64_t size, const char* name) {
  if (!permutation.has_value()) {
    return nullptr;
  }
  const int32_t* table = int32_pointer(*permutation, name);
  TORCH_CHECK(permutation->numel() == size, name, " has ", permutation->numel(), " entries for ", size, " features");
  check_indices(table, size, size, name);
  return table;
}

// target[table[i]] = i, which is where a scatter puts what a gather would fetch.
//
// Throws where an entry occurs twice: a scatter would leave memory unwritten.
inline std::vector<int32_t> inverse_permutation(const int32_t* table, int64_t size, const char* name) {
  std::vector<int32_t> target(size, -1);
  for (int64_t i = 0; i < size; ++i) {
    target[table[i]] = static_cast<int32_t>(i);
  }
  const bool complete = std::find(target.begin(), target.end(), -1) == target.end();
  TORCH_CHECK(complete, name, " is not a permutation: an index occurs twice");
  return target;
}

// The table of an optional permutation and its inverse, which says where every feature goes; nullptr for the identity.
class PermutationTables {
 public:
  PermutationTables(const OptionalTensor& permutation, int64_t size, const char* name)
      : table_(permutation_pointer(permutation, size, name)) {
    if (table_ != nullptr) {
      inverse_ = inverse_permutation(table_, size, name);
    }
  }

  const int32_t* table() const {
    return table_;
  }
  const int32_t* inverse() const {
    return table_ != nullptr ? inverse_.data() : nullptr;
  }

 private:
  const int32_t* table_;
  std::vector<int32_t> inverse_;
};

// `float_values`: values in float32 go with any x.
inline void check_operands(const at::Tensor& x, const at::Tensor& values, int64_t out_features, bool float_values = false) {
  TORCH_CHECK(x.dim() > 0 && x.size(-1) > 0, "x must be [..., in_features], got ", x.sizes());
  TORCH_CHECK(out_features > 0, "out_features must be positive, got ", out_features);
  TORCH_CHECK(x.device().is_cpu() && values.device().is_cpu(), "x and values must be on the CPU");
  TORCH_CHECK(
      x.scalar_type() == values.scalar_type() || (float_values && values.scalar_type() == at::kFloat), "x is ", x.scalar_type(),
      " but values are ", values.scalar_type());
}

// The two operands of a gradient of values, both [tokens, features].
inline void check_gradient_operands(const at::Tensor& grad, const at::Tensor& x) {
  TORCH_CHECK(grad.dim() == 2 && x.dim() == 2, "grad and x must be [tokens, features]");
  TORCH_CHECK(grad.device().is_cpu() && x.device().is_cpu(), "grad and x must be on the CPU");
  TORCH_CHECK(grad.size(0) == x.size(0), "grad has ", grad.size(0), " tokens, x has ", x.size(0));
  TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "x is ", x.scalar_type(), " but grad is ", grad.scalar_type());
  TORCH_CHECK(grad.size(1) > 0 && x.size(1) > 0, "grad and x must have features");
}

// The bias in the precision of the accumulators; zeros where there is none, which spares the kernels a case.
inline at::Tensor float_bias(const OptionalTensor& bias, int64_t out_features) {
  if (!bias.has_value()) {
    return at::zeros(out_features, at::kFloat);
  }
  TORCH_CHECK(bias->device().is_cpu(), "bias must be on the CPU, got ", bias->device());
  TORCH_CHECK(bias->dim() == 1 && bias->numel() == out_features, "bias must be [", out_features, "], got ", bias->sizes());
  return bias->to(at::kFloat).contiguous();
}

inline std::vector<int64_t> output_sizes(const at::Tensor& x, int64_t out_features) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = out_features;
  return sizes;
}

}  // namespace padst
