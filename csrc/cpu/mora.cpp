// mora_accumulate and its backward, in the symbols of mbf/ops/mora.py.
//
// Tokens are worked through block by block. While a block's numbers are in the core's cache, x is widened, masked,
// continued, turned or summed to rows u of q numbers; M is applied to all rows of the block at once, by the fastest
// product there is for the sizes (lora/base_product.h); and what comes out is added to y. Backward likewise: g from dy,
// u from x again, dM += gᵀ u, du = g M, and du turned back and folded into dx. So nothing of x's size is ever written
// but y and dx.
//
// Blocks are cut by the shapes only, and each is one thread's; dM's sums are taken block by block within groups of
// blocks, and group by group at last: the bits don't depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "lora/arithmetic.h"
#include "lora/base_product.h"
#include "lora/check.h"
#include "lora/chunk_sums.h"
#include "lora/results.h"
#include "lora/serial_blas.h"
#include "lora/serial_onednn.h"

namespace mbf::cpu {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kSharing = 1, kRotation = 6;
constexpr double kLogBase = 9.2103403719761827;  // log 10000: pow would need a newer glibc than exp (portable.cpp)
constexpr int64_t kBlockBytes = 1 << 19;         // of u, in the arithmetic's type
constexpr int64_t kLeastRows = 128;              // of u in a block: below it products lose their speed
constexpr int64_t kLeastBlocks = 4;              // where the work is worth threads
constexpr int64_t kLeastWork = 1 << 20;          // products that are
constexpr int64_t kMostGroups = 16;              // of blocks: each has a sum of dM of its own

struct Terms {
  Tensor M;
  int64_t kind;
  double scale, dropout_p;
  MaybeTensor seed;
};

// Numbers [from, to) of a row, of which the first `period` stand already.
template <typename C>
void continue_cyclically(C* row, int64_t period, int64_t to) {
  if (period == 0) std::fill_n(row, to, C{0});
  for (int64_t k = period; period > 0 && k < to; k += period) std::copy_n(row, std::min(period, to - k), row + k);
}

template <typename C>
class Mora {
 public:
  Mora(const Terms& terms, int64_t rows, int64_t d_in, int64_t d_out)
      : micro_(micro<C>()),
        rows_(rows),
        d_in_(d_in),
        d_out_(d_out),
        q_(terms.M.size(0)),
        sharing_(terms.kind == kSharing),
        scale_(terms.scale) {
    const int64_t padded = parts_of(d_in, q_);
    chunks_ = sharing_ ? 1 : std::min(padded, parts_of(d_out, q_));
    width_ = chunks_ * q_;
    read_ = (sharing_ ? padded : chunks_) * q_;
    cut();
    const bool halves = terms.M.scalar_type() == ScalarType::BFloat16 && sizeof(C) == 4;
    const bool native = multiplies_natively(ScalarType::BFloat16) && SerialOneDnn::possible();
    type_ = halves && native ? ScalarType::BFloat16 : kType<C>;
    M_ = terms.M.scalar_type() == type_ ? terms.M : torch::stable::to(terms.M, type_);
    if (!M_.is_contiguous()) M_ = torch::stable::contiguous(M_);
    if (terms.dropout_p > 0) {
      threshold_ = static_cast<uint32_t>(std::nearbyint(terms.dropout_p * 65536));  // to even, as Python's round
      keep_scale_ = threshold_ < 65536 ? 65536.0 / (65536.0 - threshold_) : 0.0;
      seed_ = static_cast<uint64_t>(*terms.seed->const_data_ptr<int64_t>());
    }
    if (!sharing_) make_angles();
  }

  void forward(const Rows& y, const Rows& x, const Rows& out) const;
  // dx and dM [q, q] of C may be absent, and x without dM.
  void backward(const Rows& dy, const Rows* x, const Rows* dx, C* dM) const;

 private:
  // What a thread works in.
  struct Room {
    Room(const Mora& mora)
        : row(std::max(mora.read_, mora.d_in_)),
          wide(mora.d_out_),
          bits(mora.d_in_ / 8 + 16),
          u(empty({mora.most_, mora.q_}, mora.type_)),
          v(empty({mora.most_, mora.q_}, mora.type_)) {}
    Scratch<C> row, wide;
    std::vector<uint8_t> bits;
    Tensor u, v;
    NoGrad no_grad;
    SerialBlas blas;
    SerialOneDnn onednn;
  };

  int64_t first(int64_t block) const { return rows_ * block / blocks_; }
  void cut();
  void make_angles();
  Mask mask(int64_t row, std::vector<uint8_t>& bits) const;
  void turn(C* row, bool back) const;
  void compress(const Rows& x, int64_t row, Room& room) const;
  void fold(const Rows& dy, int64_t row, Room& room) const;
  void spread(const Rows& dx, int64_t row, Room& room) const;
  void add_outer(const Tensor& g, const Tensor& u, const Tensor& sum, bool first) const;

