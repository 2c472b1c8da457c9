// The bits of a mask, eight elements a block of Philox.
#pragma once

#include "vectors.h"

namespace mbf::cpu::MBF_ISA {
namespace {

constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kStep0 = 0x9E3779B9, kStep1 = 0xBB67AE85;

// Philox 4x32-10 (Salmon et al., SC 2011) of one block, and which of its eight half-words reach the threshold.
MBF_INLINE uint8_t mask_byte(uint32_t key0, uint32_t key1, uint64_t block, uint32_t threshold) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round, key0 += kStep0, key1 += kStep1) {
    const uint64_t p0 = uint64_t{kMultiplier0} * c0, p1 = uint64_t{kMultiplier1} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
  }
  const uint32_t words[4] = {c0, c1, c2, c3};
  uint32_t byte = 0;
  for (int w = 0; w < 4; ++w) {
    byte |= static_cast<uint32_t>((words[w] & 0xffff) >= threshold) << (2 * w);
    byte |= static_cast<uint32_t>((words[w] >> 16) >= threshold) << (2 * w + 1);
  }
  return static_cast<uint8_t>(byte);
}

#if MBF_BYTES == 64
// Eight blocks, one a 64-bit lane: a product reads the low halves only, so what stands in the high ones does not
// matter.
MBF_INLINE void mask_8_bytes(uint32_t key0, uint32_t key1, __m512i counter, uint32_t high, __m512i threshold,
                             uint8_t* out) {
  const __m512i m0 = _mm512_set1_epi64(kMultiplier0), m1 = _mm512_set1_epi64(kMultiplier1);
  __m512i c0 = counter, c1 = _mm512_set1_epi64(high), c2 = _mm512_setzero_si512(), c3 = c2;
  MBF_UNROLL
  for (int round = 0; round < 10; ++round) {
    const __m512i p0 = _mm512_mul_epu32(c0, m0), p1 = _mm512_mul_epu32(c2, m1);
    const __m512i k0 = _mm512_set1_epi64(key0), k1 = _mm512_set1_epi64(key1);
    c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, k0, 0x96);
    c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, k1, 0x96);
    c1 = p1;
    c3 = p0;
    key0 += kStep0;
    key1 += kStep1;
  }
  const __m512i low = _mm512_set1_epi64(0xffffffff);
  const __m512i a = _mm512_or_si512(_mm512_and_si512(c0, low), _mm512_slli_epi64(c1, 32));
  const __m512i b = _mm512_or_si512(_mm512_and_si512(c2, low), _mm512_slli_epi64(c3, 32));
  const __m512i first = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b);
  const __m512i second = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b);
  const uint32_t bits[2] = {_mm512_cmpge_epu16_mask(first, threshold), _mm512_cmpge_epu16_mask(second, threshold)};
  __builtin_memcpy(out, bits, 8);
}
#elif MBF_BYTES == 32
// Four blocks, one a 64-bit lane, as above.
MBF_INLINE void mask_4_bytes(uint32_t key0, uint32_t key1, __m256i counter, uint32_t high, __m256i threshold,
                             uint8_t* out) {
  const __m256i m0 = _mm256_set1_epi64x(kMultiplier0), m1 = _mm256_set1_epi64x(kMultiplier1);
  __m256i c0 = counter, c1 = _mm256_set1_epi64x(high), c2 = _mm256_setzero_si256(), c3 = c2;
  MBF_UNROLL
  for (int round = 0; round < 10; ++round) {
    const __m256i p0 = _mm256_mul_epu32(c0, m0), p1 = _mm256_mul_epu32(c2, m1);
    const __m256i k0 = _mm256_set1_epi64x(key0), k1 = _mm256_set1_epi64x(key1);
    c0 = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(c1, k0));
    c2 = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(c3, k1));
    c1 = p1;
    c3 = p0;
    key0 += kStep0;
    key1 += kStep1;
  }
  const __m256i a = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xaa);
  const __m256i b = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xaa);
  const __m256i even = _mm256_unpacklo_epi64(a, b), odd = _mm256_unpackhi_epi64(a, b);
  const __m256i kept_even = _mm256_cmpeq_epi16(_mm256_max_epu16(even, threshold), even);
  const __m256i kept_odd = _mm256_cmpeq_epi16(_mm256_max_epu16(odd, threshold), odd);
  const int bits = _mm256_movemask_epi8(_mm256_packs_epi16(kept_even, kept_odd));
  __builtin_memcpy(out, &bits, 4);
}
#endif

void mask_bits(uint64_t seed, uint32_t threshold, uint64_t first, int64_t blocks, uint8_t* bits) {
  const uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  int64_t n = 0;
#if MBF_BYTES >= 32
  constexpr int kStep = MBF_BYTES / 8;
  for (; n + kStep <= blocks; n += kStep) {
    const uint64_t block = first + n;
    if (static_cast<uint32_t>(block) > UINT32_MAX - kStep) break;  // the counter's high word would change within a step
    const int64_t low = static_cast<uint32_t>(block);
    const uint32_t high = static_cast<uint32_t>(block >> 32);
#if MBF_BYTES == 64
    const __m512i counter = _mm512_add_epi64(_mm512_set1_epi64(low), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    mask_8_bytes(key0, key1, counter, high, _mm512_set1_epi16(static_cast<short>(threshold)), bits + n);
#else
    const __m256i counter = _mm256_add_epi64(_mm256_set1_epi64x(low), _mm256_setr_epi64x(0, 1, 2, 3));
    mask_4_bytes(key0, key1, counter, high, _mm256_set1_epi16(static_cast<short>(threshold)), bits + n);
#endif
  }
#endif
  for (; n < blocks; ++n) bits[n] = mask_byte(key0, key1, first + n, threshold);
}

}  // namespace
}  // namespace mbf::cpu::MBF_ISA
