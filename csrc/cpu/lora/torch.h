// What the kernels of the low-rank layers ask of torch: a few operators through its dispatcher, and scratch memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <new>
#include <optional>
#include <utility>
#include <vector>

namespace mbf::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// out = left right; out's rows may have any stride.
inline void mm_out(const Tensor& out, const Tensor& left, const Tensor& right) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
}

// out = addend + left right; out may be the addend itself.
inline void addmm_out(const Tensor& out, const Tensor& addend, const Tensor& left, const Tensor& right) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), addend.get(), left.get(), right.get(), 1.0, 1.0));
}

// Tensors are made and viewed without torch's dispatcher, whose boxes cost a small layer as much as its products.

// The matrix of these sizes and strides that begins `offset` elements after `tensor` does.
inline Tensor viewed(const Tensor& tensor, int64_t offset, int64_t rows, int64_t columns, int64_t row_stride,
                     int64_t column_stride) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {row_stride, column_stride};
  AtenTensorHandle out = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), 2, sizes, strides, offset, &out));
  return Tensor(out);
}

inline Tensor transposed(const Tensor& matrix) {
  return viewed(matrix, 0, matrix.size(1), matrix.size(0), matrix.stride(1), matrix.stride(0));
}

inline std::vector<int64_t> contiguous_strides(const int64_t* sizes, int64_t axes) {
  std::vector<int64_t> strides(axes, 1);
  for (int64_t axis = axes - 1; axis > 0; --axis) {
    strides[axis - 1] = strides[axis] * std::max<int64_t>(sizes[axis], 1);
  }
  return strides;
}

// The contiguous tensor of this shape that begins `offset` elements after `memory` does.
inline Tensor part_of(const Tensor& memory, int64_t offset, const std::vector<int64_t>& shape) {
  const int64_t axes = static_cast<int64_t>(shape.size());
  const auto strides = contiguous_strides(shape.data(), axes);
  AtenTensorHandle out = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(memory.get(), axes, shape.data(), strides.data(), offset, &out));
  return Tensor(out);
}

inline Tensor empty(const int64_t* sizes, int64_t axes, ScalarType type) {
  const auto strides = contiguous_strides(sizes, axes);
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle out = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(axes, sizes, strides.data(), code, aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}

inline Tensor empty(const std::vector<int64_t>& shape, ScalarType type) {
  return empty(shape.data(), static_cast<int64_t>(shape.size()), type);
}

inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) {
  return empty(shape.begin(), static_cast<int64_t>(shape.size()), type);
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// No autograd for the operators that a worker thread calls, which does not inherit the caller's place below autograd.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

inline Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// [..., columns] as the contiguous matrix [rows, columns].
inline Tensor rows_of(const Tensor& tensor) {
  const Tensor contiguous = packed(tensor);
  if (contiguous.dim() == 2) return contiguous;
  const int64_t columns = contiguous.size(contiguous.dim() - 1);
  int64_t rows = 1;
  for (int64_t axis = 0; axis + 1 < contiguous.dim(); ++axis) rows *= contiguous.size(axis);
  return torch::stable::view(contiguous, {rows, columns});
}

// [rows, columns] as [*lead of like, columns].
inline Tensor shaped_as(const Tensor& matrix, const Tensor& like) {
  if (like.dim() == 2) return matrix;
  std::vector<int64_t> shape = shape_of(like);
  shape.back() = matrix.size(1);
  return torch::stable::view(matrix, shape);
}

// Uninitialised memory on a cache line's boundary.
template <typename T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t size) {
    if (size > 0) {
      const size_t bytes = (static_cast<size_t>(size) * sizeof(T) + 63) / 64 * 64;
      data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
    }
  }
  ~Scratch() { std::free(data_); }
  Scratch(Scratch&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Scratch& operator=(Scratch&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* get() const { return data_; }
  T& operator[](int64_t n) const { return data_[n]; }

 private:
  T* data_ = nullptr;
};

}  // namespace mbf::cpu
