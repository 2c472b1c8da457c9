// zᵀ x of tiles in shared memory, summed in a warp's registers: what dA = dhᵀ drop(x) and dB̂ᵀ = zᵀ dy have in common.
#pragma once

#include "dot.cuh"

namespace mbf::cuda::lora {

// sums[n][c] += tile n of the first `tiles` of zᵀ times tile c of x; z [rows, ranks] and x [rows, columns] begin at the
// warp's own ranks and columns.
template <int kRowTiles, typename P, int kRankTiles, int kColumnTiles>
__device__ __forceinline__ void add_outer(typename Dot<P>::Sum (&sums)[kRankTiles][kColumnTiles], const P* z, int z_ld,
                                          int tiles, const P* x, int x_ld) {
#pragma unroll 1
  for (int m = 0; m < kRowTiles; ++m) {
    typename Dot<P>::template Right<row_major> right[kColumnTiles];
#pragma unroll
    for (int c = 0; c < kColumnTiles; ++c) load_tile(right[c], x + m * kTile * x_ld + c * kTile, x_ld);
#pragma unroll
    for (int n = 0; n < kRankTiles; ++n) {
      if (n < tiles) {
        typename Dot<P>::template Left<col_major> left;
        load_tile(left, z + m * kTile * z_ld + n * kTile, z_ld);
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c) multiply_add(sums[n][c], left, right[c]);
      }
    }
  }
}

}  // namespace mbf::cuda::lora
