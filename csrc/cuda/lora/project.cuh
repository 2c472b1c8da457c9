// h = drop(x) Aᵀ of [rows, d_in] and [r, d_in].
//
// A block of four warps takes 64 rows of x, a part of the columns and up to 64 ranks. It goes along the columns 64 at
// a time: the thread that loads eight elements of x makes their mask, and puts what is kept into shared memory
// beside the columns of A; a warp multiplies its 16 rows. The part's sums go to a buffer, which sum.cuh adds up in the
// order of the parts. x is read once for every 64 ranks.
#pragma once

#include "dot.cuh"
#include "tile.cuh"

namespace mbf::cuda::lora {

constexpr int kMostRankTiles = 4;  // of a block

template <typename P>
struct ProjectShape {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kRows = kWarps * kTile;
  static constexpr int kColumns = 64;
  static constexpr int kLd = padded_row<P>(kColumns);
  static constexpr size_t shared_bytes(int rank_tiles) { return (kRows + rank_tiles * kTile) * kLd * sizeof(P); }
};

// Rank tiles of the chunk of 64 ranks that this block serves.
__device__ __forceinline__ int rank_tiles(int64_t ranks, int64_t first) {
  const int64_t tiles = (ranks - first + kTile - 1) / kTile;
  return static_cast<int>(tiles < kMostRankTiles ? tiles : kMostRankTiles);
}

// parts [parts, padded rows, padded ranks]; without the factor of dropout. Grid: rows, parts, chunks of ranks.
template <typename X, typename P>
__global__ void __launch_bounds__(ProjectShape<P>::kThreads, 4)
    project_kernel(Rows<const X> x, Rows<const P> A, Dropout dropout, float* parts, int64_t padded_rows,
                   int64_t padded_ranks, int64_t span) {
  using Shape = ProjectShape<P>;
  constexpr int kHeld = Shape::kRows * Shape::kColumns / kOctet / Shape::kThreads;
  MBF_SHARED(P, tile);
  P* factor = tile + Shape::kRows * Shape::kLd;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * Shape::kRows;
  const int64_t first_rank = static_cast<int64_t>(blockIdx.z) * kMostRankTiles * kTile;
  const int tiles = rank_tiles(A.rows, first_rank);
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * span;
  const int64_t end = begin + span < x.columns ? begin + span : x.columns;
  const Mask mask(dropout, x.columns);

  typename Dot<P>::Sum sums[kMostRankTiles];
#pragma unroll
  for (int n = 0; n < kMostRankTiles; ++n) clear(sums[n]);

  for (int64_t column = begin; column < end; column += Shape::kColumns) {
    Octet<X> held[kHeld];
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      const Place<Shape::kColumns, Shape::kThreads> place(n);
      held[n] = read(x, first_row + place.row, column + place.column);
    }
    __syncthreads();  // the tiles before have been used
    stage<Shape::kThreads>(factor, Shape::kLd, tiles * kTile, Shape::kColumns, A, first_rank, column);
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      const Place<Shape::kColumns, Shape::kThreads> place(n);
      held[n].drop(mask(first_row + place.row, column + place.column));
      put(tile + place.row * Shape::kLd + place.column, held[n]);
    }
    __syncthreads();
#pragma unroll 2
    for (int depth = 0; depth < Shape::kColumns; depth += kTile) {
      typename Dot<P>::template Left<row_major> left;
      load_tile(left, tile + warp * kTile * Shape::kLd + depth, Shape::kLd);
#pragma unroll
      for (int n = 0; n < kMostRankTiles; ++n) {
        if (n < tiles) {
          typename Dot<P>::template Right<col_major> right;
          load_tile(right, factor + n * kTile * Shape::kLd + depth, Shape::kLd);
          multiply_add(sums[n], left, right);
        }
      }
    }
  }

  float* to = parts + (blockIdx.y * padded_rows + first_row + warp * kTile) * padded_ranks + first_rank;
#pragma unroll
  for (int n = 0; n < kMostRankTiles; ++n) {
    if (n < tiles) store_tile_global(to + n * kTile, sums[n], padded_ranks, wmma::mem_row_major);
  }
}

}  // namespace mbf::cuda::lora
