// Q = T X for a lower triangle T, and Q past the caches where nobody reads it soon.
#pragma once

#include "product.h"

namespace mbf::cpu::MBF_ISA {
namespace {

constexpr int kTriangleVectors = 2;  // of columns: with AVX2 a cache line of fp32, written as a whole

#if MBF_BYTES == 64
MBF_INLINE void stream_bytes(void* to, __m512i v) { _mm512_stream_si512(static_cast<__m512i*>(to), v); }
MBF_INLINE void stream_bytes(void* to, __m256i v) { _mm256_stream_si256(static_cast<__m256i*>(to), v); }
#elif MBF_BYTES == 32
MBF_INLINE void stream_bytes(void* to, __m256i v) { _mm256_stream_si256(static_cast<__m256i*>(to), v); }
MBF_INLINE void stream_bytes(void* to, __m128i v) { _mm_stream_si128(static_cast<__m128i*>(to), v); }
#endif

// A vector in T, past the caches, to an address that it is aligned on.
template <typename C, typename T>
MBF_INLINE void stream_vector(T* to, Vec<C> v) {
#if MBF_BYTES >= 32
  typedef long long Whole __attribute__((vector_size(kLanes<C> * sizeof(T))));
  alignas(64) T narrowed[kLanes<C>];
  store(narrowed, v);
  Whole bytes;
  __builtin_memcpy(&bytes, narrowed, sizeof(bytes));
  stream_bytes(to, bytes);
#else
  store(to, v);
#endif
}

// R rows of a panel, whose factors are `depth` a row, on N vectors of columns; `last` lanes of the last one are valid.
template <typename C, typename T, int R, int N>
MBF_INLINE void triangle_tile(const C* factors, int64_t depth, const C* x, int64_t ldx, T* out, int64_t ldo,
                              bool streamed, int64_t last) {
  constexpr int L = kLanes<C>;
  Vec<C> s[R][N];
  MBF_UNROLL
  for (int t = 0; t < R; ++t) {
    MBF_UNROLL
    for (int n = 0; n < N; ++n) s[t][n] = Vec<C>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<C> v[N];
    MBF_UNROLL
    for (int n = 0; n < N; ++n) v[n] = load(x + k * ldx + n * L);
    MBF_UNROLL
    for (int t = 0; t < R; ++t) {
      const Vec<C> factor = broadcast(factors[t * depth + k]);
      MBF_UNROLL
      for (int n = 0; n < N; ++n) s[t][n] += factor * v[n];
    }
  }
  MBF_UNROLL
  for (int t = 0; t < R; ++t) {
    MBF_UNROLL
    for (int n = 0; n < N; ++n) {
      T* to = out + t * ldo + n * L;
      if (n + 1 == N && last < L) {
        store_first<C>(to, s[t][n], last);
      } else if (streamed) {
        stream_vector<C>(to, s[t][n]);
      } else {
        store(to, s[t][n]);
      }
    }
  }
}

// All rows of N vectors of columns.
template <typename C, typename T, int N>
MBF_INLINE void triangle_columns(const C* factors, int64_t r, const C* x, int64_t ldx, T* out, int64_t ldo,
                                 bool streamed, int64_t last = kLanes<C>) {
  int64_t first = 0;
  const auto panel = [&](auto size) __attribute__((always_inline)) {
    constexpr int R = decltype(size)::value;
    triangle_tile<C, T, R, N>(factors, first + R, x, ldx, out + first * ldo, ldo, streamed, last);
    factors += R * (first + R);
    first += R;
  };
  while (first + kTrianglePanel <= r) panel(Size<kTrianglePanel>{});
  if (r - first == 3) panel(Size<3>{});
  if (r - first == 2) panel(Size<2>{});
  if (r - first == 1) panel(Size<1>{});
  static_assert(kTrianglePanel == 4);
}

template <typename C, typename T>
void triangle_rows(const C* factors, int64_t r, const C* x, int64_t ldx, int64_t columns, T* out, int64_t ldo,
                   bool past_caches) {
  constexpr int L = kLanes<C>, N = kTriangleVectors;
  const bool aligned = (reinterpret_cast<uintptr_t>(out) | ldo * sizeof(T)) % (L * sizeof(T)) == 0;
  const bool streamed = past_caches && aligned;
  int64_t i = 0;
  for (; i + N * L <= columns; i += N * L) triangle_columns<C, T, N>(factors, r, x + i, ldx, out + i, ldo, streamed);
  for (; i + L <= columns; i += L) triangle_columns<C, T, 1>(factors, r, x + i, ldx, out + i, ldo, streamed);
  if (i < columns) triangle_columns<C, T, 1>(factors, r, x + i, ldx, out + i, ldo, false, columns - i);
}

}  // namespace
}  // namespace mbf::cpu::MBF_ISA
