// The bits of a mask, eight elements a block of Philox.
#pragma once

#include "vectors.h"

namespace mbf::cpu::MBF_ISA {
namespace {

// Which of a block's eight half-words reach the threshold.
MBF_INLINE uint8_t mask_byte(uint64_t seed, uint64_t block, uint32_t threshold) {
  uint32_t words[4];
  philox(seed, block, 0, words);
  uint32_t byte = 0;
  for (int w = 0; w < 4; ++w) {
    byte |= static_cast<uint32_t>((words[w] & 0xffff) >= threshold) << (2 * w);
    byte |= static_cast<uint32_t>((words[w] >> 16) >= threshold) << (2 * w + 1);
  }
  return static_cast<uint8_t>(byte);
}

#if MBF_BYTES >= 32
#if MBF_BYTES == 64
using Words = __m512i;
MBF_INLINE Words all(uint64_t value) { return _mm512_set1_epi64(static_cast<long long>(value)); }
MBF_INLINE Words product(Words a, Words b) { return _mm512_mul_epu32(a, b); }
// Shuffled, as shifts are up to the multiplier's port.
MBF_INLINE Words high_half(Words v) { return _mm512_shuffle_epi32(v, _MM_PERM_DDBB); }
MBF_INLINE Words exclusive_or(Words a, Words b, Words c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
#else
using Words = __m256i;
MBF_INLINE Words all(uint64_t value) { return _mm256_set1_epi64x(static_cast<long long>(value)); }
MBF_INLINE Words product(Words a, Words b) { return _mm256_mul_epu32(a, b); }
MBF_INLINE Words high_half(Words v) { return _mm256_srli_epi64(v, 32); }
MBF_INLINE Words exclusive_or(Words a, Words b, Words c) { return _mm256_xor_si256(a, _mm256_xor_si256(b, c)); }
#endif

// What all blocks of a call share: the keys of every round, and of the first two rounds what the counter's low word
// does not reach, as the third and fourth words begin as zero.
struct Schedule {
  uint64_t keys[10][2];
  uint64_t second, third;  // round 1: key ^ high half of the product of c0; that product

  Schedule(uint64_t seed, uint32_t high) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, key0 += kPhiloxStep0, key1 += kPhiloxStep1) {
      keys[round][0] = key0;
      keys[round][1] = key1;
    }
    third = uint64_t{kPhiloxMultiplier0} * (high ^ static_cast<uint32_t>(keys[0][0]));
    second = (third >> 32) ^ keys[1][1];
  }
};

// One block a 64-bit lane: a product reads the low halves only, so what stands in the high ones does not matter.
// Several vectors at once, as each waits for its own products.
template <int several>
MBF_INLINE void rounds(const Schedule& schedule, const Words (&counter)[several], Words (&c)[several][4]) {
  const Words m0 = all(kPhiloxMultiplier0), m1 = all(kPhiloxMultiplier1);
  MBF_UNROLL
  for (int n = 0; n < several; ++n) {
    const Words p0 = product(counter[n], m0);
    const Words p1 = product(high_half(p0) ^ all(schedule.keys[0][1]), m1);
    c[n][0] = high_half(p1) ^ all(schedule.keys[1][0]);
    c[n][1] = p1;
    c[n][2] = p0 ^ all(schedule.second);
    c[n][3] = all(schedule.third);
  }
  MBF_UNROLL
  for (int round = 2; round < 10; ++round) {
    MBF_UNROLL
    for (int n = 0; n < several; ++n) {
      const Words p0 = product(c[n][0], m0), p1 = product(c[n][2], m1);
      c[n][0] = exclusive_or(high_half(p1), c[n][1], all(schedule.keys[round][0]));
      c[n][2] = exclusive_or(high_half(p0), c[n][3], all(schedule.keys[round][1]));
      c[n][1] = p1;
      c[n][3] = p0;
    }
  }
}

// Which half-words reach the threshold: a bit each, eight a lane, in order.
MBF_INLINE void compare(const Words (&c)[4], Words threshold, uint8_t* out) {
#if MBF_BYTES == 64
  const __m512i low = all(0xffffffff);
  const __m512i a = _mm512_or_si512(_mm512_and_si512(c[0], low), _mm512_slli_epi64(c[1], 32));
  const __m512i b = _mm512_or_si512(_mm512_and_si512(c[2], low), _mm512_slli_epi64(c[3], 32));
  const __m512i first = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b);
  const __m512i second = _mm512_permutex2var_epi64(a, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b);
  const uint32_t bits[2] = {_mm512_cmpge_epu16_mask(first, threshold), _mm512_cmpge_epu16_mask(second, threshold)};
  __builtin_memcpy(out, bits, 8);
#else
  const __m256i a = _mm256_blend_epi32(c[0], _mm256_slli_epi64(c[1], 32), 0xaa);
  const __m256i b = _mm256_blend_epi32(c[2], _mm256_slli_epi64(c[3], 32), 0xaa);
  const __m256i even = _mm256_unpacklo_epi64(a, b), odd = _mm256_unpackhi_epi64(a, b);
  const __m256i kept_even = _mm256_cmpeq_epi16(_mm256_max_epu16(even, threshold), even);
  const __m256i kept_odd = _mm256_cmpeq_epi16(_mm256_max_epu16(odd, threshold), odd);
  const int bits = _mm256_movemask_epi8(_mm256_packs_epi16(kept_even, kept_odd));
  __builtin_memcpy(out, &bits, 4);
#endif
}
#endif

void mask_bits(uint64_t seed, uint32_t threshold, uint64_t first, int64_t blocks, uint8_t* bits) {
  int64_t n = 0;
#if MBF_BYTES >= 32
  constexpr int kLanes64 = MBF_BYTES / 8, kSeveral = MBF_BYTES == 64 ? 4 : 3, kStep = kSeveral * kLanes64;
  const Schedule schedule(seed, static_cast<uint32_t>(first >> 32));
#if MBF_BYTES == 64
  const Words order = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  const Words reached = _mm512_set1_epi16(static_cast<short>(threshold));
#else
  const Words order = _mm256_setr_epi64x(0, 1, 2, 3), reached = _mm256_set1_epi16(static_cast<short>(threshold));
#endif
  const uint64_t before_carry = UINT32_MAX - static_cast<uint32_t>(first);  // then the counter's high word changes
  for (; n + kStep <= blocks && static_cast<uint64_t>(n) + kStep <= before_carry; n += kStep) {
    Words counter[kSeveral], c[kSeveral][4];
    MBF_UNROLL
    for (int k = 0; k < kSeveral; ++k) counter[k] = all(first + n + k * kLanes64) + order;
    rounds<kSeveral>(schedule, counter, c);
    MBF_UNROLL
    for (int k = 0; k < kSeveral; ++k) compare(c[k], reached, bits + n + k * kLanes64);
  }
#endif
  for (; n < blocks; ++n) bits[n] = mask_byte(seed, first + n, threshold);
}

}  // namespace
}  // namespace mbf::cpu::MBF_ISA
