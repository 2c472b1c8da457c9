// lilora_accumulate and its backward: a LoRA in a LoRA, in the symbols of mbf/ops/lilora.py.
//
// On x's side the branch is a LoRA of rank r, and its passes are those of lora/branch.h. On y's side it is one of rank
// r + r̃ with the factor (B, Eb). The loops want that transposed and padded anyway, so the two are packed side by side
// and joining them costs nothing; z, and p and q from dy, are rows of r + r̃ numbers. A block of y is copied, and given
// the branch while it is in the core's cache.

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "lora/arithmetic.h"
#include "lora/branch.h"
#include "lora/check.h"
#include "lora/chunk_sums.h"
#include "lora/passes.h"
#include "lora/results.h"

namespace mbf::cpu {
namespace {

using torch::stable::parallel_for;

// Of y's parts, of which one and its columns of (B, Eb) stay in the core's cache.
constexpr int64_t kForwardRows = 256, kForwardColumns = 512;

struct LiloraOperands {
  Tensor A, B, Ea, Eb, weight, scale;
  double dropout_p;
  MaybeTensor seed;
};

struct LiloraAsked {
  bool x, A, B, Ea, Eb, weight, scale;
  bool of_z() const { return B || Eb; }
  bool numbers() const { return weight || scale; }
  bool dh() const { return x || A; }
  bool of_p() const { return dh() || Ea || numbers(); }
};

struct LiloraGradients {
  MaybeTensor x, A, B, Ea, Eb, weight, scale;
};

double number(const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Double) return *tensor.const_data_ptr<double>();
  float value;
  micro<float>().widen(tensor.const_data_ptr(), tensor.scalar_type(), 1, &value);
  return value;
}

Tensor tensor_of(double value, ScalarType type) {
  if (type == ScalarType::Double) return made_of(&value, {}, type);
  const float narrow = static_cast<float>(value);
  return made_of(&narrow, {}, type);
}

// The operands as the inner loops want them.
template <typename C>
class Lilora {
 public:
  Lilora(const LiloraOperands& operands, const Tensor& input)
      : micro_(micro<C>()),
        r_(operands.A.size(0)),
        inner_(operands.Ea.size(0)),
        d_out_(operands.B.size(0)),
        ldo_(padded(d_out_, micro_.lanes)),
        ldr_(padded(r_, micro_.lanes)),
        w_(number(operands.weight)),
        s_(number(operands.scale)),
        a_(static_cast<C>(s_ * w_)),
        b_(static_cast<C>(s_ * (1 - w_))),
        up_(ranks() * ldo_),
        ea_(inner_ * ldr_) {
    // The LoRA of A alone: its B has no rows, and what it puts out nobody reads.
    const Tensor none = empty({0, r_}, operands.A.scalar_type());
    down_.emplace_back(Operands{operands.A, none, 1.0, std::nullopt, std::nullopt, operands.dropout_p, operands.seed,
                                std::nullopt, std::nullopt},
                       input);
    pack_transposed(operands.B, up_.get());
    pack_transposed(operands.Eb, up_.get() + r_ * ldo_);
    const Tensor ea = readable<C>(operands.Ea);
    std::fill_n(ea_.get(), inner_ * ldr_, C{0});
    for (int64_t j = 0; j < inner_; ++j) widen(ea, j * r_, r_, ea_.get() + j * ldr_);
  }

  // h [rows, r] in the type of A, and out = y + z (B, Eb)ᵀ; out may be y.
  void forward(const Rows& x, const Rows& y, const Rows& out, int64_t rows, const Tensor& h) const;
  LiloraGradients backward(const Rows& dy, const Tensor& h, const MaybeTensor& x, const MaybeTensor& dx,
                           const LiloraOperands& operands, const LiloraAsked& asked, int64_t rows, int64_t d_in) const;

 private:
  // Of the first phase of backward, for every chunk of rows.
  struct Sums {
    Scratch<C> up;  // [chunks, ranks asked, ldo]: dBᵀ and dEbᵀ
    Scratch<C> ea;  // [chunks, r̃, r], without b
    std::vector<double> da, db;
  };

