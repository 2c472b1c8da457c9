// The inner loops of gemm.h: out (+)= left right, by MBF_GEMM_ROWS rows and a sliver of MBF_GEMM_VECTORS vectors.
//
// A tile's accumulators begin with what is added to the product, so that costs no visit to the output: the low-rank
// branch (its product over ranks, masked in registers) and the bias. Then come the products of one block of the depth,
// and the output is written or added to. Rows of left are read as they lie, a number broadcast a product; right is
// packed. The loop over the depth isn't unrolled: with more than one step in flight Zen 3 falls from 100 to 93 % of its
// multiply-adds.
#pragma once

#include "dropout.h"

namespace mbf::cpu::MBF_ISA {
namespace {

constexpr int kGemmRows = MBF_GEMM_ROWS, kGemmVectors = MBF_GEMM_VECTORS;
constexpr int64_t kGemmSum = 384;                      // products that are summed one after the other
constexpr int kSliver = kGemmVectors * kLanes<float>;  // columns

template <int R>
__attribute__((noinline)) void gemm_tile(const float* left, int64_t ldl, const float* sliver, int64_t depth, float* out,
                                         int64_t ldo, const TileStart<float>& start, int64_t row) {
  Vec<float> s[R][kGemmVectors];
  MBF_UNROLL
  for (int t = 0; t < R; ++t) {
    __builtin_prefetch(out + t * ldo, 1);
    __builtin_prefetch(out + t * ldo + kSliver - 1, 1);
    MBF_UNROLL
    for (int n = 0; n < kGemmVectors; ++n) s[t][n] = Vec<float>{};
  }
  const auto products = [&](const float* factors, int64_t step, const float* vectors) __attribute__((always_inline)) {
    Vec<float> v[kGemmVectors];
    MBF_UNROLL
    for (int n = 0; n < kGemmVectors; ++n) {
      v[n] = load(vectors + n * kLanes<float>);
      MBF_PIN(v[n]);
    }
    MBF_UNROLL
    for (int t = 0; t < R; ++t) {
      Vec<float> factor = broadcast(factors[t * step]);
      MBF_PIN(factor);
      MBF_UNROLL
      for (int n = 0; n < kGemmVectors; ++n) s[t][n] += factor * v[n];
    }
  };
  if (start.r > 0) {
    const float* z = start.z + row * start.r;
    for (int64_t j = 0; j < start.r; ++j) products(z + j, start.r, start.e + j * start.lde);
    if (start.mask.bits != nullptr) {
      MBF_UNROLL
      for (int t = 0; t < R; ++t) {
        const int64_t at = start.mask.first + (row + t) * start.mask.ld;
        keep_several<kGemmVectors, float>(s[t], start.mask.bits, at);
      }
    }
  }
  if (start.bias != nullptr) {
    MBF_UNROLL
    for (int n = 0; n < kGemmVectors; ++n) {
      const Vec<float> bias = load(start.bias + n * kLanes<float>);
      MBF_UNROLL
      for (int t = 0; t < R; ++t) s[t][n] += bias;
    }
  }
  const char* next = reinterpret_cast<const char*>(left + R * ldl);
  // A sum rounds at its own size, which a branch may exceed by far, and so may the half of a long sum that is done; in
  // parts, the error is that of the BLAS.
  Vec<float> before[R][kGemmVectors];
  bool apart = false;
  const auto set_apart = [&]() __attribute__((always_inline)) {
    MBF_UNROLL
    for (int t = 0; t < R; ++t) {
      MBF_UNROLL
      for (int n = 0; n < kGemmVectors; ++n) {
        before[t][n] = apart ? before[t][n] + s[t][n] : s[t][n];
        s[t][n] = Vec<float>{};
      }
    }
    apart = true;
  };
  if (start.r > 0 || start.bias != nullptr) set_apart();
  const int64_t middle = depth > kGemmSum ? depth / 2 : 0;
  for (int64_t k = 0, end = middle > 0 ? middle : depth; k < depth; end = depth) {
    _Pragma("GCC unroll 1") for (; k < end; ++k) {
      __builtin_prefetch(next);
      next += R * sizeof(float);
      products(left + k, ldl, sliver + k * kSliver);
    }
    if (k == middle) set_apart();
  }
  if (apart) {
    MBF_UNROLL
    for (int t = 0; t < R; ++t) {
      MBF_UNROLL
      for (int n = 0; n < kGemmVectors; ++n) s[t][n] += before[t][n];
    }
  }
  MBF_UNROLL
  for (int t = 0; t < R; ++t) {
    MBF_UNROLL
    for (int n = 0; n < kGemmVectors; ++n) {
      float* to = out + t * ldo + n * kLanes<float>;
      store(to, start.add ? load(to) + s[t][n] : s[t][n]);
    }
  }
}

// The last rows, in one tile, or they would pass over the sliver once more.
template <int R>
void gemm_rest(const float* left, int64_t ldl, int64_t rest, const float* sliver, int64_t depth, float* out,
               int64_t ldo, const TileStart<float>& start, int64_t row) {
  if constexpr (R > 0) {
    if (rest == R) return gemm_tile<R>(left, ldl, sliver, depth, out, ldo, start, row);
    gemm_rest<R - 1>(left, ldl, rest, sliver, depth, out, ldo, start, row);
  }
}

void gemm_rows(const float* left, int64_t ldl, int64_t rows, const float* sliver, int64_t depth, float* out,
               int64_t ldo, const TileStart<float>& start) {
  int64_t t = 0;
  for (; t + kGemmRows <= rows; t += kGemmRows) {
    gemm_tile<kGemmRows>(left + t * ldl, ldl, sliver, depth, out + t * ldo, ldo, start, t);
  }
  gemm_rest<kGemmRows - 1>(left + t * ldl, ldl, rows - t, sliver, depth, out + t * ldo, ldo, start, t);
}

// Within every four numbers of both: the first two of each in turns, the last two, or two of each as `how` names them.
#if MBF_BYTES == 64
MBF_INLINE Vec<float> firsts(Vec<float> a, Vec<float> b) { return _mm512_unpacklo_ps(a, b); }
MBF_INLINE Vec<float> lasts(Vec<float> a, Vec<float> b) { return _mm512_unpackhi_ps(a, b); }
template <int how>
MBF_INLINE Vec<float> pairs_of(Vec<float> a, Vec<float> b) {
  return _mm512_shuffle_ps(a, b, how);
}
#else
MBF_INLINE Vec<float> firsts(Vec<float> a, Vec<float> b) { return _mm256_unpacklo_ps(a, b); }
MBF_INLINE Vec<float> lasts(Vec<float> a, Vec<float> b) { return _mm256_unpackhi_ps(a, b); }
template <int how>
MBF_INLINE Vec<float> pairs_of(Vec<float> a, Vec<float> b) {
  return _mm256_shuffle_ps(a, b, how);
}
#endif

// As many rows of numbers as they are long to columns, `ld` apart.
MBF_INLINE void transpose(const Vec<float> (&rows)[kLanes<float>], float* to, int64_t ld) {
  constexpr int L = kLanes<float>;
  Vec<float> pairs[L], fours[L];  // fours[n + j]: columns j, j + 4, … of rows n to n + 3
  MBF_UNROLL
  for (int n = 0; n < L; n += 2) {
    pairs[n] = firsts(rows[n], rows[n + 1]);
    pairs[n + 1] = lasts(rows[n], rows[n + 1]);
  }
  MBF_UNROLL
  for (int n = 0; n < L; n += 4) {
    fours[n] = pairs_of<0x44>(pairs[n], pairs[n + 2]);
    fours[n + 1] = pairs_of<0xee>(pairs[n], pairs[n + 2]);
    fours[n + 2] = pairs_of<0x44>(pairs[n + 1], pairs[n + 3]);
    fours[n + 3] = pairs_of<0xee>(pairs[n + 1], pairs[n + 3]);
  }
  MBF_UNROLL
  for (int n = 0; n < 4; ++n) {
#if MBF_BYTES == 64
    const __m512 even = _mm512_shuffle_f32x4(fours[n], fours[n + 4], 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(fours[n], fours[n + 4], 0xdd);
    const __m512 even_below = _mm512_shuffle_f32x4(fours[n + 8], fours[n + 12], 0x88);
    const __m512 odd_below = _mm512_shuffle_f32x4(fours[n + 8], fours[n + 12], 0xdd);
    store(to + n * ld, _mm512_shuffle_f32x4(even, even_below, 0x88));
    store(to + (n + 4) * ld, _mm512_shuffle_f32x4(odd, odd_below, 0x88));
    store(to + (n + 8) * ld, _mm512_shuffle_f32x4(even, even_below, 0xdd));
    store(to + (n + 12) * ld, _mm512_shuffle_f32x4(odd, odd_below, 0xdd));
#else
    store(to + n * ld, _mm256_permute2f128_ps(fours[n], fours[n + 4], 0x20));
    store(to + (n + 4) * ld, _mm256_permute2f128_ps(fours[n], fours[n + 4], 0x31));
#endif
  }
}

// Rows of right, a few at a time for all slivers: the processor fetches rows ahead, and not what lies across them.
template <typename T>
void gemm_pack_rows(const T* right, int64_t row, int64_t columns, int64_t depth, float* to) {
  constexpr int64_t kSome = 8;
  for (int64_t first = 0; first < depth; first += kSome) {
    const int64_t last = first + kSome < depth ? first + kSome : depth;
    for (int64_t i = 0; i + kSliver <= columns; i += kSliver) {
      for (int64_t k = first; k < last; ++k) {
        for (int64_t n = 0; n < kSliver; n += kLanes<float>) {
          store(to + i * depth + k * kSliver + n, load(right + k * row + i + n));
        }
      }
    }
  }
}

template <typename T>
void gemm_pack(const T* right, int64_t row, int64_t column, int64_t columns, int64_t depth, float* to) {
  constexpr int L = kLanes<float>;
  if (column == 1) gemm_pack_rows(right, row, columns, depth, to);
  for (int64_t i = 0; i < columns; i += kSliver, to += depth * kSliver) {
    const int64_t width = columns - i < kSliver ? columns - i : kSliver;
    const T* from = right + i * column;
    int64_t k = 0;
    if (width == kSliver && row == 1) {
      for (; k + L <= depth; k += L) {
        for (int64_t part = 0; part < kSliver; part += L) {
          Vec<float> block[L];
          MBF_UNROLL
          for (int n = 0; n < L; ++n) block[n] = load(from + (part + n) * column + k);
          transpose(block, to + k * kSliver + part, kSliver);
        }
      }
    } else if (width == kSliver && column == 1) {
      k = depth;  // copied below
    }
    for (; k < depth; ++k) {
      for (int64_t n = 0; n < kSliver; ++n) {
        to[k * kSliver + n] = n < width ? static_cast<float>(from[k * row + n * column]) : 0.0f;
      }
    }
  }
}

void pack(const void* right, ScalarType type, int64_t row, int64_t column, int64_t columns, int64_t depth, float* to) {
  with_type<float>(type, const_cast<void*>(right), [&](auto* p) { gemm_pack(p, row, column, columns, depth, to); });
}

void copy(Rows from, int64_t rows, int64_t columns, Mask mask, float* to, int64_t ld) {
  with_type<float>(from.type, from.data, [&](auto* p) { copy_kept(p, from.ld, rows, columns, mask, to, ld); });
}

}  // namespace

const GemmLoops& gemm_loops() {
  static constexpr GemmLoops table = {kGemmRows, kSliver, pack, copy, gemm_rows};
  return table;
}

}  // namespace mbf::cpu::MBF_ISA
