// Many tensors as one range of pieces, a block for each; the table of tensors travels by value in a kernel's
// parameters.
#pragma once

#include <cstdint>

#include "device.h"

namespace mbf::cuda {

constexpr int kPiece = 8192;  // elements

inline int64_t pieces_of(int64_t elements) { return (elements + kPiece - 1) / kPiece; }

// The entry of a table that holds a piece of the launch: the last that does not begin after it.
template <typename Entry>
__device__ __forceinline__ int entry_of(const Entry* entries, int64_t count, int64_t piece) {
  int low = 0, high = static_cast<int>(count);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (entries[middle].first_piece <= piece) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// How many elements of a tensor are in its piece that starts at `begin`.
__device__ __forceinline__ int size_of_piece(int64_t size, int64_t begin) {
  return static_cast<int>(size - begin < kPiece ? size - begin : kPiece);
}

}  // namespace mbf::cuda
