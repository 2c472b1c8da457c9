#include "base_product.h"

#include <algorithm>

#include "amx.h"
#include "arithmetic.h"
#include "grid.h"
#include "micro.h"

namespace mbf::cpu {
namespace {

constexpr int64_t kWork = 1 << 18;   // products that are worth a second thread
constexpr int64_t kRowsAtOnce = 32;  // of W, on as many pages, for one row of dy
constexpr int64_t kAligned = 32;     // columns of which pieces are multiples

// Pieces of a product that the threads share: enough of them that none waits long for the last.
struct Pieces {
  Pieces(int64_t rows, int64_t columns) : down((rows + 255) / 256) {
    const int64_t wanted = 3 * static_cast<int64_t>(torch::stable::get_num_threads());
    across = std::clamp<int64_t>((wanted + down - 1) / down, 1, std::max<int64_t>(1, columns / 128));
  }
  int64_t down, across;
};

// out (+)= left right on the processor's tiles of bf16; false where they are of no use.
bool on_amx(const Tensor& out, const Tensor& left, const Tensor& right, const MaybeTensor& bias, bool add, By threads) {
  const int64_t m = out.size(0), n = out.size(1), k = left.size(1), ld = out.stride(0);
  if (out.scalar_type() != ScalarType::Float || !amx::worthwhile(m, n, k)) return false;
  if (left.stride(1) != 1 || (right.stride(0) != 1 && right.stride(1) != 1)) return false;
  const amx::Strided rows{floats(left), left.stride(0), 1}, columns{floats(right), right.stride(0), right.stride(1)};
  const auto piece = [&](int64_t t, int64_t t_end, int64_t i, int64_t i_end) {
    float* to = floats(out) + t * ld + i;
    if (bias) {
      const float* from = floats(*bias);
      const int64_t step = bias->stride(0);
      for (int64_t row = 0; row < t_end - t; ++row) {
        for (int64_t column = i; column < i_end; ++column) to[row * ld + column - i] = from[column * step];
      }
    }
    amx::multiply(to, ld, t_end - t, i_end - i, k, {rows.data + t * rows.row, rows.row, 1},
                  {columns.data + i * columns.column, columns.row, columns.column}, add || bias);
  };
  if (threads == By::kThis) {
    piece(0, m, 0, n);
    return true;
  }
  const Pieces pieces(m, n);
  torch::stable::parallel_for(0, pieces.down * pieces.across, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t down = p / pieces.across, across = p % pieces.across;
      piece(m * down / pieces.down, m * (down + 1) / pieces.down, n * across / pieces.across / kAligned * kAligned,
            across + 1 == pieces.across ? n : n * (across + 1) / pieces.across / kAligned * kAligned);
    }
  });
  return true;
}

// One row of x: every column of y is a sum of its own, so that how they are cut changes no bit.
void one_row_product(const Tensor& y, const Tensor& x, const Tensor& weight, const MaybeTensor& bias, By threads) {
  const int64_t columns = y.size(1), ldw = weight.stride(0);
  float* to = floats(y);
  const float* from = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  const auto some = [&](int64_t first, int64_t last) {
    micro<float>().project(rows_in(x), 1, x.size(1), floats(weight) + first * ldw, ldw, last - first, {}, to + first);
    for (int64_t i = first; i < last && bias; ++i) to[i] += from[i * bias->stride(0)];
  };
  if (threads == By::kThis || columns * x.size(1) < kWork) return some(0, columns);
  const int64_t parts = Pieces(1, columns).across;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    some(columns * begin / parts / kAligned * kAligned,
         end == parts ? columns : columns * end / parts / kAligned * kAligned);
  });
}

// The rows of W are cut as the columns of y are in forward, where those were worth it: each thread finds in its cache
// what it read there. How they are cut depends on nothing else, as dx may be a part of the row.
void one_row_gradient(const Tensor& dx, const Tensor& dy, const Tensor& weight, bool add, By threads) {
  const int64_t columns = dx.size(1), ldw = weight.stride(0);
  const Grid grid(1, dy.size(1), kWork);
  const int64_t parts = grid.column_chunks;
  const Scratch<float> sums(parts * columns);
  const auto sum = [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = grid.column(part), last = grid.column(part + 1);
      const Rows to{sums.get() + part * columns, ScalarType::Float, columns};
      for (int64_t n = first; n < last; n += kRowsAtOnce) {
        micro<float>().expand(to, 1, columns, floats(dy) + n, std::min(kRowsAtOnce, last - n), floats(weight) + n * ldw,
                              ldw, {}, n > first);
      }
    }
  };
  if (threads == By::kAll && dy.size(1) * columns >= kWork) {
    torch::stable::parallel_for(0, parts, 1, sum);
  } else {
    sum(0, parts);
  }
  float* to = floats(dx);
  for (int64_t part = 0; part < parts; ++part) {
    const float* from = sums.get() + part * columns;
    for (int64_t i = 0; i < columns; ++i) to[i] = add || part > 0 ? to[i] + from[i] : from[i];
  }
}

}  // namespace

bool is_one_row(int64_t rows, const Tensor& weight) {
  return rows == 1 && weight.scalar_type() == ScalarType::Float && weight.stride(1) == 1 &&
         weight.size(1) % micro<float>().lanes == 0;
}

bool cuts_freely(ScalarType type, int64_t m, int64_t n, int64_t k) {
  return type == ScalarType::Float && amx::worthwhile(m, n, k) && amx::worthwhile(m, k, n);
}

void base_product(const Tensor& y, const Tensor& x, const Tensor& weight, const MaybeTensor& bias, By threads) {
  if (on_amx(y, x, transposed(weight), bias, false, threads)) return;
  if (is_one_row(y.size(0), weight)) return one_row_product(y, x, weight, bias, threads);
  if (bias) {
    addmm_out(y, *bias, x, transposed(weight));
  } else {
    mm_out(y, x, transposed(weight));
  }
}

void base_gradient(const Tensor& dx, const Tensor& dy, const Tensor& weight, bool add, By threads) {
  if (on_amx(dx, dy, weight, std::nullopt, add, threads)) return;
  if (is_one_row(dx.size(0), weight)) return one_row_gradient(dx, dy, weight, add, threads);
  if (add) {
    addmm_out(dx, dx, dy, weight);
  } else {
    mm_out(dx, dy, weight);
  }
}

}  // namespace mbf::cpu