  int64_t ranks() const { return r_ + inner_; }
  void widen(const Tensor& from, int64_t first, int64_t count, C* to) const {
    const char* data = static_cast<const char*>(from.const_data_ptr());
    micro_.widen(data + first * element_size(from.scalar_type()), from.scalar_type(), count, to);
  }
  void pack_transposed(const Tensor& factor, C* to) const;
  void route(const C* h, int64_t rows, bool of_B, bool of_Eb, C* u, C* z) const;
  void read_dy(const Rows& dy, const Tensor& h, int64_t from, int64_t to, int64_t chunk, const LiloraAsked& asked,
               Sums& sums, C* dh) const;

  const Micro<C>& micro_;
  int64_t r_, inner_, d_out_, ldo_, ldr_;
  double w_, s_;
  C a_, b_;
  Scratch<C> up_, ea_;  // (B, Eb)ᵀ [r + r̃, ldo] and Ea [r̃, ldr]
  std::vector<Branch<C>> down_;
};

// A factor [d_out, ranks] into rows of ldo numbers, a rank each.
template <typename C>
void Lilora<C>::pack_transposed(const Tensor& factor, C* to) const {
  const Tensor from = readable<C>(factor);
  const int64_t ranks = from.size(1);
  constexpr int64_t kRows = 16;
  parallel_for(0, parts_of(d_out_, kRows), parts_of(1 << 15, kRows * std::max<int64_t>(ranks, 1)),
               [&](int64_t begin, int64_t end) {
                 Scratch<C> some(kRows * ranks);
                 for (int64_t part = begin; part < end; ++part) {
                   const int64_t first = part * kRows, rows = std::min(kRows, d_out_ - first);
                   widen(from, first * ranks, rows * ranks, some.get());
                   for (int64_t j = 0; j < ranks; ++j) {
                     for (int64_t n = 0; n < rows; ++n) to[j * ldo_ + first + n] = some[n * ranks + j];
                   }
                 }
               });
  for (int64_t j = 0; j < ranks; ++j) std::fill(to + j * ldo_ + d_out_, to + (j + 1) * ldo_, C{0});
}

// z = (a h, b h Eaᵀ), the parts that are asked side by side; u [rows, r̃] is scratch.
template <typename C>
void Lilora<C>::route(const C* h, int64_t rows, bool of_B, bool of_Eb, C* u, C* z) const {
  const int64_t first = of_B ? r_ : 0, width = first + (of_Eb ? inner_ : 0);
  if (of_Eb) micro_.project(as_rows(h, r_), rows, r_, ea_.get(), ldr_, inner_, {}, u);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t j = 0; j < first; ++j) z[t * width + j] = a_ * h[t * r_ + j];
    for (int64_t j = first; j < width; ++j) z[t * width + j] = b_ * u[t * inner_ + j - first];
  }
}

template <typename C>
void Lilora<C>::forward(const Rows& x, const Rows& y, const Rows& out, int64_t rows, const Tensor& h) const {
  const int64_t element = element_size(y.type);
  parallel_for(0, rows, kProjectGrain, [&](int64_t begin, int64_t end) {
    const int64_t parts = parts_of(end - begin, kForwardRows), size = (end - begin + parts - 1) / parts;
    Scratch<C> here(size * r_), u(size * inner_), z(size * ranks());
    for (int64_t t = begin; t < end; t += size) {
      const int64_t some = std::min(size, end - t);
      project_all<C>(down_, {}, x.at(t), t, some, {h}, {here.get()});
      route(here.get(), some, true, true, u.get(), z.get());
      for (int64_t column = 0; column < d_out_; column += kForwardColumns) {
        const int64_t columns = std::min(kForwardColumns, d_out_ - column);
        const Rows to = part(out, t, column);
        for (int64_t n = 0; n < some && y.data != out.data; ++n) {
          std::copy_n(static_cast<const char*>(part(y, t + n, column).data), columns * element,
                      static_cast<char*>(to.at(n).data));
        }
        micro_.expand(to, some, columns, z.get(), ranks(), up_.get() + column, ldo_, {}, true);
      }
    }
  });
}