  // Rows of the block's matrix [count * chunks, q] from or to one token's numbers in the room.
  Rows token(const Tensor& matrix, int64_t n) const { return Rows{matrix.mutable_data_ptr(), type_, width_}.at(n); }
  Tensor part(const Tensor& matrix, int64_t count) const { return viewed(matrix, 0, count * chunks_, q_, q_, 1); }

  const Micro<C>& micro_;
  int64_t rows_, d_in_, d_out_, q_;
  bool sharing_;
  double scale_;
  int64_t chunks_, width_, read_;  // chunks that M is applied to, their numbers, and those of the padded input
  int64_t blocks_, most_;          // blocks of tokens, and rows of u in the largest
  ScalarType type_;                // of u, v and M
  Tensor M_;
  Scratch<C> cosine_, sine_;  // [chunks, q/2]
  uint64_t seed_ = 0;
  uint32_t threshold_ = 0;  // in 2^-16; 0 drops nothing
  double keep_scale_ = 1;
};

template <typename C>
void Mora<C>::cut() {
  const int64_t most = std::max<int64_t>(kLeastRows, kBlockBytes / (q_ * static_cast<int64_t>(sizeof(C))));
  blocks_ = rows_ == 0 ? 0 : parts_of(rows_, std::max<int64_t>(1, most / chunks_));
  if (rows_ * width_ * q_ >= kLeastWork) blocks_ = std::max(blocks_, std::min(kLeastBlocks, rows_));
  most_ = blocks_ == 0 ? 0 : parts_of(rows_, blocks_) * chunks_;
}

// cos and sin of i θⱼ, by those of θⱼ and of the chunk before.
template <typename C>
void Mora<C>::make_angles() {
  const int64_t half = q_ / 2;
  cosine_ = Scratch<C>(chunks_ * half);
  sine_ = Scratch<C>(chunks_ * half);
  for (int64_t j = 0; j < half; ++j) {
    const double theta = std::exp(-2.0 * static_cast<double>(j) / static_cast<double>(q_) * kLogBase);
    const double step_c = std::cos(theta), step_s = std::sin(theta);
    double c = 1, s = 0;
    for (int64_t i = 0; i < chunks_; ++i) {
      cosine_[i * half + j] = static_cast<C>(c);
      sine_[i * half + j] = static_cast<C>(s);
      const double next = c * step_c - s * step_s;
      s = s * step_c + c * step_s;
      c = next;
    }
  }
}

// Of a row of x, from its first element on.
template <typename C>
Mask Mora<C>::mask(int64_t row, std::vector<uint8_t>& bits) const {
  if (threshold_ == 0) return {};
  const uint64_t element = static_cast<uint64_t>(row) * d_in_;
  const int64_t bit = element % 8, blocks = (bit + std::min(d_in_, read_) + 7) / 8;
  if (threshold_ >= 65536) {
    std::fill_n(bits.begin(), blocks, uint8_t{0});
  } else {
    micro_.mask_bits(seed_, threshold_, element / 8, blocks, bits.data());
  }
  return {bits.data(), bit, 0};
}

template <typename C>
void Mora<C>::turn(C* row, bool back) const {
  const int64_t half = q_ / 2;
  for (int64_t i = 1; i < chunks_; ++i) {  // the first chunk stands
    C *a = row + i * q_, *b = a + half;
    if (back) std::swap(a, b);
    micro_.turn(a, b, half, cosine_.get() + i * half, sine_.get() + i * half);
  }
}

// room.row [width] = the chunks of a token's x, but for what dropout scales by.
template <typename C>
void Mora<C>::compress(const Rows& x, int64_t row, Room& room) const {
  C* to = room.row.get();
  const int64_t there = std::min(d_in_, read_);
  micro_.widen(x.at(row).data, x.type, there, to);
  if (threshold_ > 0) micro_.keep(to, there, mask(row, room.bits), C{1});
  continue_cyclically(to, there, read_);
  if (!sharing_) return turn(to, false);
  for (int64_t k = q_; k < read_; k += q_) micro_.add(to, kType<C>, to + k, C{1}, q_, to);
}

// room.row [width] = what the chunks get of a token's dy.
template <typename C>
void Mora<C>::fold(const Rows& dy, int64_t row, Room& room) const {
  C *to = room.row.get(), *from = room.wide.get();
  micro_.widen(dy.at(row).data, dy.type, d_out_, from);
  const int64_t whole = std::min(width_, d_out_);
  std::fill(std::copy_n(from, whole, to), to + width_, C{0});
  for (int64_t o = width_; o < d_out_; o += width_) {
    micro_.add(to, kType<C>, from + o, C{1}, std::min(width_, d_out_ - o), to);
  }
}

// A token's dx from what its chunks have, room.row [width].
template <typename C>
void Mora<C>::spread(const Rows& dx, int64_t row, Room& room) const {
  C* from = room.row.get();
  if (sharing_) {
    continue_cyclically(from, q_, read_);
  } else {
    turn(from, true);
  }
  for (int64_t k = d_in_; k < read_ && d_in_ > 0; k += d_in_) {
    micro_.add(from, kType<C>, from + k, C{1}, std::min(d_in_, read_ - k), from);
  }
  micro_.keep(from, std::min(d_in_, read_), mask(row, room.bits), static_cast<C>(scale_ * keep_scale_));
  if (read_ < d_in_) std::fill(from + read_, from + d_in_, C{0});
  micro_.narrow(from, d_in_, dx.at(row).data, dx.type);
}

template <typename C>
void Mora<C>::forward(const Rows& y, const Rows& x, const Rows& out) const {
  const C factor = static_cast<C>(scale_ * keep_scale_);
  parallel_for(0, blocks_, 1, [&](int64_t begin, int64_t end) {
    Room room(*this);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t from = first(block), count = first(block + 1) - from;
      for (int64_t n = 0; n < count; ++n) {
        compress(x, from + n, room);
        micro_.narrow(room.row.get(), width_, token(room.u, n).data, type_);
      }
      base_product(part(room.v, count), part(room.u, count), M_, std::nullopt, By::kThis);
      for (int64_t n = 0; n < count; ++n) {
        const int64_t row = from + n;
        C* v = room.row.get();
        micro_.widen(token(room.v, n).data, type_, width_, v);
        const char* before = static_cast<const char*>(y.at(row).data);
        char* after = static_cast<char*>(out.at(row).data);
        for (int64_t o = 0; o < d_out_; o += width_) {
          const int64_t at = o * element_size(y.type);
          micro_.add(before + at, y.type, v, factor, std::min(width_, d_out_ - o), after + at);
        }
      }
    }
  });
}

