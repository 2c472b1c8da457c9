// The backward sums: from dy to dz and the chunks' sums, from tiles to dx and dA, and the gradients from the sums.

#include <algorithm>

#include "arithmetic.h"
#include "branch.h"
#include "chunk_sums.h"
#include "gemm.h"

namespace mbf::cpu {

template <typename C>
BranchBackward<C>::BranchBackward(const std::vector<Branch<C>>& branches, const std::vector<Asked>& asked,
                                  const std::vector<bool>& used, const Grid& grid, bool need_dx)
    : branches_(branches), asked_(asked), need_dx_(need_dx), grid_(grid), sums_(branches.size()) {
  const int64_t chunks = grid_.row_chunks, rows = grid_.rows;
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
  if (widest == 0) return;
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
        if (const C* packed = sums_[n].packed_B.get()) {
          project_on(packed, dy, rows, branch.d_out_, r, {}, dz.get());
        } else {
          inner.project(dy, rows, branch.d_out_, branch.e_.get(), branch.lde_, r, {}, dz.get());
        }
      }
      if (asked.of_B()) {
        const C scale = static_cast<C>(branch.operands_.scale);
        const C* factor = routed.z;
        if (scale != C{1}) {
          for (int64_t i = 0; i < count; ++i) z[i] = scale * routed.z[i];
          factor = z.get();
        }
        inner.outer(dy, rows, branch.d_out_, factor, r, {}, {}, sums_[n].dBt.get() + chunk * r * branch.lde_,
                    branch.lde_, later);
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
        inner.outer(as_rows(h.get(), r), rows, r, dz.get(), r, {}, {}, sums_[n].dmix.get() + chunk * r * r, r, later);
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
      if (!sums_[n].used || !(need_dx_ || asked_[n].A) || (branches_[n].r_ == 0 && add_dx)) continue;
      const Branch<C>& branch = branches_[n];
      const int64_t r = branch.r_;
      const C* dh = sums_[n].dh.get() + t * r;
      const Mask mask = branch.mask(t, rows, column, columns, bits);
      if (asked_[n].A) {
        inner.outer(x.at(t - from), rows, columns, dh, r, mask, {},
                    sums_[n].dA.get() + row_chunk * r * branch.lda_ + column, branch.lda_, t > from);
      }
      if (need_dx_) {
        inner.expand(dx.at(t - from), rows, columns, dh, r, branch.a_ + column, branch.lda_, mask, add_dx);
        add_dx = true;
      }
    }
  }
}

template <typename C>
void BranchBackward<C>::begin(int64_t first, int64_t rows) {
  masks_from_ = first;
  for (size_t n = 0; n < branches_.size(); ++n) {
    sums_[n].masks = Scratch<uint8_t>(sums_[n].used ? branches_[n].mask_bytes(rows) : 0);
    if (sums_[n].used && sums_[n].packed_B.get() == nullptr) sums_[n].packed_B = branches_[n].packed_B();
  }
}

template <typename C>
void BranchBackward<C>::read_x(int64_t chunk, Rows x) {
  const Micro<C>& inner = micro<C>();
  const int64_t from = grid_.row(chunk), to = grid_.row(chunk + 1);
  const int64_t parts = parts_of(to - from, kBlockRows), size = (to - from + parts - 1) / parts;
  for (int64_t t = from; t < to; t += size) {
    const int64_t rows = std::min(size, to - t);
    for (size_t n = 0; n < branches_.size(); ++n) {
      if (!sums_[n].used || branches_[n].r_ == 0 || !(need_dx_ || asked_[n].A)) continue;
      const Branch<C>& branch = branches_[n];
      branch.write_mask(masks_from_, t, rows, sums_[n].masks.get());
      if (!asked_[n].A) continue;
      Mask mask = branch.mask_at(masks_from_, sums_[n].masks.get());
      mask.first += (t - masks_from_) * mask.ld;
      inner.outer(x.at(t - from), rows, branch.d_in_, sums_[n].dh.get() + t * branch.r_, branch.r_, mask, {},
                  sums_[n].dA.get() + chunk * branch.r_ * branch.lda_, branch.lda_, t > from);
    }
  }
}

template <typename C>
TileStart<C> BranchBackward<C>::start(size_t member, int64_t first) const {
  const Branch<C>& branch = branches_[member];
  Mask mask = branch.mask_at(masks_from_, sums_[member].masks.get());
  mask.first += (first - masks_from_) * mask.ld;
  return {sums_[member].dh.get() + first * branch.r_, branch.r_, branch.a_, branch.lda_, mask, nullptr, false};
}

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

template class BranchBackward<float>;
template class BranchBackward<double>;

}  // namespace mbf::cpu
