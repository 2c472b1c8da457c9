#include "branch.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace mbf::cpu {
namespace {

using torch::stable::parallel_for;

template <typename C>
constexpr ScalarType kType = sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float;

int64_t padded(int64_t size, int64_t lanes) { return (size + lanes - 1) / lanes * lanes; }

template <typename C>
Rows as_rows(const C* data, int64_t ld) {
  return {const_cast<C*>(data), kType<C>, ld};
}

// Whether the inner loops of C read and write this type: fp64 its own only, fp32 all but fp64.
template <typename C>
bool reads(ScalarType type) {
  return (type == ScalarType::Double) == (sizeof(C) == 8);
}

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

double scalar(const Tensor& tensor) {
  const Tensor wide =
      tensor.scalar_type() == ScalarType::Double ? tensor : torch::stable::to(tensor, ScalarType::Double);
  return *wide.const_data_ptr<double>();
}

}  // namespace

// -- operands -----------------------------------------------------------------------------------------------

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

// -- forward ------------------------------------------------------------------------------------------------

template <typename C>
Mask Branch<C>::mask(int64_t first, int64_t rows, int64_t column, int64_t columns, std::vector<uint8_t>& bits) const {
  if (threshold_ == 0) return {};
  const uint64_t element = static_cast<uint64_t>(first) * d_in_ + column;
  const int64_t offset = element % 8;
  const bool whole = columns == d_in_;
  // Rows of a part lie in the stream at their own distance, which leaves an element at the bit that it has in its byte.
  const int64_t ld = whole ? d_in_ : (columns + 23) / 8 * 8 + d_in_ % 8;
  const int64_t size = (offset + (rows - 1) * ld + columns + 7) / 8 + 8;
  if (static_cast<int64_t>(bits.size()) < size) bits.resize(size);
  if (threshold_ >= 65536) {
    std::fill(bits.begin(), bits.end(), uint8_t{0});
  } else if (whole) {
    micro_.mask_bits(seed_, threshold_, element / 8, (offset + rows * d_in_ + 7) / 8, bits.data());
  } else {
    for (int64_t t = 0; t < rows; ++t) {
      const uint64_t from = element + static_cast<uint64_t>(t) * d_in_;
      const int64_t bit = from % 8;
      micro_.mask_bits(seed_, threshold_, from / 8, (bit + columns + 7) / 8, bits.data() + (offset + t * ld) / 8);
    }
  }
  return {bits.data(), offset, ld};
}

template <typename C>
typename Branch<C>::Routed Branch<C>::route(int64_t first, int64_t rows, const C* h, C* scratch_u, C* scratch_z) const {
  const C* u = h;
  if (operands_.mix) {
    micro_.project(as_rows(h, r_), rows, r_, mix_.get(), padded(r_, micro_.lanes), r_, {}, scratch_u);
    u = scratch_u;
  }
  if (!operands_.gate) return {u, u};
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t j = 0; j < r_; ++j) scratch_z[t * r_ + j] = u[t * r_ + j] * gate_[gate_at(first + t, j)];
  }
  return {u, scratch_z};
}

template <typename C>
void Branch<C>::project(int64_t first, int64_t rows, Rows x, C* h, C* z, std::vector<uint8_t>& bits) const {
  micro_.project(x, rows, d_in_, a_, lda_, r_, mask(first, rows, 0, d_in_, bits), h);
  if (threshold_ != 0) {
    for (int64_t n = 0; n < rows * r_; ++n) h[n] *= keep_scale_;
  }
  Scratch<C> u(operands_.mix && operands_.gate ? rows * r_ : 0);
  const Routed routed = route(first, rows, h, operands_.gate ? u.get() : z, z);
  if (routed.z != z) std::copy_n(routed.z, rows * r_, z);
}

template <typename C>
void Branch<C>::expand(Rows y, int64_t rows, int64_t column, int64_t columns, const C* z) const {
  micro_.expand(y, rows, columns, z, r_, e_.get() + column, lde_, {}, true);
}