// sum (+)= gᵀ u
template <typename C>
void Mora<C>::add_outer(const Tensor& g, const Tensor& u, const Tensor& sum, bool first) const {
  if (type_ != kType<C>) {
    const Tensor half = empty({q_, q_}, type_), share = first ? sum : empty({q_, q_}, kType<C>);
    mm_out(half, transposed(g), u);
    C* to = static_cast<C*>(share.mutable_data_ptr());
    micro_.widen(half.const_data_ptr(), type_, q_ * q_, to);
    C* total = static_cast<C*>(sum.mutable_data_ptr());
    if (!first) micro_.add(total, kType<C>, to, C{1}, q_ * q_, total);
  } else if (first) {
    mm_out(sum, transposed(g), u);
  } else {
    addmm_out(sum, sum, transposed(g), u);
  }
}

template <typename C>
void Mora<C>::backward(const Rows& dy, const Rows* x, const Rows* dx, C* dM) const {
  const int64_t groups = dM != nullptr ? std::min(blocks_, kMostGroups) : blocks_;
  const Tensor sums = empty({dM != nullptr ? groups * q_ : 0, q_}, kType<C>);
  parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    Room room(*this);
    const Tensor g = empty({most_, q_}, type_);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t from_block = blocks_ * group / groups, to_block = blocks_ * (group + 1) / groups;
      for (int64_t block = from_block; block < to_block; ++block) {
        const int64_t from = first(block), count = first(block + 1) - from;
        const Tensor g_part = part(g, count);
        for (int64_t n = 0; n < count; ++n) {
          fold(dy, from + n, room);
          micro_.narrow(room.row.get(), width_, token(g, n).data, type_);
        }
        if (dM != nullptr) {
          for (int64_t n = 0; n < count; ++n) {
            compress(*x, from + n, room);
            micro_.narrow(room.row.get(), width_, token(room.u, n).data, type_);
          }
          add_outer(g_part, part(room.u, count), viewed(sums, group * q_ * q_, q_, q_, q_, 1), block == from_block);
        }
        if (dx == nullptr) continue;
        base_gradient(part(room.v, count), g_part, M_, false, By::kThis);
        for (int64_t n = 0; n < count; ++n) {
          micro_.widen(token(room.v, n).data, type_, width_, room.row.get());
          spread(*dx, from + n, room);
        }
      }
    }
  });
  if (dM == nullptr) return;
  if (groups == 0) {
    std::fill_n(dM, q_ * q_, C{0});
    return;
  }
  add_chunks(static_cast<const C*>(sums.const_data_ptr()), groups, q_, q_, q_, dM);
  const C factor = static_cast<C>(scale_ * keep_scale_);
  for (int64_t n = 0; n < q_ * q_; ++n) dM[n] *= factor;
}