template <typename C>
double dot(const C* left, const C* right, int64_t size) {
  double sums[4] = {0, 0, 0, 0};
  int64_t n = 0;
  for (; n + 4 <= size; n += 4) {
    for (int k = 0; k < 4; ++k) sums[k] += static_cast<double>(left[n + k]) * right[n + k];
  }
  for (; n < size; ++n) sums[0] += static_cast<double>(left[n]) * right[n];
  return sums[0] + sums[1] + sums[2] + sums[3];
}

// Rows `from` .. `to` of dy and h, a chunk: its sums, and dh [all rows, r] times what dropout scales by.
template <typename C>
void Lilora<C>::read_dy(const Rows& dy, const Tensor& h, int64_t from, int64_t to, int64_t chunk,
                        const LiloraAsked& asked, Sums& sums, C* dh) const {
  const int64_t parts = parts_of(to - from, kBlockRows), size = (to - from + parts - 1) / parts;
  const int64_t skipped = asked.B ? 0 : r_, width = (asked.Eb ? ranks() : r_) - skipped;
  Scratch<C> here(size * r_), u(size * inner_), z(size * ranks());
  Scratch<C> pq(size * ranks()), p(size * r_), q(size * inner_), t(size * r_);
  const Rows saved{h.mutable_data_ptr(), h.scalar_type(), r_};
  for (int64_t row = from; row < to; row += size) {
    const int64_t some = std::min(size, to - row);
    const bool later = row > from;  // the chunk's sums have begun
    const Rows block = dy.at(row);
    micro_.widen(saved.at(row).data, saved.type, some * r_, here.get());
    if (asked.of_z()) {
      route(here.get(), some, asked.B, asked.Eb, u.get(), z.get());
      micro_.outer(block, some, d_out_, z.get(), width, {}, {}, sums.up.get() + chunk * width * ldo_, ldo_, later);
    }
    if (!asked.of_p()) continue;
    micro_.project(block, some, d_out_, up_.get(), ldo_, ranks(), {}, pq.get());
    for (int64_t n = 0; n < some; ++n) {
      const C* both = pq.get() + n * ranks();
      std::copy_n(both, r_, p.get() + n * r_);
      std::copy_n(both + r_, inner_, q.get() + n * inner_);
    }
    micro_.expand(as_rows(t.get(), r_), some, r_, q.get(), inner_, ea_.get(), ldr_, {}, false);
    if (asked.Ea) {
      micro_.outer(as_rows(here.get(), r_), some, r_, q.get(), inner_, {}, {}, sums.ea.get() + chunk * inner_ * r_, r_,
                   later);
    }
    if (asked.numbers()) {
      sums.da[chunk] += dot(p.get(), here.get(), some * r_);
      sums.db[chunk] += dot(t.get(), here.get(), some * r_);
    }
    if (!asked.dh()) continue;
    const C keep = down_[0].keep_scale();
    const C a = a_ * keep, b = b_ * keep;
    for (int64_t n = 0; n < some * r_; ++n) dh[row * r_ + n] = a * p[n] + b * t[n];
  }
}