template <typename C>
void project_all(const std::vector<Branch<C>>& branches, Rows x, int64_t first, int64_t rows,
                 const std::vector<Tensor>& hs, const std::vector<C*>& zs) {
  int64_t widest = 0;
  for (const Branch<C>& branch : branches) widest = std::max(widest, branch.rank());
  const int64_t parts = parts_of(rows, kBlockRows), size = (rows + parts - 1) / parts;
  Scratch<C> h(size * widest);
  std::vector<uint8_t> bits;
  for (int64_t t = 0; t < rows; t += size) {
    const int64_t block = std::min(size, rows - t);
    for (size_t n = 0; n < branches.size(); ++n) {
      const int64_t r = branches[n].rank();
      branches[n].project(first + t, block, x.at(t), h.get(), zs[n] + t * r, bits);
      if (hs.empty()) continue;
      const Rows saved{hs[n].mutable_data_ptr(), hs[n].scalar_type(), r};
      micro<C>().narrow(h.get(), block * r, saved.at(first + t).data, saved.type);
    }
  }
}

// -- backward -----------------------------------------------------------------------------------------------

template <typename C>
BranchBackward<C>::BranchBackward(const std::vector<Branch<C>>& branches, const std::vector<Asked>& asked,
                                  const std::vector<bool>& used, int64_t rows, bool need_dx)
    : branches_(branches),
      asked_(asked),
      need_dx_(need_dx),
      grid_(rows, branches[0].d_in_, branches[0].d_out_),
      sums_(branches.size()) {
  const int64_t chunks = grid_.row_chunks;
  for (size_t n = 0; n < branches.size(); ++n) {
    const Branch<C>& branch = branches[n];
    sums_[n].used = used[n];
    if (asked[n].A) sums_[n].dA = Scratch<C>(chunks * branch.r_ * branch.lda_);
    if (asked[n].of_B()) sums_[n].dBt = Scratch<C>(chunks * branch.r_ * branch.lde_);
    if (asked[n].mix) sums_[n].dmix = Scratch<C>(chunks * branch.r_ * branch.r_);
    if (asked[n].gate) sums_[n].dgate = Scratch<C>(rows * branch.r_);
    if (asked[n].A || need_dx) sums_[n].dh = Scratch<C>(rows * branch.r_);
  }
}

template <typename C>
void BranchBackward<C>::read_dy(int64_t chunk, const std::vector<Rows>& dys, const std::vector<Tensor>& hs) {
  const Micro<C>& inner = micro<C>();
  const int64_t from = grid_.row(chunk), to = grid_.row(chunk + 1);
  const int64_t parts = parts_of(to - from, kBlockRows), size = (to - from + parts - 1) / parts;
  int64_t widest = 0;
  for (const auto& branch : branches_) widest = std::max(widest, branch.r_);
  Scratch<C> h(size * widest), u(size * widest), z(size * widest), dz(size * widest);

  for (int64_t t = from; t < to; t += size) {
    const int64_t rows = std::min(size, to - t);
    for (size_t n = 0; n < branches_.size(); ++n) {
      if (!sums_[n].used) continue;
      const Branch<C>& branch = branches_[n];
      const Asked& asked = asked_[n];
      const int64_t r = branch.r_, count = rows * r;
      const bool later = t > from;  // the chunk's sums have begun
      const Rows dy = dys[n].at(t - from);

      typename Branch<C>::Routed routed{};
      if (asked.of_B() || asked.gate || asked.mix) {
        const Rows saved{hs[n].mutable_data_ptr(), hs[n].scalar_type(), r};
        inner.widen(saved.at(t).data, saved.type, count, h.get());
        routed = branch.route(t, rows, h.get(), u.get(), z.get());
      }
      const bool need_dh = need_dx_ || asked.A;
      if (need_dh || asked.gate || asked.mix) {
        inner.project(dy, rows, branch.d_out_, branch.e_.get(), branch.lde_, r, {}, dz.get());
      }
      if (asked.of_B()) {
        const C scale = static_cast<C>(branch.operands_.scale);
        const C* factor = routed.z;
        if (scale != C{1}) {
          for (int64_t i = 0; i < count; ++i) z[i] = scale * routed.z[i];
          factor = z.get();
        }
        inner.outer(dy, rows, branch.d_out_, factor, r, {}, sums_[n].dBt.get() + chunk * r * branch.lde_, branch.lde_,
                    later);
      }
      if (asked.gate) {
        for (int64_t i = 0; i < count; ++i) sums_[n].dgate[t * r + i] = dz[i] * routed.u[i];
      }
      if (!need_dh && !asked.mix) continue;
      if (branch.operands_.gate) {
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t j = 0; j < r; ++j) dz[row * r + j] *= branch.gate_[branch.gate_at(t + row, j)];
        }
      }
      if (asked.mix) {
        inner.outer(as_rows(h.get(), r), rows, r, dz.get(), r, {}, sums_[n].dmix.get() + chunk * r * r, r, later);
      }
      if (!need_dh) continue;
      C* dh = sums_[n].dh.get() + t * r;
      if (branch.operands_.mix) {
        inner.expand(as_rows(dh, r), rows, r, dz.get(), r, branch.mix_.get(), padded(r, inner.lanes), {}, false);
      } else {
        std::copy_n(dz.get(), count, dh);
      }
      if (branch.threshold_ != 0) {
        for (int64_t i = 0; i < count; ++i) dh[i] *= branch.keep_scale_;
      }
    }
  }
}