void check_terms(const char* op, const Terms& terms) {
  check_matrix({op, "M"}, terms.M, -1, -1);
  check_matrix({op, "M"}, terms.M, terms.M.size(1), terms.M.size(0));
  const int64_t q = terms.M.size(0);
  if (q == 0) refuse({op, "M"}, "is empty; it must be at least [1, 1]");
  if (terms.kind != kSharing && terms.kind != kRotation) {
    refuse({op, "kind"}, "is " + std::to_string(terms.kind) + "; it must be 1 (sharing) or 6 (rotation)");
  }
  if (terms.kind == kRotation && q % 2 != 0) {
    refuse({op, "M"}, "has " + std::to_string(q) + " rows; for kind 6 their number must be even");
  }
  check_dropout(op, terms.dropout_p, terms.seed);
}

// -- by the type of the arithmetic --------------------------------------------------------------------------

bool is_wide(const MaybeTensor& tensor) { return tensor && tensor->scalar_type() == ScalarType::Double; }

template <typename C>
Tensor accumulated(const Tensor& y, const Tensor& x, const Terms& terms) {
  const Tensor before = rows_of(readable<C>(y)), input = rows_of(readable<C>(x));
  const Tensor out = empty(shape_of(y), before.scalar_type()), after = rows_of(out);
  Mora<C>(terms, before.size(0), input.size(1), before.size(1))
      .forward(rows_in(before), rows_in(input), rows_in(after));
  return out.scalar_type() == y.scalar_type() ? out : torch::stable::to(out, y.scalar_type());
}

template <typename C>
std::tuple<Tensor, Tensor> differentiated(const Tensor& dy, const MaybeTensor& x, const Terms& terms, int64_t d_in,
                                          bool need_x, bool need_M) {
  const Tensor above = rows_of(readable<C>(dy));
  const MaybeTensor input = x && need_M ? MaybeTensor(rows_of(readable<C>(*x))) : std::nullopt;
  const ScalarType x_type = x ? x->scalar_type() : dy.scalar_type();
  std::vector<int64_t> shape = shape_of(dy);
  shape.back() = d_in;
  Tensor dx = need_x ? empty(shape, reads<C>(x_type) ? x_type : kType<C>) : Tensor();
  const int64_t q = terms.M.size(0);
  const Scratch<C> dM(input ? q * q : 0);
  const Rows x_rows = input ? rows_in(*input) : Rows{};
  const Rows dx_rows = need_x ? rows_in(rows_of(dx)) : Rows{};
  Mora<C>(terms, above.size(0), d_in, above.size(1))
      .backward(rows_in(above), &x_rows, need_x ? &dx_rows : nullptr, input ? dM.get() : nullptr);
  if (need_x && dx.scalar_type() != x_type) dx = torch::stable::to(dx, x_type);
  return {dx, input ? made_of(dM.get(), {q, q}, terms.M.scalar_type()) : Tensor()};
}

}  // namespace

Tensor mora_accumulate(Tensor y, Tensor x, Tensor M, int64_t kind, double scale, double dropout_p, MaybeTensor seed) {
  const Terms terms{M, kind, scale, dropout_p, seed};
  check_rows({"mora_accumulate", "x"}, x, -1);
  check_rows_like({"mora_accumulate", "y"}, y, x, -1);
  check_terms("mora_accumulate", terms);
  return is_wide(y) || is_wide(x) || is_wide(M) ? accumulated<double>(y, x, terms) : accumulated<float>(y, x, terms);
}

std::tuple<Tensor, Tensor> mora_accumulate_backward(Tensor dy, MaybeTensor x, Tensor M, int64_t d_in, int64_t kind,
                                                    double scale, double dropout_p, MaybeTensor seed,
                                                    std::vector<bool> needs) {
  const Terms terms{M, kind, scale, dropout_p, seed};
  const char* op = "mora_accumulate_backward";
  check_length({op, "needs"}, needs.size(), 2);
  check_rows({op, "dy"}, dy, -1);
  if (d_in < 0) refuse({op, "d_in"}, "is " + std::to_string(d_in) + "; it must be a size");
  if (x) check_rows_like({op, "x"}, *x, dy, d_in);
  check_terms(op, terms);
  const bool need_M = needs[1] && x;
  return is_wide(dy) || is_wide(x) || is_wide(M) ? differentiated<double>(dy, x, terms, d_in, needs[0], need_M)
                                                 : differentiated<float>(dy, x, terms, d_in, needs[0], need_M);
}

}  // namespace mbf::cpu
