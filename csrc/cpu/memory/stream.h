// Writes that go past the caches: memory is not read first, and nothing is pushed out for what nobody reads soon.
#pragma once

#include <cstdint>
#include <cstring>

#include "../simd.h"

namespace mbf::cpu {

#if MBF_HAS_AVX2
MBF_AVX2 inline void stream_avx2(const char* from, int64_t bytes, char* to) {
  const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 31);
  if (bytes < head + 32) {
    std::memcpy(to, from, bytes);
    return;
  }
  std::memcpy(to, from, head);
  int64_t i = head;
  for (; i + 32 <= bytes; i += 32) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), v);
  }
  std::memcpy(to + i, from + i, bytes - i);
}
#endif

// memcpy. Other threads may see it only after streamed().
inline void stream(const void* from, int64_t bytes, void* to) {
#if MBF_HAS_AVX2
  if (has_avx2()) return stream_avx2(static_cast<const char*>(from), bytes, static_cast<char*>(to));
#endif
  std::memcpy(to, from, bytes);
}

// Puts what the calling thread has streamed before everything that it writes from now on.
inline void streamed() {
#if MBF_HAS_AVX2
  _mm_sfence();
#endif
}

}  // namespace mbf::cpu
