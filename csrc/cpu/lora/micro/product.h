// The loop that expand and outer share: c[i, :] (+)= Σ_k a[i, k] b[k, :] on R × N vectors.
#pragma once

#include "dropout.h"

namespace mbf::cpu::MBF_ISA {
namespace {

template <int n>
struct Size {
  static constexpr int value = n;
};

enum class Masked { kNothing, kFactor, kProduct };

// What tiles fetch into the second-level cache meanwhile: nothing, or of as many rows as a tile is deep a few lines
// more for each tile.
struct NoLines {
  MBF_INLINE void fetch() {}
  MBF_INLINE void next_tile() {}
};

struct Lines {
  static constexpr int kSome = MBF_BYTES == 64 ? 2 : 1;
  static constexpr int64_t kBytes = 64;
  const char* first;  // of the first row
  int64_t stride;     // bytes from row to row
  int64_t left;       // lines of a row
  const char* row = first;

  MBF_INLINE void fetch() {
    MBF_UNROLL
    for (int n = 0; n < kSome; ++n) __builtin_prefetch(row + n * kBytes, 0, 2);
    row += stride;
  }
  MBF_INLINE void next_tile() {
    left -= kSome;
    if (left > 0) {
      first += kSome * kBytes;
    } else {
      stride = 0;  // what is fetched already
    }
    row = first;
  }
};

// One tile; `last` is the number of valid lanes of its last vector. Element (i, k) of a lies at a[i * ai + k * ak].
template <typename C, typename B, typename Out, int R, int N, Masked masked, typename Fetched>
MBF_INLINE void product_tile(int64_t depth, const C* a, int64_t ai, int64_t ak, const B* b, int64_t ldb, Out* c,
                             int64_t ldc, Mask mask, bool add, int64_t last, Fetched& fetched) {
  constexpr int L = kLanes<C>;
  const bool whole = last == L;
  Vec<C> s[R][N];
  MBF_UNROLL
  for (int i = 0; i < R; ++i) {
    MBF_UNROLL
    for (int n = 0; n < N; ++n) s[i][n] = Vec<C>{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    fetched.fetch();
    Vec<C> row[N];
    MBF_UNROLL
    for (int n = 0; n < N; ++n) {
      row[n] = n + 1 < N || whole ? load(b + k * ldb + n * L) : load_first<C>(b + k * ldb + n * L, last);
      if constexpr (masked == Masked::kFactor) {
        row[n] = keep<C>(row[n], mask.bits, mask.first + k * mask.ld + n * L);
      }
    }
    MBF_UNROLL
    for (int i = 0; i < R; ++i) {
      Vec<C> factor = broadcast<C>(a[i * ai + k * ak]);
      MBF_PIN(factor);
      MBF_UNROLL
      for (int n = 0; n < N; ++n) s[i][n] += factor * row[n];
    }
  }
  fetched.next_tile();
  MBF_UNROLL
  for (int i = 0; i < R; ++i) {
    MBF_UNROLL
    for (int n = 0; n < N; ++n) {
      Vec<C> v = s[i][n];
      Out* out = c + i * ldc + n * L;
      if constexpr (masked == Masked::kProduct) {
        v = keep<C>(v, mask.bits, mask.first + i * mask.ld + n * L);
      }
      if (n + 1 < N || whole) {
        store(out, add ? v + load(out) : v);
      } else {
        store_first<C>(out, add ? v + load_first<C>(out, last) : v, last);
      }
    }
  }
}

// All of c's columns for R of its rows at a time; rows run inside columns, so that b's panel stays in the first cache.
template <typename C, typename B, typename Out, int N, Masked masked, typename Fetched>
__attribute__((noinline)) void product_panel(int64_t rows, int64_t depth, const C* a, int64_t ai, int64_t ak,
                                             const B* b, int64_t ldb, Out* c, int64_t ldc, Mask mask, bool add,
                                             int64_t last, Fetched& fetched) {
  int64_t i = 0;
  const auto tile = [&](auto size) __attribute__((always_inline)) {
    constexpr int R = decltype(size)::value;
    for (; i + R <= rows; i += R) {
      Mask here = mask;
      if (masked == Masked::kProduct) here.first += i * mask.ld;
      product_tile<C, B, Out, R, N, masked>(depth, a + i * ai, ai, ak, b, ldb, c + i * ldc, ldc, here, add, last,
                                            fetched);
    }
  };
  tile(Size<MBF_TILE_ROWS>{});
#if MBF_TILE_ROWS > 4
  tile(Size<4>{});
#endif
  tile(Size<2>{});
  tile(Size<1>{});
}

template <typename C, typename B, typename Out, Masked masked, typename Fetched = NoLines>
void product(int64_t rows, int64_t columns, int64_t depth, const C* a, int64_t ai, int64_t ak, const B* b, int64_t ldb,
             Out* c, int64_t ldc, Mask mask, bool add, Fetched fetched = {}) {
  constexpr int L = kLanes<C>;
  constexpr int N = MBF_TILE_VECTORS;
  int64_t n = 0;
  for (; n + N * L <= columns; n += N * L, mask.first += N * L) {
    product_panel<C, B, Out, N, masked>(rows, depth, a, ai, ak, b + n, ldb, c + n, ldc, mask, add, L, fetched);
  }
#if MBF_BYTES == 64
  // So few are left that vectors side by side share what is broadcast.
  for (; n + 2 * L <= columns; n += 2 * L, mask.first += 2 * L) {
    product_panel<C, B, Out, 2, masked>(rows, depth, a, ai, ak, b + n, ldb, c + n, ldc, mask, add, L, fetched);
  }
#endif
  for (; n < columns; n += L, mask.first += L) {
    const int64_t last = columns - n < L ? columns - n : L;
    product_panel<C, B, Out, 1, masked>(rows, depth, a, ai, ak, b + n, ldb, c + n, ldc, mask, add, last, fetched);
  }
}

}  // namespace
}  // namespace mbf::cpu::MBF_ISA
