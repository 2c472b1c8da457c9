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

// Where every visit to x would mask it anew, and that is dear, visits after the first are to a copy in the first cache.
constexpr bool copies(int64_t visits) { return visits > (MBF_BYTES == 64 ? 3 : 2); }

template <typename C, typename T>
void copy_kept(const T* x, int64_t ldx, int64_t rows, int64_t columns, Mask mask, C* out, int64_t ld) {
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t first = mask.first + t * mask.ld;
    int64_t i = 0;
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
