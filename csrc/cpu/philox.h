// Philox 4x32-10 (Salmon et al., SC 2011), one block of four words at a time, or four blocks in AVX2 registers.
//
// Which half-word an element of a tensor takes is told in mbf/ops/philox.py; every kernel that drops must follow it.
#pragma once

#include <array>
#include <cstdint>

#include "simd.h"

namespace mbf::cpu {

class Philox {
 public:
  explicit Philox(uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (auto& keys : keys_) {
      keys = {k0, k1};
      k0 += kStep0;
      k1 += kStep1;
    }
  }

  // The words of the block at counter (j mod 2^32, j div 2^32, 0, 0).
  std::array<uint32_t, 4> block(uint64_t j) const {
    uint32_t c0 = static_cast<uint32_t>(j), c1 = static_cast<uint32_t>(j >> 32), c2 = 0, c3 = 0;
    for (const auto& [k0, k1] : keys_) {
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
  // The words of blocks j .. j + 3, a block to a 64-bit lane: words01 holds words 0 and 1 of each, words23 2 and 3.
  //
  // A product reads the low half of its lane only, so the high halves of c0 .. c3 may hold anything meanwhile.
  MBF_AVX2 void blocks4(uint64_t j, __m256i& words01, __m256i& words23) const {
    const __m256i multiplier0 = _mm256_set1_epi64x(kMultiplier0), multiplier1 = _mm256_set1_epi64x(kMultiplier1);
    __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(j)), _mm256_setr_epi64x(0, 1, 2, 3));
    __m256i c1 = _mm256_srli_epi64(c0, 32);
    __m256i c2 = _mm256_setzero_si256();
    __m256i c3 = _mm256_setzero_si256();
    for (const auto& [k0, k1] : keys_) {
      const __m256i p0 = _mm256_mul_epu32(c0, multiplier0);
      const __m256i p1 = _mm256_mul_epu32(c2, multiplier1);
      c0 = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(c1, broadcast(k0)));
      c2 = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(c3, broadcast(k1)));
      c1 = p1;
      c3 = p0;
    }
    words01 = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
    words23 = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
  }
#endif

 private:
  static constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  static constexpr uint32_t kStep0 = 0x9E3779B9, kStep1 = 0xBB67AE85;

#if MBF_HAS_AVX2
  MBF_AVX2 static __m256i broadcast(uint32_t word) { return _mm256_set1_epi32(static_cast<int>(word)); }
#endif

  std::array<std::array<uint32_t, 2>, 10> keys_;  // of the rounds
};

}  // namespace mbf::cpu
