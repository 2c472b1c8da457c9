// The random matrix of a randomised SVD, from a counter: bit by bit that of mbf/ops/rsvd.py.
#pragma once

#include <cstdint>

#include "../philox.h"

namespace mbf::cpu::linalg {

// Calls put(e, number) for the elements e < count of the stream of `seed`: sums of four uniform half-words, which are
// near enough to normal, with mean 0 and variance 1.
template <typename Put>
void sketch(uint64_t seed, int64_t count, const Put& put) {
  for (int64_t e = 0; e < count; e += 2) {
    uint32_t words[4];
    philox(seed, static_cast<uint64_t>(e / 2), 1, words);
    for (int64_t half = 0; half < 2 && e + half < count; ++half) {
      const uint32_t a = words[2 * half], b = words[2 * half + 1];
      const int32_t sum = static_cast<int32_t>((a & 0xffff) + (a >> 16) + (b & 0xffff) + (b >> 16));
      put(e + half, static_cast<float>(2 * sum - 262139) * (1.0f / 75674.0f));
    }
  }
}

}  // namespace mbf::cpu::linalg
