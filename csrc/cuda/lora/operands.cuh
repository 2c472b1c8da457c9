// A branch's operands as kernels take them, and the types and grids that they are launched with.
#pragma once

#include <algorithm>
#include <cmath>

#include "branch.h"
#include "route.cuh"
#include "tile.cuh"

namespace mbf::cuda::lora {

constexpr int64_t kMostRanks = 256;

// Of the current GPU.
inline int64_t multiprocessors() {
#ifdef MBF_EMULATION
  return 132;
#else
  int device = 0, count = 0;
  cuda::check(cudaGetDevice(&device), "cudaGetDevice");
  cuda::check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
#endif
}

constexpr int64_t divided(int64_t size, int64_t by) { return (size + by - 1) / by; }
constexpr int64_t padded(int64_t size, int64_t to) { return divided(size, to) * to; }

// An axis in parts, of which each has `span` elements, a multiple of `block`, and at least `least` unless there are
// fewer: as many as make about `wanted` blocks with `others` for each part. The same for the same sizes on the same
// kind of GPU, and so are sums over the parts.
struct Split {
  int64_t span, parts;
  Split(int64_t size, int64_t block, int64_t least, int64_t wanted, int64_t others) {
    const int64_t most = std::max<int64_t>(1, std::min(wanted / std::max<int64_t>(1, others), size / least));
    span = std::max(block, padded(divided(size, most), block));
    parts = divided(size, span);
  }
};

inline dim3 grid_of(int64_t x, int64_t y = 1, int64_t z = 1) {
  return dim3(static_cast<unsigned int>(x), static_cast<unsigned int>(y), static_cast<unsigned int>(z));
}

// Calls body(Type<P>{}) with the type of A and B.
template <typename Body>
void with_factor(ScalarType factor, Body&& body) {
  if (factor == ScalarType::Float) return body(Type<float>{});
  if (factor == ScalarType::BFloat16) return body(Type<__nv_bfloat16>{});
  return body(Type<__half>{});
}

// Calls body(Type<X>{}, Type<P>{}) with the types of activations and of A and B, which are the same or the latter fp32.
template <typename Body>
void with_types(ScalarType activation, ScalarType factor, Body&& body) {
  if (factor == ScalarType::BFloat16) return body(Type<__nv_bfloat16>{}, Type<__nv_bfloat16>{});
  if (factor == ScalarType::Half) return body(Type<__half>{}, Type<__half>{});
  if (activation == ScalarType::BFloat16) return body(Type<__nv_bfloat16>{}, Type<float>{});
  if (activation == ScalarType::Half) return body(Type<__half>{}, Type<float>{});
  return body(Type<float>{}, Type<float>{});
}

template <typename T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
const T* const_data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
Rows<T> described(T* data, const Tensor& matrix) {
  const int64_t columns = matrix.size(1), stride = matrix.size(0) > 1 ? matrix.stride(0) : columns;
  const bool octets = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kOctet == 0 && columns % kOctet == 0;
  return {data, matrix.size(0), columns, stride, octets};
}

template <typename T>
Rows<const T> rows_in(const Tensor& matrix) {
  return described(const_data_of<T>(matrix), matrix);
}

template <typename T>
Rows<T> rows_out(const Tensor& matrix) {
  return described(data_of<T>(matrix), matrix);
}

// The least half-word of the mask that is kept: round(p · 2¹⁶), half to even; see mbf/ops/philox.py.
inline uint32_t least_kept(const Branch& branch) {
  return static_cast<uint32_t>(std::nearbyint(branch.dropout_p * 65536.0));
}

// With everything dropped there is nothing to scale.
inline float keep_scale(const Branch& branch) {
  const uint32_t least = least_kept(branch);
  return least == 65536 ? 0.0f : static_cast<float>(65536.0 / (65536.0 - least));
}

inline Dropout dropout_of(const Branch& branch) {
  const uint32_t least = least_kept(branch);
  return {least == 0 ? nullptr : const_data_of<int64_t>(*branch.seed), least};
}

// B̂'s parts. λ that lies on the device is read there, so that nothing waits for it.
class Interpolated {
 public:
  explicit Interpolated(const Branch& branch) : B(packed(branch.B)) {
    if (!branch.merged_B) return;
    merged = packed(*branch.merged_B);
    if (on_device(*branch.merge_weight)) {
      weight = cast(*branch.merge_weight, ScalarType::Float);
    } else {
      value = *const_data_of<float>(cast(*branch.merge_weight, ScalarType::Float));
    }
  }

  const float* weight_data() const { return weight ? const_data_of<float>(*weight) : nullptr; }
  template <typename P>
  const P* merged_data() const {
    return merged ? const_data_of<P>(*merged) : nullptr;
  }
  template <typename P>
  Factor<P> factor() const {
    Rows<const P> rows = rows_in<P>(B);
    rows.octets = rows.octets && reinterpret_cast<uintptr_t>(merged_data<P>()) % 16 == 0;
    return {rows, merged_data<P>(), weight_data(), value};
  }

  Tensor B;
  MaybeTensor merged, weight;
  float value = 0.0f;
};

// In fp32 where h is: a single number may lie on the CPU, as it may in torch.
inline Tensor floats_beside(const Tensor& h, const Tensor& tensor) {
  return on_device(tensor) ? cast(tensor, ScalarType::Float)
                           : torch::stable::to(tensor, ScalarType::Float, std::nullopt, h.device());
}

// Gate and mix in fp32, the gate broadcast to h.
class Routed {
 public:
  Routed(const Branch& branch, const Tensor& h) {
    const int64_t rank = branch.A.size(0), rows = rank == 0 ? 0 : h.numel() / rank;
    routing = {rows, rank, nullptr, 0, 0, nullptr, 0, 0};
    if (branch.gate) {
      const Tensor wide = call("aten::expand", "", floats_beside(h, *branch.gate), h.sizes(), false);
      gate_ = torch::stable::reshape(wide, {rows, rank});
      routing.gate = const_data_of<float>(*gate_);
      routing.gate_row = gate_->stride(0);
      routing.gate_rank = gate_->stride(1);
    }
    if (branch.mix) {
      mix_ = floats_beside(h, *branch.mix);
      routing.mix = const_data_of<float>(*mix_);
      routing.mix_row = mix_->stride(0);
      routing.mix_column = mix_->stride(1);
    }
  }

  bool there() const { return gate_ || mix_; }

  Routing routing;

 private:
  MaybeTensor gate_, mix_;
};

}  // namespace mbf::cuda::lora
