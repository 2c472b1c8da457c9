// Sums over the threads of a warp and of a block, in a fixed order.
#pragma once

#include "device.h"

namespace mbf::cuda {

// In every lane.
__device__ __forceinline__ double sum_of_warp(double value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
}

// In every thread: a tree over each warp, then the warps in order. `of_warps` is shared memory, which may be used again
// at once.
template <int kWarps>
__device__ __forceinline__ double sum_of_block(double value, double (&of_warps)[kWarps]) {
  value = sum_of_warp(value);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0.0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += of_warps[warp];
  return sum;
}

}  // namespace mbf::cuda
