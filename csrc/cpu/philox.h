// Philox 4x32-10 (Salmon et al., SC 2011), one block of four words at a time, or eight blocks in AVX2 registers.
//
// Which word an element of a tensor takes is told in mbf/ops/philox.py; every kernel that drops must follow it.
#pragma once

#include <array>
#include <cstdint>

#include "simd.h"

namespace mbf::cpu {

class Philox {
 public:
  explicit Philox(uint64_t seed) : key0_(static_cast<uint32_t>(seed)), key1_(static_cast<uint32_t>(seed >> 32)) {}

  // The words of the block at counter (j mod 2^32, j div 2^32, 0, 0).
  std::array<uint32_t, 4> block(uint64_t j) const {
    uint32_t c0 = static_cast<uint32_t>(j), c1 = static_cast<uint32_t>(j >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = key0_, k1 = key1_;
    for (int round = 0; round < kRounds; ++round, k0 += kStep0, k1 += kStep1) {
      const uint64_t p0 = uint64_t{kMultiplier0} * c0;
      const uint64_t p1 = uint64_t{kMultiplier1} * c2;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c1 = static_cast<uint32_t>(p1);
      c3 = static_cast<uint32_t>(p0);
    }
    return {c0, c1, c2, c3};
  }

#if MBF_HAS_AVX2
  // Whether blocks j .. j + 7 share the high word of their counters, which blocks8 takes for granted.
  static bool can_take_8(uint64_t j) { return static_cast<uint32_t>(j) <= UINT32_MAX - 7; }

  // The words of blocks j .. j + 7: words[w] holds word w of all eight, block j in the lowest lane.
  MBF_AVX2 void blocks8(uint64_t j, __m256i words[4]) const {
    __m256i c0 = _mm256_add_epi32(broadcast(static_cast<uint32_t>(j)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256i c1 = broadcast(static_cast<uint32_t>(j >> 32));
    __m256i c2 = _mm256_setzero_si256();
    __m256i c3 = _mm256_setzero_si256();
    uint32_t k0 = key0_, k1 = key1_;
    for (int round = 0; round < kRounds; ++round, k0 += kStep0, k1 += kStep1) {
      __m256i low0, high0, low1, high1;
      multiply(c0, kMultiplier0, low0, high0);
      multiply(c2, kMultiplier1, low1, high1);
      c0 = _mm256_xor_si256(_mm256_xor_si256(high1, c1), broadcast(k0));
      c2 = _mm256_xor_si256(_mm256_xor_si256(high0, c3), broadcast(k1));
      c1 = low1;
      c3 = low0;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
  }
#endif

 private:
  static constexpr int kRounds = 10;
  static constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  static constexpr uint32_t kStep0 = 0x9E3779B9, kStep1 = 0xBB67AE85;

#if MBF_HAS_AVX2
  MBF_AVX2 static __m256i broadcast(uint32_t word) { return _mm256_set1_epi32(static_cast<int>(word)); }

  // The low and high words of eight 64-bit products; AVX2 multiplies the even lanes only.
  MBF_AVX2 static void multiply(__m256i words, uint32_t multiplier, __m256i& low, __m256i& high) {
    const __m256i factor = broadcast(multiplier);
    const __m256i even = _mm256_mul_epu32(words, factor);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(words, 32), factor);
    low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
    high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  }
#endif

  uint32_t key0_, key1_;
};

}  // namespace mbf::cpu
