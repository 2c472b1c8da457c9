// C, the type of the arithmetic, beside the types of tensors: which of them the inner loops take as they lie, and the
// way in and out for the others.
#pragma once

#include <cstdint>
#include <vector>

#include "micro.h"
#include "torch.h"

namespace mbf::cpu {

template <typename C>
constexpr ScalarType kType = sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float;

inline int64_t padded(int64_t size, int64_t lanes) { return (size + lanes - 1) / lanes * lanes; }

template <typename C>
Rows as_rows(const C* data, int64_t ld) {
  return {const_cast<C*>(data), kType<C>, ld};
}

// What is read may be shared until somebody writes it, and is asked for as such: the copy that writing makes can't be
// made among threads. What is written here is new.
inline Rows rows_in(const Tensor& matrix) {
  return {const_cast<void*>(matrix.const_data_ptr()), matrix.scalar_type(), matrix.stride(0)};
}

inline float* floats(const Tensor& tensor) { return static_cast<float*>(const_cast<void*>(tensor.const_data_ptr())); }

// Whether the inner loops of C read and write this type: fp64 its own only, fp32 all but fp64.
template <typename C>
bool reads(ScalarType type) {
  return (type == ScalarType::Double) == (sizeof(C) == 8);
}

// Contiguous, and of a type that the inner loops of C read.
template <typename C>
Tensor readable(const Tensor& tensor) {
  const Tensor packed = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  return reads<C>(packed.scalar_type()) ? packed : torch::stable::to(packed, kType<C>);
}

// A tensor of `type` from what was computed in C.
template <typename C>
Tensor made_of(const C* data, const std::vector<int64_t>& shape, ScalarType type) {
  Tensor out = empty(shape, reads<C>(type) ? type : kType<C>);
  micro<C>().narrow(data, out.numel(), out.mutable_data_ptr(), out.scalar_type());
  return out.scalar_type() == type ? out : torch::stable::to(out, type);
}

}  // namespace mbf::cpu
