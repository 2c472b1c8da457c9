// From x to h and z, and from z to y.

#include <algorithm>

#include "arithmetic.h"
#include "branch.h"
#include "gemm.h"

namespace mbf::cpu {

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
Mask Branch<C>::mask_at(int64_t origin, const uint8_t* bits) const {
  if (threshold_ == 0) return {};
  return {bits, static_cast<int64_t>(static_cast<uint64_t>(origin) * d_in_ % 8), mask_ld()};
}

template <typename C>
void Branch<C>::write_mask(int64_t origin, int64_t first, int64_t rows, uint8_t* bits) const {
  if (threshold_ == 0) return;
  const int64_t ld = mask_ld(), offset = mask_at(origin, bits).first;
  const bool together = ld == d_in_;  // rows are whole bytes
  for (int64_t t = first; t < first + rows; t += together ? rows : 1) {
    const uint64_t element = static_cast<uint64_t>(t) * d_in_;
    const int64_t bit = element % 8, blocks = (bit + (together ? rows : 1) * d_in_ + 7) / 8;
    uint8_t* to = bits + (offset + (t - origin) * ld) / 8;
    if (threshold_ >= 65536) {
      std::fill_n(to, blocks, uint8_t{0});
    } else {
      micro_.mask_bits(seed_, threshold_, element / 8, blocks, to);
    }
  }
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
void Branch<C>::project(int64_t first, int64_t rows, Rows x, const C* packed, C* h, C* z,
                        std::vector<uint8_t>& bits) const {
  const Mask kept = mask(first, rows, 0, d_in_, bits);
  if (packed != nullptr) {
    project_on(packed, x, rows, d_in_, r_, kept, h);
  } else {
    micro_.project(x, rows, d_in_, a_, lda_, r_, kept, h);
  }
  if (threshold_ != 0) {
    for (int64_t n = 0; n < rows * r_; ++n) h[n] *= keep_scale_;
  }
  Scratch<C> u(operands_.mix && operands_.gate ? rows * r_ : 0);
  const Routed routed = route(first, rows, h, operands_.gate ? u.get() : z, z);
  if (routed.z != z) std::copy_n(routed.z, rows * r_, z);
}

template <typename C>
void Branch<C>::expand(Rows y, int64_t rows, int64_t column, int64_t columns, const C* z) const {
  if (r_ > 0) micro_.expand(y, rows, columns, z, r_, e_.get() + column, lde_, {}, true);
}

template <typename C>
void project_all(const std::vector<Branch<C>>& branches, const std::vector<Scratch<C>>& packed, Rows x, int64_t first,
                 int64_t rows, const std::vector<Tensor>& hs, const std::vector<C*>& zs) {
  int64_t widest = 0;
  for (const Branch<C>& branch : branches) widest = std::max(widest, branch.rank());
  if (widest == 0) return;
  const int64_t parts = parts_of(rows, kBlockRows), size = (rows + parts - 1) / parts;
  Scratch<C> h(size * widest);
  std::vector<uint8_t> bits;
  for (int64_t t = 0; t < rows; t += size) {
    const int64_t block = std::min(size, rows - t);
    for (size_t n = 0; n < branches.size(); ++n) {
      const int64_t r = branches[n].rank();
      branches[n].project(first + t, block, x.at(t), packed.empty() ? nullptr : packed[n].get(), h.get(), zs[n] + t * r,
                          bits);
      if (hs.empty()) continue;
      const Rows saved{hs[n].mutable_data_ptr(), hs[n].scalar_type(), r};
      micro<C>().narrow(h.get(), block * r, saved.at(first + t).data, saved.type);
    }
  }
}

template Mask Branch<float>::mask(int64_t, int64_t, int64_t, int64_t, std::vector<uint8_t>&) const;
template Mask Branch<double>::mask(int64_t, int64_t, int64_t, int64_t, std::vector<uint8_t>&) const;
template Mask Branch<float>::mask_at(int64_t, const uint8_t*) const;
template Mask Branch<double>::mask_at(int64_t, const uint8_t*) const;
template void Branch<float>::write_mask(int64_t, int64_t, int64_t, uint8_t*) const;
template void Branch<double>::write_mask(int64_t, int64_t, int64_t, uint8_t*) const;
template Branch<float>::Routed Branch<float>::route(int64_t, int64_t, const float*, float*, float*) const;
template Branch<double>::Routed Branch<double>::route(int64_t, int64_t, const double*, double*, double*) const;
template void Branch<float>::project(int64_t, int64_t, Rows, const float*, float*, float*, std::vector<uint8_t>&) const;
template void Branch<double>::project(int64_t, int64_t, Rows, const double*, double*, double*,
                                      std::vector<uint8_t>&) const;
template void Branch<float>::expand(Rows, int64_t, int64_t, int64_t, const float*) const;
template void Branch<double>::expand(Rows, int64_t, int64_t, int64_t, const double*) const;
template void project_all<float>(const std::vector<Branch<float>>&, const std::vector<Scratch<float>>&, Rows, int64_t,
                                 int64_t, const std::vector<Tensor>&, const std::vector<float*>&);
template void project_all<double>(const std::vector<Branch<double>>&, const std::vector<Scratch<double>>&, Rows,
                                  int64_t, int64_t, const std::vector<Tensor>&, const std::vector<double*>&);

}  // namespace mbf::cpu
