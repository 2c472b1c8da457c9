// Eight elements of a row in registers, as words of 32 bits: so they are moved 16 bytes at a time, and halves converted
// and dropped in pairs, whatever the compiler makes of 16-bit numbers.
#pragma once

#include <cstring>

#include "../device.h"

namespace mbf::cuda::lora {

constexpr int kOctet = 8;

// Two floats as the word of two halves.
template <typename T>
__device__ __forceinline__ uint32_t paired(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, sizeof(word));
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, sizeof(word));
  }
  return word;
}

template <typename T>
struct Octet {
  static constexpr int kInWord = 4 / static_cast<int>(sizeof(T)), kWords = kOctet / kInWord;
  uint32_t words[kWords] = {};

  __device__ __forceinline__ T operator[](int n) const {
    T element;
    if constexpr (kInWord == 1) {
      memcpy(&element, &words[n], sizeof(element));
    } else {
      const auto bits = static_cast<uint16_t>(words[n / 2] >> (16 * (n % 2)));
      memcpy(&element, &bits, sizeof(element));
    }
    return element;
  }

  // Of an octet of zeros.
  __device__ __forceinline__ void set(int n, T element) {
    if constexpr (kInWord == 1) {
      memcpy(&words[n], &element, sizeof(element));
    } else {
      uint16_t bits;
      memcpy(&bits, &element, sizeof(bits));
      words[n / 2] |= static_cast<uint32_t>(bits) << (16 * (n % 2));
    }
  }

  __device__ __forceinline__ static Octet of(const float (&values)[kOctet]) {
    Octet found;
#pragma unroll
    for (int n = 0; n < kWords; ++n) {
      if constexpr (kInWord == 1) {
        memcpy(&found.words[n], &values[n], sizeof(float));
      } else {
        found.words[n] = paired<T>(values[2 * n], values[2 * n + 1]);
      }
    }
    return found;
  }

  // Zeros in the place of the elements whose bit is not set.
  __device__ __forceinline__ void drop(uint32_t keep) {
#pragma unroll
    for (int n = 0; n < kWords; ++n) {
      if constexpr (kInWord == 1) {
        words[n] = keep >> n & 1 ? words[n] : 0;
      } else {
        words[n] &= (keep >> (2 * n) & 1 ? 0xffffu : 0u) | (keep >> (2 * n + 1) & 1 ? 0xffff0000u : 0u);
      }
    }
  }

  __device__ __forceinline__ uint4 part(int n) const {
    return make_uint4(words[4 * n], words[4 * n + 1], words[4 * n + 2], words[4 * n + 3]);
  }
  __device__ __forceinline__ void set_part(int n, uint4 value) {
    words[4 * n] = value.x, words[4 * n + 1] = value.y, words[4 * n + 2] = value.z, words[4 * n + 3] = value.w;
  }
};

template <typename P, typename X>
__device__ __forceinline__ Octet<P> converted(const Octet<X>& octet) {
  if constexpr (std::is_same_v<P, X>) {
    return octet;
  } else {
    float values[kOctet];
#pragma unroll
    for (int n = 0; n < kOctet; ++n) values[n] = convert<float>(octet[n]);
    return Octet<P>::of(values);
  }
}

}  // namespace mbf::cuda::lora
