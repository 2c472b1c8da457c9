// h = drop(x) Aᵀ: rows of x against rows of A, both read along their columns.
#pragma once

#include "dropout.h"

namespace mbf::cpu::MBF_ISA {
namespace {

template <typename C>
MBF_INLINE C sum(Vec<C> v) {
#if MBF_BYTES == 64
  if constexpr (sizeof(C) == 4) return _mm512_reduce_add_ps(v);
#endif
  C total = 0;
  for (int lane = 0; lane < kLanes<C>; ++lane) total += v[lane];
  return total;
}

// The sums of four vectors.
template <typename C>
MBF_INLINE void sum_4(const Vec<C> v[4], C out[4]) {
#if MBF_BYTES >= 32
  if constexpr (sizeof(C) == 4) {
    __m256 folded[4];
    MBF_UNROLL
    for (int n = 0; n < 4; ++n) {
#if MBF_BYTES == 64
      folded[n] = _mm256_add_ps(_mm512_castps512_ps256(v[n]), _mm512_extractf32x8_ps(v[n], 1));
#else
      folded[n] = v[n];
#endif
    }
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(folded[0], folded[1]), _mm256_hadd_ps(folded[2], folded[3]));
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
    _mm_storeu_ps(out, sums);
    return;
  }
#endif
  for (int n = 0; n < 4; ++n) out[n] = sum<C>(v[n]);
}

// Columns of a that are taken at once, so that MBF_DOT_RANKS rows of a stay in the first-level cache.
constexpr int64_t kDotColumns = 1024;

template <typename C, typename T, int R, int J>
MBF_INLINE void dot_tile(const T* x, int64_t ldx, int64_t columns, const C* a, int64_t lda, Mask mask, C* h,
                         int64_t ldh, bool add) {
  Vec<C> s[R][J];
  MBF_UNROLL
  for (int t = 0; t < R; ++t) {
    MBF_UNROLL
    for (int j = 0; j < J; ++j) s[t][j] = Vec<C>{};
  }
  const auto step = [&](int64_t i, const Vec<C>(&v)[R]) __attribute__((always_inline)) {
    MBF_UNROLL
    for (int j = 0; j < J; ++j) {
      Vec<C> row = load(a + j * lda + i);
      MBF_PIN(row);
      MBF_UNROLL
      for (int t = 0; t < R; ++t) s[t][j] += v[t] * row;
    }
  };
  int64_t i = 0;
  if (mask.bits == nullptr) {
    for (; i + kLanes<C> <= columns; i += kLanes<C>) {
      Vec<C> v[R];
      MBF_UNROLL
      for (int t = 0; t < R; ++t) v[t] = load(x + t * ldx + i);
      step(i, v);
    }
  } else {
    for (; i + kLanes<C> <= columns; i += kLanes<C>) {
      Vec<C> v[R];
      MBF_UNROLL
      for (int t = 0; t < R; ++t) v[t] = keep<C>(load(x + t * ldx + i), mask.bits, mask.first + t * mask.ld + i);
      step(i, v);
    }
  }
  if (i < columns) {
    Vec<C> v[R];
    MBF_UNROLL
    for (int t = 0; t < R; ++t) {
      v[t] = load_first<C>(x + t * ldx + i, columns - i);
      if (mask.bits != nullptr) v[t] = keep<C>(v[t], mask.bits, mask.first + t * mask.ld + i);
    }
    step(i, v);
  }
  MBF_UNROLL
  for (int t = 0; t < R; ++t) {
    C sums[J];
    if constexpr (J % 4 == 0) {
      MBF_UNROLL
      for (int j = 0; j < J; j += 4) sum_4<C>(&s[t][j], &sums[j]);
    } else {
      MBF_UNROLL
      for (int j = 0; j < J; ++j) sums[j] = sum<C>(s[t][j]);
    }
    MBF_UNROLL
    for (int j = 0; j < J; ++j) h[t * ldh + j] = add ? h[t * ldh + j] + sums[j] : sums[j];
  }
}

// All rows against J rows of a.
template <typename C, typename T, int J>
__attribute__((noinline)) void dot_ranks(const T* x, int64_t ldx, int64_t rows, int64_t columns, const C* a,
                                         int64_t lda, Mask mask, C* h, int64_t ldh, bool add) {
  const int64_t parts = (columns + kDotColumns - 1) / kDotColumns;
  const int64_t part = ((columns + parts - 1) / parts + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
  for (int64_t i = 0; i < columns; i += part) {
    const int64_t width = columns - i < part ? columns - i : part;
    int64_t t = 0;
    for (; t + 3 <= rows; t += 3) {
      dot_tile<C, T, 3, J>(x + t * ldx + i, ldx, width, a + i, lda, {mask.bits, mask.first + t * mask.ld + i, mask.ld},
                           h + t * ldh, ldh, add || i > 0);
    }
    if (t + 2 <= rows) {
      dot_tile<C, T, 2, J>(x + t * ldx + i, ldx, width, a + i, lda, {mask.bits, mask.first + t * mask.ld + i, mask.ld},
                           h + t * ldh, ldh, add || i > 0);
      t += 2;
    }
    if (t < rows) {
      dot_tile<C, T, 1, J>(x + t * ldx + i, ldx, width, a + i, lda, {mask.bits, mask.first + t * mask.ld + i, mask.ld},
                           h + t * ldh, ldh, add || i > 0);
    }
  }
}

template <typename C, typename T>
void dot_all(const T* x, int64_t ldx, int64_t rows, int64_t columns, const C* a, int64_t lda, int64_t r, Mask mask,
             C* h, bool add) {
  int64_t j = 0;
#if MBF_DOT_RANKS >= 8
  for (; j + 8 <= r; j += 8) dot_ranks<C, T, 8>(x, ldx, rows, columns, a + j * lda, lda, mask, h + j, r, add);
#endif
  for (; j + 4 <= r; j += 4) dot_ranks<C, T, 4>(x, ldx, rows, columns, a + j * lda, lda, mask, h + j, r, add);
  for (; j + 2 <= r; j += 2) dot_ranks<C, T, 2>(x, ldx, rows, columns, a + j * lda, lda, mask, h + j, r, add);
  for (; j < r; ++j) dot_ranks<C, T, 1>(x, ldx, rows, columns, a + j * lda, lda, mask, h + j, r, add);
}

template <typename C, typename T>
void project_rows(const T* x, int64_t ldx, int64_t rows, int64_t columns, const C* a, int64_t lda, int64_t r, Mask mask,
                  C* h) {
  if (columns == 0) {
    for (int64_t n = 0; n < rows * r; ++n) h[n] = 0;
    return;
  }
  if (mask.bits == nullptr || !copies((r + MBF_DOT_RANKS - 1) / MBF_DOT_RANKS)) {
    dot_all<C, T>(x, ldx, rows, columns, a, lda, r, mask, h, false);
    return;
  }
  constexpr int64_t kRows = 12, kColumns = 512;
  alignas(64) C kept[kRows * kColumns];
  for (int64_t t = 0; t < rows; t += kRows) {
    const int64_t some = rows - t < kRows ? rows - t : kRows;
    for (int64_t i = 0; i < columns; i += kColumns) {
      const int64_t width = columns - i < kColumns ? columns - i : kColumns;
      copy_kept<C, T>(x + t * ldx + i, ldx, some, width, {mask.bits, mask.first + t * mask.ld + i, mask.ld}, kept,
                      kColumns);
      dot_all<C, C>(kept, kColumns, some, width, a + i, lda, r, {}, h + t * r, i > 0);
    }
  }
}

}  // namespace
}  // namespace mbf::cpu::MBF_ISA
