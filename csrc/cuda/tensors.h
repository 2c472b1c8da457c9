// What the host side of kernels asks of tensors: where they are, C++ types of dtypes, memory of torch's allocator.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "device.h"

namespace mbf::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether the tensor is where the kernels run: on a GPU, or on the CPU under the stand-in.
inline bool on_device(const Tensor& tensor) {
#ifdef MBF_EMULATION
  return tensor.is_cpu();
#else
  return tensor.is_cuda();
#endif
}

// Makes a tensor's GPU the current one while it lives, and holds torch's stream there.
class Launcher {
 public:
#ifdef MBF_EMULATION
  explicit Launcher(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
#else
  explicit Launcher(const Tensor& tensor)
      : guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {}
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
#endif
};

// Uninitialised memory on the device of `like`.
inline Tensor empty_on(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

inline Tensor zeros_on(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  return torch::stable::new_zeros(like, shape, type);
}

template <typename T>
struct Type {
  using type = T;
};

// Calls body(Type<T>{}) with the device type T of a floating dtype.
template <typename Body>
decltype(auto) with_type(ScalarType dtype, const char* what, Body&& body) {
  switch (dtype) {
    case ScalarType::Double:
      return body(Type<double>{});
    case ScalarType::Float:
      return body(Type<float>{});
    case ScalarType::BFloat16:
      return body(Type<__nv_bfloat16>{});
    case ScalarType::Half:
      return body(Type<__half>{});
    default:
      STD_TORCH_CHECK(false, what, " must be fp64, fp32, bf16 or fp16");
  }
}

}  // namespace mbf::cuda