template <typename C>
LiloraGradients Lilora<C>::backward(const Rows& dy, const Tensor& h, const MaybeTensor& x, const MaybeTensor& dx,
                                    const LiloraOperands& operands, const LiloraAsked& asked, int64_t rows,
                                    int64_t d_in) const {
  const std::vector<Asked> of_A{{asked.A, false, false, false, false, false}};
  BranchBackward<C> of_x(down_, of_A, {true}, Grid(rows, d_in, d_out_), asked.x);
  const Grid& grid = of_x.grid();
  const int64_t chunks = grid.row_chunks, skipped = asked.B ? 0 : r_, width = (asked.Eb ? ranks() : r_) - skipped;
  Sums sums;
  if (asked.of_z()) sums.up = Scratch<C>(chunks * width * ldo_);
  if (asked.Ea) sums.ea = Scratch<C>(chunks * inner_ * r_);
  sums.da.assign(chunks, 0.0);
  sums.db.assign(chunks, 0.0);
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      read_dy(dy, h, grid.row(chunk), grid.row(chunk + 1), chunk, asked, sums, of_x.dh(0));
    }
  });
  parallel_for(0, asked.dh() ? grid.tiles() : 0, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t row = tile / grid.column_chunks, column = tile % grid.column_chunks;
      of_x.visit(row, column, part(rows_or_none(x), grid.row(row), grid.column(column)),
                 part(rows_or_none(dx), grid.row(row), grid.column(column)), false);
    }
  });

  LiloraGradients out;
  out.A = of_x.finish(0).A;
  const auto up = [&](int64_t first, int64_t ranks) {
    if (ranks == 0) return empty({d_out_, 0}, operands.B.scalar_type());
    Scratch<C> whole(d_out_ * ranks);
    add_chunks_transposed(sums.up.get() + first * ldo_, chunks, ranks, d_out_, ldo_, whole.get(), width);
    return made_of(whole.get(), {d_out_, ranks}, operands.B.scalar_type());
  };
  if (asked.B) out.B = up(0, r_);
  if (asked.Eb) out.Eb = up(asked.B ? r_ : 0, inner_);
  if (asked.Ea) {
    Scratch<C> whole(inner_ * r_);
    add_chunks(sums.ea.get(), chunks, inner_, r_, r_, whole.get());
    for (int64_t n = 0; n < inner_ * r_; ++n) whole[n] *= b_;
    out.Ea = made_of(whole.get(), {inner_, r_}, operands.Ea.scalar_type());
  }
  if (asked.numbers()) {
    double da = 0, db = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) da += sums.da[chunk], db += sums.db[chunk];
    const double dweight = s_ * (da - db), dscale = w_ * da + (1 - w_) * db;
    if (asked.weight) out.weight = tensor_of(dweight, operands.weight.scalar_type());
    if (asked.scale) out.scale = tensor_of(dscale, operands.scale.scalar_type());
  }
  return out;
}

void check_operands(const char* op, const LiloraOperands& operands, int64_t d_in, int64_t d_out) {
  check_matrix({op, "A"}, operands.A, -1, d_in);
  check_matrix({op, "B"}, operands.B, d_out, operands.A.size(0));
  check_matrix({op, "Ea"}, operands.Ea, -1, operands.A.size(0));
  check_matrix({op, "Eb"}, operands.Eb, operands.B.size(0), operands.Ea.size(0));
  const ScalarType type = operands.A.scalar_type();
  check_type({op, "B"}, operands.B, type);
  check_type({op, "Ea"}, operands.Ea, type);
  check_type({op, "Eb"}, operands.Eb, type);
  check_number({op, "weight"}, operands.weight);
  check_number({op, "scale"}, operands.scale);
  check_dropout(op, operands.dropout_p, operands.seed);
}

// -- by the type of the arithmetic ---------------------------------------------------------------------------

bool is_wide(const MaybeTensor& tensor) { return tensor && tensor->scalar_type() == ScalarType::Double; }

