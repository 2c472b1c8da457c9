// Barriers, the operations of a warp, atomics and fences.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "half.h"
#include "races.h"
#include "runtime.h"

constexpr int warpSize = 32;

// Where an intrinsic is called: default arguments are evaluated at the call.
#define MBF_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(MBF_SITE) { mbf::emulation::meet_block({file, line}, "__syncthreads", false); }

inline int __syncthreads_count(int predicate, MBF_SITE) {
  return mbf::emulation::meet_block({file, line}, "__syncthreads_count", predicate != 0);
}

inline int __syncthreads_or(int predicate, MBF_SITE) {
  return mbf::emulation::meet_block({file, line}, "__syncthreads_or", predicate != 0) > 0;
}

inline int __syncthreads_and(int predicate, MBF_SITE) {
  return mbf::emulation::meet_block({file, line}, "__syncthreads_and", predicate == 0) == 0;
}

inline void __syncwarp(unsigned int mask = 0xffffffffu, MBF_SITE) {
  mbf::emulation::meet_warp({file, line}, "__syncwarp", mask, {}, mbf::emulation::lane(), false);
}

inline unsigned int __ballot_sync(unsigned int mask, int predicate, MBF_SITE) {
  const int lane = mbf::emulation::lane();
  return mbf::emulation::meet_warp({file, line}, "__ballot_sync", mask, {}, lane, predicate != 0).votes;
}

inline int __any_sync(unsigned int mask, int predicate, MBF_SITE) {
  const int lane = mbf::emulation::lane();
  return mbf::emulation::meet_warp({file, line}, "__any_sync", mask, {}, lane, predicate != 0).votes != 0;
}

inline int __all_sync(unsigned int mask, int predicate, MBF_SITE) {
  const int lane = mbf::emulation::lane();
  return mbf::emulation::meet_warp({file, line}, "__all_sync", mask, {}, lane, predicate == 0).votes == 0;
}

namespace mbf::emulation {

template <typename T>
constexpr bool shuffles =
    (std::is_arithmetic_v<T> && sizeof(T) >= 4) || std::is_same_v<T, __half> || std::is_same_v<T, __half2> ||
    std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __nv_bfloat162>;

template <typename T>
T shuffle(Site site, const char* operation, unsigned int mask, T value, int source) {
  static_assert(shuffles<T>, "CUDA shuffles 32- and 64-bit numbers and 16-bit floats");
  Handed handed{};
  std::memcpy(handed.bits, &value, sizeof(T));
  handed = meet_warp(site, operation, mask, handed, source, false);
  std::memcpy(&value, handed.bits, sizeof(T));
  return value;
}

}  // namespace mbf::emulation

// Lanes are taken by segments of `width`; a source beyond its end is the lane itself.

template <typename T>
T __shfl_sync(unsigned int mask, T value, int source, int width = 32, MBF_SITE) {
  const int begin = mbf::emulation::lane() & ~(width - 1);
  return mbf::emulation::shuffle({file, line}, "__shfl_sync", mask, value, begin + (source & (width - 1)));
}

template <typename T>
T __shfl_up_sync(unsigned int mask, T value, unsigned int delta, int width = 32, MBF_SITE) {
  const int lane = mbf::emulation::lane(), source = lane - static_cast<int>(delta);
  const int from = source < (lane & ~(width - 1)) ? lane : source;
  return mbf::emulation::shuffle({file, line}, "__shfl_up_sync", mask, value, from);
}

template <typename T>
T __shfl_down_sync(unsigned int mask, T value, unsigned int delta, int width = 32, MBF_SITE) {
  const int lane = mbf::emulation::lane(), source = lane + static_cast<int>(delta);
  const int from = source > (lane | (width - 1)) ? lane : source;
  return mbf::emulation::shuffle({file, line}, "__shfl_down_sync", mask, value, from);
}

template <typename T>
T __shfl_xor_sync(unsigned int mask, T value, int bits, int width = 32, MBF_SITE) {
  const int lane = mbf::emulation::lane(), source = lane ^ bits;
  const int from = source > (lane | (width - 1)) ? lane : source;
  return mbf::emulation::shuffle({file, line}, "__shfl_xor_sync", mask, value, from);
}

#undef MBF_SITE

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

namespace mbf::emulation {

// Reads and writes `address` as one step, between points where other threads may go on.
template <typename T, typename Change>
T atomically(T* address, Change change) {
  overtake(2);
  if (!is_shared(address)) {
    loaded(address, sizeof(T), sizeof(T));
    stored(address, sizeof(T), sizeof(T));
  }
  races::start_atomic();
  const T old = *address;
  *address = change(old);
  races::end_atomic();
  overtake(2);
  return old;
}

}  // namespace mbf::emulation

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return mbf::emulation::atomically(address, [&](T old) { return old + value; });
}
template <typename T>
T atomicSub(T* address, std::type_identity_t<T> value) {
  return mbf::emulation::atomically(address, [&](T old) { return old - value; });
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return mbf::emulation::atomically(address, [&](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return mbf::emulation::atomically(address, [&](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return mbf::emulation::atomically(address, [&](T old) { return old | value; });
}
template <typename T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return mbf::emulation::atomically(address, [&](T old) { return old & value; });
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return mbf::emulation::atomically(address, [&](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return mbf::emulation::atomically(address, [&](T old) { return old == expected ? value : old; });
}
inline unsigned int atomicInc(unsigned int* address, unsigned int last) {
  return mbf::emulation::atomically(address, [&](unsigned int old) { return old >= last ? 0u : old + 1; });
}

template <typename T>
T __ldg(const T* address) {
  mbf::emulation::loaded(address, sizeof(T), alignof(T));
  return *address;
}
