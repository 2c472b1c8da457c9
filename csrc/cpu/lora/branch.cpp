// The operands as the inner loops want them: packed, padded, widened.

#include "branch.h"

#include <algorithm>
#include <cmath>

#include "arithmetic.h"
#include "gemm.h"

namespace mbf::cpu {
namespace {

using torch::stable::parallel_for;

double scalar(const Tensor& tensor) {
  const Tensor wide =
      tensor.scalar_type() == ScalarType::Double ? tensor : torch::stable::to(tensor, ScalarType::Double);
  return *wide.const_data_ptr<double>();
}

}  // namespace

template <typename C>
Branch<C>::Branch(const Operands& operands, const Tensor& input)
    : operands_(operands),
      micro_(micro<C>()),
      r_(operands.A.size(0)),
      d_in_(operands.A.size(1)),
      d_out_(operands.B.size(0)),
      type_(operands.A.scalar_type()),
      lda_(padded(d_in_, micro_.lanes)),
      lde_(padded(d_out_, micro_.lanes)) {
  operands_.A = readable<C>(operands.A);
  operands_.B = readable<C>(operands.B);
  if (operands.merged_B) {
    operands_.merged_B = readable<C>(*operands.merged_B);
    lambda_ = scalar(*operands.merge_weight);
  }
  pack_A();
  pack_B();
  if (operands.mix) {
    const Tensor mix = readable<C>(*operands.mix);
    const int64_t ldm = padded(r_, micro_.lanes);
    mix_ = Scratch<C>(r_ * ldm);
    std::fill_n(mix_.get(), r_ * ldm, C{0});
    const char* from = static_cast<const char*>(mix.const_data_ptr());
    for (int64_t j = 0; j < r_; ++j) {
      micro_.widen(from + j * r_ * element_size(mix.scalar_type()), mix.scalar_type(), r_, mix_.get() + j * ldm);
    }
  }
  if (operands.gate) read_gate(shape_of(input));
  if (operands.dropout_p > 0) {
    threshold_ = static_cast<uint32_t>(std::nearbyint(operands.dropout_p * 65536));  // to even, as Python's round
    keep_scale_ = threshold_ < 65536 ? static_cast<C>(65536.0 / (65536.0 - threshold_)) : C{0};
    seed_ = static_cast<uint64_t>(*operands.seed->const_data_ptr<int64_t>());
  }
}

template <typename C>
Scratch<C> Branch<C>::packed(const C* factor, int64_t ld, int64_t depth) const {
  if constexpr (sizeof(C) == 4) {
    if (gemm::projects(r_)) return gemm::packed({factor, ScalarType::Float, 1, ld}, depth, r_);
  }
  return {};
}

template <typename C>
void Branch<C>::pack_A() {
  const void* from = operands_.A.const_data_ptr();
  const ScalarType type = operands_.A.scalar_type();
  if (type == kType<C> && lda_ == d_in_ && reinterpret_cast<uintptr_t>(from) % 64 == 0) {
    a_ = static_cast<const C*>(from);
    return;
  }
  packed_a_ = Scratch<C>(r_ * lda_);
  for (int64_t j = 0; j < r_; ++j) {
    micro_.widen(static_cast<const char*>(from) + j * d_in_ * element_size(type), type, d_in_,
                 packed_a_.get() + j * lda_);
    std::fill(packed_a_.get() + j * lda_ + d_in_, packed_a_.get() + (j + 1) * lda_, C{0});
  }
  a_ = packed_a_.get();
}

// s B̂ᵀ, with B̂ = B₀ + λ (B − B₀) interpolated on the way.
template <typename C>
void Branch<C>::pack_B() {
  if (r_ == 0) return;
  e_ = Scratch<C>(r_ * lde_);
  const C scale = static_cast<C>(operands_.scale), lambda = static_cast<C>(lambda_);
  const auto read = [&](const Tensor& tensor, int64_t first, int64_t rows, C* to) {
    const ScalarType type = tensor.scalar_type();
    micro_.widen(static_cast<const char*>(tensor.const_data_ptr()) + first * r_ * element_size(type), type, rows * r_,
                 to);
  };
  constexpr int64_t kRows = 16;
  parallel_for(0, parts_of(d_out_, kRows), parts_of(1 << 15, kRows * r_), [&](int64_t begin, int64_t end) {
    Scratch<C> b(kRows * r_), merged(operands_.merged_B ? kRows * r_ : 0);
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * kRows, rows = std::min(kRows, d_out_ - first);
      read(operands_.B, first, rows, b.get());
      if (operands_.merged_B) {
        read(*operands_.merged_B, first, rows, merged.get());
        for (int64_t n = 0; n < rows * r_; ++n) b[n] = merged[n] + lambda * (b[n] - merged[n]);
      }
      for (int64_t j = 0; j < r_; ++j) {
        for (int64_t n = 0; n < rows; ++n) e_[j * lde_ + first + n] = scale * b[n * r_ + j];
      }
    }
  });
  for (int64_t j = 0; j < r_; ++j) std::fill(e_.get() + j * lde_ + d_out_, e_.get() + (j + 1) * lde_, C{0});
}

template <typename C>
void Branch<C>::read_gate(const std::vector<int64_t>& lead) {
  const Tensor gate = readable<C>(*operands_.gate);
  gate_ = Scratch<C>(gate.numel());
  micro_.widen(gate.const_data_ptr(), gate.scalar_type(), gate.numel(), gate_.get());
  if (gate.dim() == 0) return;
  const std::vector<int64_t> sizes = shape_of(gate);
  gate_step_ = sizes.back() == 1 ? 0 : 1;
  if (gate.numel() == sizes.back()) return;
  // An odometer over x's leading axes; the gate's, aligned at the right, move it unless they are of size 1.
  const size_t axes = lead.size() - 1;
  std::vector<int64_t> strides(axes, 0), at(axes, 0);
  int64_t stride = sizes.back(), rows = 1;
  for (size_t axis = axes; axis-- > 0;) {
    rows *= lead[axis];
    const size_t from_right = axes - axis + 1;
    if (from_right > sizes.size()) continue;
    const int64_t size = sizes[sizes.size() - from_right];
    strides[axis] = size == 1 ? 0 : stride;
    stride *= size;
  }
  gate_rows_.resize(rows);
  int64_t offset = 0;
  for (int64_t row = 0; row < rows; ++row) {
    gate_rows_[row] = offset;
    for (size_t axis = axes; axis-- > 0;) {
      offset += strides[axis];
      if (++at[axis] < lead[axis]) break;
      offset -= strides[axis] * lead[axis];
      at[axis] = 0;
    }
  }
}

template class Branch<float>;
template class Branch<double>;

}  // namespace mbf::cpu
