// The low-rank branch on the device, in the symbols of mbf/ops/_branch.py: what lora_linear and lora_accumulate share,
// and what both ask of torch. Defined in lora_accumulate.cu.
#pragma once

#include <array>
#include <initializer_list>
#include <utility>

#include "../ops.h"
#include "../tensors.h"

namespace mbf::cuda::lora {

// One adapter's operands, as in the schemas.
struct Branch {
  Tensor A, B;
  double scale;
  MaybeTensor gate, mix;
  double dropout_p;
  MaybeTensor seed, merged_B, merge_weight;
};

// Which gradients are asked.
struct Needs {
  bool x, A, B, gate, mix, merged_B, merge_weight;
  bool of_z() const { return x || A || gate || mix; }
  bool of_B() const { return B || merged_B || merge_weight; }
};

// What was not asked is an undefined tensor, None in Python.
struct BranchGradients {
  MaybeTensor dh;  // [rows, r]
  Tensor A, B, gate, mix, merged_B, merge_weight;
};

// Throws unless the kernels compute with these dtypes, ranks and devices, and the shapes of the operands fit `input`
// [..., ·], d_in and d_out: what does not would be read beyond.
void check(const char* op, const Branch& branch, std::initializer_list<std::pair<const char*, MaybeTensor>> activations,
           const Tensor& input, int64_t d_in, int64_t d_out);
// The same of tensor [..., columns], whose leading shape is that of `like`.
void check_rows(const char* op, const char* name, const Tensor& tensor, const Tensor& like, int64_t columns);
// The same of h [..., r] and x [..., d_in] beside dy.
void check_backward(const char* op, const Branch& branch, const Tensor& dy, const Tensor& h, const MaybeTensor& x);

// What can be given of what is asked: nothing for operands that aren't there, and no A's without x.
Needs possible(const Branch& branch, const MaybeTensor& x, const Needs& asked);

// h = drop(x) Aᵀ, [..., r] in A's dtype.
Tensor project(const Tensor& x, const Branch& branch);

// out = base + s z B̂ᵀ for contiguous tensors; out may be base.
void accumulate(const Tensor& base, const Tensor& out, const Tensor& h, const Branch& branch);

// What comes from dy [rows, d_out] and h [..., r]: all gradients but those of x and A, and dh if theirs, gate's or
// mix's is asked.
BranchGradients output_gradients(const Tensor& dy, const Tensor& h, const Branch& branch, const Needs& needs);

// dx = base + drop(dh A) where it is asked, base being absent or dx itself, and the gradient of A if x is there for it.
Tensor input_gradients(const MaybeTensor& x, const MaybeTensor& base, const MaybeTensor& dx, const Tensor& dh,
                       const Branch& branch);

// -- torch ------------------------------------------------------------------------------------------------------------

// An operator of one result, by torch's dispatcher.
template <typename... Arguments>
Tensor call(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// The shape of `like` with another last axis.
inline std::vector<int64_t> shape_with(const Tensor& like, int64_t last) {
  std::vector<int64_t> shape = shape_of(like);
  shape.back() = last;
  return shape;
}

// [..., n] as [rows, n] with contiguous rows; a copy only where it must be one.
inline Tensor matrix(const Tensor& tensor) {
  if (tensor.dim() == 2 && (tensor.stride(1) == 1 || tensor.size(1) == 1)) return tensor;
  const Tensor whole = packed(tensor);
  if (whole.dim() == 2) return whole;
  int64_t rows = 1;
  for (int64_t axis = 0; axis + 1 < whole.dim(); ++axis) rows *= whole.size(axis);
  return torch::stable::view(whole, {rows, whole.size(whole.dim() - 1)});
}

inline Tensor cast(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

}  // namespace mbf::cuda::lora
