// G += X Xᵀ, the triangle below the diagonal: rows of X against the rows up to their own.
#pragma once

#include "project.h"

namespace mbf::cpu::MBF_ISA {
namespace {

// Adds the products of R rows with J rows of the same matrix, and fetches two rows that will be read next.
template <typename C, int R, int J>
MBF_INLINE void gram_tile(const C* x, const C* a, int64_t ld, int64_t columns, const char* const (&ahead)[2],
                          int64_t size, double* g, int64_t ldg) {
  Vec<C> s[R][J];
  MBF_UNROLL
  for (int t = 0; t < R; ++t) {
    MBF_UNROLL
    for (int j = 0; j < J; ++j) s[t][j] = Vec<C>{};
  }
  for (int64_t i = 0; i < columns; i += kLanes<C>) {
    __builtin_prefetch(ahead[0] + i * size, 0, 2);
    __builtin_prefetch(ahead[1] + i * size, 0, 2);
    Vec<C> v[R];
    MBF_UNROLL
    for (int t = 0; t < R; ++t) v[t] = load(x + t * ld + i);
    MBF_UNROLL
    for (int j = 0; j < J; ++j) {
      Vec<C> row = load(a + j * ld + i);
      MBF_PIN(row);
      MBF_UNROLL
      for (int t = 0; t < R; ++t) s[t][j] += v[t] * row;
    }
  }
  MBF_UNROLL
  for (int t = 0; t < R; ++t) {
    C sums[J];
    if constexpr (J == 4) {
      sum_4<C>(s[t], sums);
    } else {
      MBF_UNROLL
      for (int j = 0; j < J; ++j) sums[j] = sum<C>(s[t][j]);
    }
    MBF_UNROLL
    for (int j = 0; j < J; ++j) g[t * ldg + j] += sums[j];
  }
}

// R rows from row `first` on with all rows up to the last of them.
template <typename C, int R>
void gram_rows(const C* X, int64_t first, int64_t columns, int64_t ld, Ahead& ahead, double* g, int64_t ldg) {
  const C* x = X + first * ld;
  const int64_t count = first + R;
  g += first * ldg;
  int64_t j = 0;
  const auto tile = [&](auto use) __attribute__((always_inline)) {
    const char* here = reinterpret_cast<const char*>(x);
    const char* rows[2] = {ahead.take(here), ahead.take(here)};
    use(rows);
  };
  for (; j + 4 <= count; j += 4) {
    tile([&](auto& rows) { gram_tile<C, R, 4>(x, X + j * ld, ld, columns, rows, ahead.size, g + j, ldg); });
  }
  if (j + 3 == count) {
    tile([&](auto& rows) { gram_tile<C, R, 3>(x, X + j * ld, ld, columns, rows, ahead.size, g + j, ldg); });
  } else if (j + 2 == count) {
    tile([&](auto& rows) { gram_tile<C, R, 2>(x, X + j * ld, ld, columns, rows, ahead.size, g + j, ldg); });
  } else if (j + 1 == count) {
    tile([&](auto& rows) { gram_tile<C, R, 1>(x, X + j * ld, ld, columns, rows, ahead.size, g + j, ldg); });
  }
}

template <typename C>
void gram(const C* X, int64_t r, int64_t columns, int64_t ld, Ahead ahead, double* g) {
  int64_t first = 0;
  for (; first + 3 <= r; first += 3) gram_rows<C, 3>(X, first, columns, ld, ahead, g, r);
  if (first + 2 == r) gram_rows<C, 2>(X, first, columns, ld, ahead, g, r);
  if (first + 1 == r) gram_rows<C, 1>(X, first, columns, ld, ahead, g, r);
}

}  // namespace
}  // namespace mbf::cpu::MBF_ISA