template <typename C>
void BranchBackward<C>::visit(int64_t row_chunk, int64_t column_chunk, Rows x, Rows dx, bool add) {
  const Micro<C>& inner = micro<C>();
  const int64_t from = grid_.row(row_chunk), to = grid_.row(row_chunk + 1);
  const int64_t column = grid_.column(column_chunk), columns = grid_.column(column_chunk + 1) - column;
  const int64_t parts = parts_of(to - from, kBlockRows), size = (to - from + parts - 1) / parts;
  std::vector<uint8_t> bits;
  for (int64_t t = from; t < to; t += size) {
    const int64_t rows = std::min(size, to - t);
    bool add_dx = add;
    for (size_t n = 0; n < branches_.size(); ++n) {
      if (!sums_[n].used || !(need_dx_ || asked_[n].A)) continue;
      const Branch<C>& branch = branches_[n];
      const int64_t r = branch.r_;
      const C* dh = sums_[n].dh.get() + t * r;
      const Mask mask = branch.mask(t, rows, column, columns, bits);
      if (asked_[n].A) {
        inner.outer(x.at(t - from), rows, columns, dh, r, mask,
                    sums_[n].dA.get() + row_chunk * r * branch.lda_ + column, branch.lda_, t > from);
      }
      if (need_dx_) {
        inner.expand(dx.at(t - from), rows, columns, dh, r, branch.a_ + column, branch.lda_, mask, add_dx);
        add_dx = true;
      }
    }
  }
}

namespace {

// out[j, i] = Σ_chunk sums[chunk, j, i]
template <typename C>
void add_chunks(const C* sums, int64_t chunks, int64_t rows, int64_t columns, int64_t ld, C* out) {
  parallel_for(0, rows, parts_of(1 << 14, columns), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      std::copy_n(sums + j * ld, columns, out + j * columns);
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        const C* more = sums + (chunk * rows + j) * ld;
        for (int64_t i = 0; i < columns; ++i) out[j * columns + i] += more[i];
      }
    }
  });
}

// out[i, j] = Σ_chunk sums[chunk, j, i]; `sums` is padded to whole vectors.
template <typename C>
void add_chunks_transposed(const C* sums, int64_t chunks, int64_t rows, int64_t columns, int64_t ld, C* out) {
  constexpr int64_t kWidth = 4;
  parallel_for(0, parts_of(columns, kWidth), parts_of(1 << 14, kWidth * rows), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * kWidth, width = std::min(kWidth, columns - first);
      for (int64_t j = 0; j < rows; ++j) {
        C total[kWidth];
        std::copy_n(sums + j * ld + first, kWidth, total);
        for (int64_t chunk = 1; chunk < chunks; ++chunk) {
          const C* more = sums + (chunk * rows + j) * ld + first;
          for (int64_t i = 0; i < kWidth; ++i) total[i] += more[i];
        }
        if (width == kWidth) {
          for (int64_t i = 0; i < kWidth; ++i) out[(first + i) * rows + j] = total[i];
        } else {
          for (int64_t i = 0; i < width; ++i) out[(first + i) * rows + j] = total[i];
        }
      }
    }
  });
}

}  // namespace

