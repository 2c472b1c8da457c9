// One block of Philox 4x32-10 (Salmon et al., SC 2011); see mbf/ops/philox.py.
#pragma once

#include <cstdint>

namespace mbf::cpu {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53, kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxStep0 = 0x9E3779B9, kPhiloxStep1 = 0xBB67AE85;

// Its four words at counter (block mod 2³², block div 2³², third, 0). Inlined, as the inner loops of every instruction
// set have it.
static inline __attribute__((always_inline)) void philox(uint64_t seed, uint64_t block, uint32_t third,
                                                         uint32_t (&words)[4]) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32), c2 = third, c3 = 0;
  for (int round = 0; round < 10; ++round, key0 += kPhiloxStep0, key1 += kPhiloxStep1) {
    const uint64_t p0 = uint64_t{kPhiloxMultiplier0} * c0, p1 = uint64_t{kPhiloxMultiplier1} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

}  // namespace mbf::cpu
