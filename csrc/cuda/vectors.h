// Several neighbouring elements of global memory as one access of 16, 8 or 4 bytes.
#pragma once

#include <cstring>
#include <type_traits>

#include "device.h"

namespace mbf::cuda {

template <typename T, int N>
struct Pack {
  T values[N];
};

template <int kBytes>
using Word = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, unsigned int>>;

inline bool aligned16(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// `address` must be aligned to the pack where kWhole; otherwise its elements are read one by one.
template <int N, bool kWhole = true, typename T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* address) {
  Pack<T, N> pack;
  if constexpr (kWhole) {
    const auto word = load(reinterpret_cast<const Word<N * sizeof(T)>*>(address));
    static_assert(sizeof(word) == sizeof(pack), "a pack is 16, 8 or 4 bytes");
    memcpy(&pack, &word, sizeof(pack));
  } else {
    for (int n = 0; n < N; ++n) pack.values[n] = load(address + n);
  }
  return pack;
}

template <bool kWhole = true, typename T, int N>
__device__ __forceinline__ void store_pack(T* address, const Pack<T, N>& pack) {
  if constexpr (kWhole) {
    Word<N * sizeof(T)> word;
    static_assert(sizeof(word) == sizeof(pack), "a pack is 16, 8 or 4 bytes");
    memcpy(&word, &pack, sizeof(pack));
    store(reinterpret_cast<Word<N * sizeof(T)>*>(address), word);
  } else {
    for (int n = 0; n < N; ++n) store(address + n, pack.values[n]);
  }
}

}  // namespace mbf::cuda