template <typename C>
BranchGradients BranchBackward<C>::finish(size_t member) {
  const Branch<C>& branch = branches_[member];
  const Operands& operands = branch.operands_;
  const Asked& asked = asked_[member];
  const Sums& sums = sums_[member];
  const int64_t r = branch.r_, d_in = branch.d_in_, d_out = branch.d_out_;
  const int64_t chunks = grid_.row_chunks, rows = grid_.rows;
  const bool any = sums.used && chunks > 0;
  BranchGradients out;

  // Sums into a tensor of the operand's type; straight into it where that is the type of the arithmetic.
  const auto gradient = [&](const std::vector<int64_t>& shape, ScalarType type, const auto& fill) {
    if (type == kType<C>) {
      Tensor tensor = empty(shape, type);
      C* data = static_cast<C*>(tensor.mutable_data_ptr());
      any ? fill(data) : static_cast<void>(std::fill_n(data, tensor.numel(), C{0}));
      return tensor;
    }
    int64_t size = 1;
    for (const int64_t axis : shape) size *= axis;
    Scratch<C> data(size);
    any ? fill(data.get()) : static_cast<void>(std::fill_n(data.get(), size, C{0}));
    return made_of(data.get(), shape, type);
  };

  if (asked.A) {
    out.A = gradient({r, d_in}, branch.type_,
                     [&](C* data) { add_chunks(sums.dA.get(), chunks, r, d_in, branch.lda_, data); });
  }
  if (asked.of_B()) {
    const std::vector<int64_t> shape{d_out, r};
    if (!operands.merged_B) {
      out.B = gradient(shape, branch.type_,
                       [&](C* data) { add_chunks_transposed(sums.dBt.get(), chunks, r, d_out, branch.lde_, data); });
    } else {
      const int64_t size = d_out * r;
      Scratch<C> whole(size);
      if (any) {
        add_chunks_transposed(sums.dBt.get(), chunks, r, d_out, branch.lde_, whole.get());
      } else {
        std::fill_n(whole.get(), size, C{0});
      }
      const auto times = [&](double factor) {
        Scratch<C> scaled(size);
        for (int64_t n = 0; n < size; ++n) scaled[n] = static_cast<C>(factor * whole[n]);
        return made_of(scaled.get(), shape, branch.type_);
      };
      if (asked.B) out.B = times(branch.lambda_);
      if (asked.merged_B) out.merged_B = times(1 - branch.lambda_);
      if (asked.merge_weight) {
        Scratch<C> b(size), merged(size);
        micro<C>().widen(operands.B.const_data_ptr(), operands.B.scalar_type(), size, b.get());
        micro<C>().widen(operands.merged_B->const_data_ptr(), operands.merged_B->scalar_type(), size, merged.get());
        double total = 0;
        for (int64_t n = 0; n < size; ++n) total += static_cast<double>(whole[n]) * (b[n] - merged[n]);
        const C value = static_cast<C>(total);
        out.merge_weight = made_of(&value, {}, operands.merge_weight->scalar_type());
      }
    }
  }
  if (asked.mix) {
    out.mix = gradient({r, r}, operands.mix->scalar_type(),
                       [&](C* data) { add_chunks(sums.dmix.get(), chunks, r, r, r, data); });
  }
  if (asked.gate) {
    out.gate = gradient(shape_of(*operands.gate), operands.gate->scalar_type(), [&](C* data) {
      std::vector<double> total(operands.gate->numel(), 0.0);
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t j = 0; j < r; ++j) total[branch.gate_at(row, j)] += sums.dgate[row * r + j];
      }
      for (size_t n = 0; n < total.size(); ++n) data[n] = static_cast<C>(total[n]);
    });
  }
  return out;
}

template class Branch<float>;
template class Branch<double>;
template class BranchBackward<float>;
template class BranchBackward<double>;
template void project_all<float>(const std::vector<Branch<float>>&, Rows, int64_t, int64_t, const std::vector<Tensor>&,
                                 const std::vector<float*>&);
template void project_all<double>(const std::vector<Branch<double>>&, Rows, int64_t, int64_t,
                                  const std::vector<Tensor>&, const std::vector<double*>&);

}  // namespace mbf::cpu