Tensor as(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

// [*lead of like, columns]
Tensor matrix_like(const Tensor& like, int64_t columns, ScalarType type) {
  std::vector<int64_t> shape = shape_of(like);
  shape.back() = columns;
  return empty(shape, type);
}

MaybeTensor zeros_if(bool asked, const Tensor& tensor) {
  if (!asked) return std::nullopt;
  const Tensor zeros = empty(shape_of(tensor), tensor.scalar_type());
  std::fill_n(static_cast<char*>(zeros.mutable_data_ptr()), zeros.numel() * element_size(zeros.scalar_type()), char{0});
  return zeros;
}

// Whether the branch is nothing, whatever the numbers in it.
bool is_nothing(const LiloraOperands& operands) { return operands.A.numel() == 0; }

template <typename C>
std::tuple<Tensor, Tensor> accumulated(const Tensor& y, const Tensor& x, const LiloraOperands& operands) {
  const Tensor before = readable<C>(y), input = rows_of(readable<C>(x));
  // What was made here is given the branch where it lies.
  const Tensor out = before.const_data_ptr() == y.const_data_ptr() ? empty(shape_of(y), before.scalar_type()) : before;
  const ScalarType type = operands.A.scalar_type();
  const Tensor h = matrix_like(x, operands.A.size(0), reads<C>(type) ? type : kType<C>);
  Lilora<C>(operands, x).forward(rows_in(input), rows_in(rows_of(before)), rows_in(rows_of(out)), input.size(0), h);
  return {as(out, y.scalar_type()), as(h, type)};
}

template <typename C>
LiloraGradients differentiated(const Tensor& dy, const Tensor& h, const MaybeTensor& x, const LiloraOperands& operands,
                               ScalarType x_type, const LiloraAsked& asked) {
  const Tensor above = rows_of(readable<C>(dy));
  const MaybeTensor input = x && asked.A ? MaybeTensor(rows_of(readable<C>(*x))) : std::nullopt;
  const int64_t d_in = operands.A.size(1);
  const MaybeTensor dx =
      asked.x ? MaybeTensor(matrix_like(dy, d_in, reads<C>(x_type) ? x_type : kType<C>)) : std::nullopt;
  const MaybeTensor dx_rows = dx ? MaybeTensor(rows_of(*dx)) : std::nullopt;
  LiloraGradients out =
      Lilora<C>(operands, dy)
          .backward(rows_in(above), rows_of(readable<C>(h)), input, dx_rows, operands, asked, above.size(0), d_in);
  if (dx) out.x = as(*dx, x_type);
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor> lilora_accumulate(Tensor y, Tensor x, Tensor A, Tensor B, Tensor Ea, Tensor Eb,
                                             Tensor weight, Tensor scale, double dropout_p, MaybeTensor seed) {
  const LiloraOperands operands{A, B, Ea, Eb, weight, scale, dropout_p, seed};
  const char* op = "lilora_accumulate";
  check_rows({op, "x"}, x, -1);
  check_rows_like({op, "y"}, y, x, -1);
  check_operands(op, operands, x.size(-1), y.size(-1));
  if (is_nothing(operands)) {
    const Tensor out = torch::stable::clone(y), h = matrix_like(x, A.size(0), A.scalar_type());
    return {out.is_contiguous() ? out : torch::stable::contiguous(out), *zeros_if(true, h)};
  }
  const bool wide = is_wide(y) || is_wide(x) || is_wide(A);
  return wide ? accumulated<double>(y, x, operands) : accumulated<float>(y, x, operands);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lilora_accumulate_backward(
    Tensor dy, Tensor h, MaybeTensor x, Tensor A, Tensor B, Tensor Ea, Tensor Eb, Tensor weight, Tensor scale,
    double dropout_p, MaybeTensor seed, std::vector<bool> needs) {
  const LiloraOperands operands{A, B, Ea, Eb, weight, scale, dropout_p, seed};
  const char* op = "lilora_accumulate_backward";
  check_length({op, "needs"}, needs.size(), 7);
  check_rows({op, "dy"}, dy, -1);
  check_operands(op, operands, -1, dy.size(-1));
  check_rows_like({op, "h"}, h, dy, A.size(0));
  check_type({op, "h"}, h, A.scalar_type());
  if (x) check_rows_like({op, "x"}, *x, dy, A.size(1));
  const LiloraAsked asked{needs[0], needs[1] && x, needs[2], needs[3], needs[4], needs[5], needs[6]};
  const ScalarType x_type = x ? x->scalar_type() : dy.scalar_type();
  LiloraGradients found;
  if (is_nothing(operands) || dy.numel() == 0) {
    found = {zeros_if(asked.x, matrix_like(dy, A.size(1), x_type)),
             zeros_if(asked.A, A),
             zeros_if(asked.B, B),
             zeros_if(asked.Ea, Ea),
             zeros_if(asked.Eb, Eb),
             zeros_if(asked.weight, weight),
             zeros_if(asked.scale, scale)};
  } else if (is_wide(dy) || is_wide(x) || is_wide(A)) {
    found = differentiated<double>(dy, h, x, operands, x_type, asked);
  } else {
    found = differentiated<float>(dy, h, x, operands, x_type, asked);
  }
  return {or_undefined(found.x),  or_undefined(found.A),      or_undefined(found.B),    or_undefined(found.Ea),
          or_undefined(found.Eb), or_undefined(found.weight), or_undefined(found.scale)};
}

}  // namespace mbf::cpu
