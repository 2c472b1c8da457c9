// Tiles on their way from matrices in global memory to shared memory, eight elements of a row at a time: a thread moves
// them by 16 bytes where the matrix allows it, and a block of Philox decides which of them dropout keeps.
#pragma once

#include "../philox.cuh"
#include "octet.cuh"

namespace mbf::cuda::lora {

// A matrix whose rows are contiguous, `stride` elements apart.
template <typename T>
struct Rows {
  T* data;
  int64_t rows, columns, stride;
  bool octets;  // every octet of it lies at a multiple of 16 bytes, and none is cut off by the end of a row
};

// Zeros stand for what the matrix does not have. `column` is a multiple of 8.
template <typename T>
__device__ __forceinline__ Octet<T> read(const Rows<const T>& from, int64_t row, int64_t column) {
  Octet<T> found;
  if (row >= from.rows || column >= from.columns) return found;
  const T* at = from.data + row * from.stride + column;
  if (from.octets) {
#pragma unroll
    for (int n = 0; n < Octet<T>::kWords / 4; ++n) found.set_part(n, load(reinterpret_cast<const uint4*>(at) + n));
  } else {
    const int count = static_cast<int>(min(from.columns - column, static_cast<int64_t>(kOctet)));
#pragma unroll
    for (int n = 0; n < kOctet; ++n) {
      if (n < count) found.set(n, load(at + n));
    }
  }
  return found;
}

// store of 16 bytes, which the compiler would take apart where they are four pairs of halves.
__device__ __forceinline__ void store_part(uint4* address, uint4 value) {
#ifdef MBF_EMULATION
  store(address, value);
#else
  __stwb(address, value);
#endif
}

template <typename T>
__device__ __forceinline__ void write(const Rows<T>& to, int64_t row, int64_t column, const Octet<T>& octet) {
  if (row >= to.rows || column >= to.columns) return;
  T* at = to.data + row * to.stride + column;
  if (to.octets) {
#pragma unroll
    for (int n = 0; n < Octet<T>::kWords / 4; ++n) store_part(reinterpret_cast<uint4*>(at) + n, octet.part(n));
  } else {
    const int count = static_cast<int>(min(to.columns - column, static_cast<int64_t>(kOctet)));
#pragma unroll
    for (int n = 0; n < kOctet; ++n) {
      if (n < count) store(at + n, octet[n]);
    }
  }
}

// To shared memory, where every octet is aligned.
template <typename P, typename X>
__device__ __forceinline__ void put(P* at, const Octet<X>& octet) {
  const Octet<P> found = converted<P>(octet);
#pragma unroll
  for (int n = 0; n < Octet<P>::kWords / 4; ++n) reinterpret_cast<uint4*>(at)[n] = found.part(n);
}

// Which octet of a tile of kColumns columns is the n-th that this thread moves.
template <int kColumns, int kThreads>
struct Place {
  int row, column;
  __device__ __forceinline__ explicit Place(int n) {
    const int number = static_cast<int>(threadIdx.x) + n * kThreads;
    row = number / (kColumns / kOctet);
    column = number % (kColumns / kOctet) * kOctet;
  }
};

// A tile [rows, columns], columns being a multiple of 8, of which nothing else is asked.
template <int kThreads, typename P>
__device__ __forceinline__ void stage(P* to, int ld, int rows, int columns, const Rows<const P>& from,
                                      int64_t first_row, int64_t first_column) {
  const int across = columns / kOctet;
#pragma unroll 1
  for (int number = static_cast<int>(threadIdx.x); number < rows * across; number += kThreads) {
    const int row = number / across, column = number % across * kOctet;
    put(to + row * ld + column, read(from, first_row + row, first_column + column));
  }
}

// -- dropout ----------------------------------------------------------------------------------------------------------

// As a kernel's parameter; without a seed nothing is dropped.
struct Dropout {
  const int64_t* seed;
  uint32_t least;  // the least half-word that is kept
};

// Which elements of block j are kept, a bit each.
__device__ __forceinline__ uint32_t kept_of_block(uint64_t seed, uint32_t least, uint64_t j) {
  const uint4 words = philox_block(seed, j, 0);
  const uint32_t of_two[4] = {words.x, words.y, words.z, words.w};
  uint32_t bits = 0;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    bits |= static_cast<uint32_t>((of_two[n] & 0xffff) >= least) << (2 * n);
    bits |= static_cast<uint32_t>((of_two[n] >> 16) >= least) << (2 * n + 1);
  }
  return bits;
}

class Mask {
 public:
  __device__ __forceinline__ Mask(const Dropout& dropout, int64_t width)
      : on_(dropout.seed != nullptr),
        seed_(on_ ? static_cast<uint64_t>(load(dropout.seed)) : 0),
        least_(dropout.least),
        width_(width) {}

  // Which elements of an octet of a contiguous [..., width] are kept, a bit each.
  __device__ __forceinline__ uint32_t operator()(int64_t row, int64_t column) const {
    if (!on_) return 0xff;
    const uint64_t index = static_cast<uint64_t>(row * width_ + column);
    const uint32_t shift = static_cast<uint32_t>(index % kOctet);
    uint32_t bits = kept_of_block(seed_, least_, index / kOctet);
    if (shift != 0) bits = (bits | kept_of_block(seed_, least_, index / kOctet + 1) << kOctet) >> shift;
    return bits & 0xff;
  }

 private:
  bool on_;
  uint64_t seed_;
  uint32_t least_;
  int64_t width_;
};

// -- the interpolated B -----------------------------------------------------------------------------------------------

// B [d_out, r] or, with `merged`, B̂ = B₀ + λ (B − B₀). λ is `value` or lies in memory.
template <typename P>
struct Factor {
  Rows<const P> B;
  const P* merged;  // laid out as B
  const float* weight;
  float value;

  __device__ __forceinline__ float lambda() const { return weight == nullptr ? value : load(weight); }

  // An octet of B̂, rounded once.
  __device__ __forceinline__ Octet<P> at(int64_t row, int64_t column, float lambda) const {
    const Octet<P> found = read(B, row, column);
    if (merged == nullptr) return found;
    const Octet<P> before = read(Rows<const P>{merged, B.rows, B.columns, B.stride, B.octets}, row, column);
    float values[kOctet];
#pragma unroll
    for (int n = 0; n < kOctet; ++n) {
      const float from = convert<float>(before[n]);
      values[n] = fmaf(lambda, convert<float>(found[n]) - from, from);
    }
    return Octet<P>::of(values);
  }
};

}  // namespace mbf::cuda::lora
