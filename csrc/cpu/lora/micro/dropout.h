// What dropout keeps of vectors and rows, by the bits of a mask.
#pragma once

#include "vectors.h"

namespace mbf::cpu::MBF_ISA {
namespace {

// v where bit `position + lane` of the stream is set, else 0.
template <typename C>
MBF_INLINE Vec<C> keep(Vec<C> v, const uint8_t* bits, int64_t position) {
  uint32_t word;
  __builtin_memcpy(&word, bits + (position >> 3), 4);
  word >>= position & 7;
  if constexpr (sizeof(C) == 4) {
#if MBF_BYTES == 64
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(word), v);
#else
    Int32 bit;
    for (int lane = 0; lane < kLanes<C>; ++lane) bit[lane] = 1 << lane;
    const Int32 kept = ((static_cast<int32_t>(word) - Int32{}) & bit) == bit;
    return reinterpret_cast<Vec<C>>(reinterpret_cast<Int32>(v) & kept);
#endif
  } else {
    Int64 bit;
    for (int lane = 0; lane < kLanes<C>; ++lane) bit[lane] = 1 << lane;
    const Int64 kept = ((static_cast<int64_t>(word) - Int64{}) & bit) == bit;
    return reinterpret_cast<Vec<C>>(reinterpret_cast<Int64>(v) & kept);
  }
}

// The same for vectors side by side, three at most where a word of the stream serves all of them.
template <int N, typename C>
MBF_INLINE void keep_several(Vec<C> (&v)[N], const uint8_t* bits, int64_t position) {
#if MBF_BYTES == 32
  if constexpr (sizeof(C) == 4) {
    static_assert(N <= 3);
    int32_t word;
    __builtin_memcpy(&word, bits + (position >> 3), 4);
    const Int32 words = (word - Int32{}) >> static_cast<int>(position & 7);
    MBF_UNROLL
    for (int n = 0; n < N; ++n) {
      const Int32 bit = Int32{1, 2, 4, 8, 16, 32, 64, 128} << (8 * n);
      v[n] = reinterpret_cast<Vec<C>>(reinterpret_cast<Int32>(v[n]) & ((words & bit) == bit));
    }
    return;
  }
#endif
  MBF_UNROLL
  for (int n = 0; n < N; ++n) v[n] = keep<C>(v[n], bits, position + n * kLanes<C>);
}

// Where every visit to x would mask it anew, and that is dear, visits after the first are to a copy in the first cache.
constexpr bool copies(int64_t visits) { return visits > (MBF_BYTES == 64 ? 3 : 2); }

// What the mask, if any, keeps of x.
template <typename C, typename T>
void copy_kept(const T* x, int64_t ldx, int64_t rows, int64_t columns, Mask mask, C* out, int64_t ld) {
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t first = mask.first + t * mask.ld;
    int64_t i = 0;
    if (mask.bits == nullptr) {
      for (; i + kLanes<C> <= columns; i += kLanes<C>) store(out + t * ld + i, load(x + t * ldx + i));
      if (i < columns) store_first<C>(out + t * ld + i, load_first<C>(x + t * ldx + i, columns - i), columns - i);
      continue;
    }
    constexpr int kSome = 3;
    for (; i + kSome * kLanes<C> <= columns; i += kSome * kLanes<C>) {
      Vec<C> v[kSome];
      MBF_UNROLL
      for (int n = 0; n < kSome; ++n) v[n] = load(x + t * ldx + i + n * kLanes<C>);
      keep_several<kSome, C>(v, mask.bits, first + i);
      MBF_UNROLL
      for (int n = 0; n < kSome; ++n) store(out + t * ld + i + n * kLanes<C>, v[n]);
    }
    for (; i + kLanes<C> <= columns; i += kLanes<C>) {
      store(out + t * ld + i, keep<C>(load(x + t * ldx + i), mask.bits, first + i));
    }
    if (i < columns) {
      const int64_t last = columns - i;
      store_first<C>(out + t * ld + i, keep<C>(load_first<C>(x + t * ldx + i, last), mask.bits, first + i), last);
    }
  }
}

}  // namespace
}  // namespace mbf::cpu::MBF_ISA
