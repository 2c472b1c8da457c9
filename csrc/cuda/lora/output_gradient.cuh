// One pass over dy [rows, d_out] for shares of dz = dy B̂ and dB̂ = dyᵀ z, both without s.
//
// A block of eight warps takes a stripe of the columns and up to 64 ranks, and goes down its part of the rows, 16 at a
// time. B̂ of its columns stays in shared memory. dB̂ of its columns stays in registers: a warp has some columns, all
// ranks. A row's dz is a sum over columns, so the block's share of it goes to a buffer of the stripes; the eight warps
// share out its 16x16 tiles and the columns. sum.cuh adds up both kinds of shares in their order. The wider the stripe,
// the smaller dz's shares beside dy; with up to 16 ranks it can be twice as wide.
#pragma once

#include "outer.cuh"
#include "project.cuh"

namespace mbf::cuda::lora {

// kRankTiles: 1 or 4.
template <typename P, int kRankTiles>
struct OutputShape {
  static constexpr int kWarps = 8, kThreads = kWarps * kWarp;
  static constexpr int kRows = kTile;
  static constexpr int kWarpColumns = (kRankTiles == 1 ? 4 : 2) * 2 / static_cast<int>(sizeof(P));  // tiles
  static constexpr int kColumns = kWarps * kWarpColumns * kTile;
  static constexpr int kLd = padded_row<P>(kColumns), kRankLd = padded_row<P>(kRankTiles * kTile);
  static constexpr int kSplits = kWarps / kRankTiles;  // of dz's columns among the warps
  static constexpr int kDepth = kColumns / kSplits;
  static constexpr size_t kSharedBytes =
      (kColumns * kRankLd + kRows * (kLd + kRankLd)) * sizeof(P) + kWarps * kTile * kTile * sizeof(float);
};

// This warp's 16x16 tile of dz's share, over its part of the columns, to its place in `shares`.
template <typename P, int kRankTiles>
__device__ __forceinline__ void share_of_dz(const P* dy, const P* B, int tiles, float* shares) {
  using Shape = OutputShape<P, kRankTiles>;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int tile = warp % kRankTiles, first = warp / kRankTiles * Shape::kDepth;
  if (tile >= tiles) return;
  typename Dot<P>::Sum sum;
  clear(sum);
  dy += first;
  B += first * Shape::kRankLd + tile * kTile;
#pragma unroll 1
  for (int depth = 0; depth < Shape::kDepth; depth += kTile) {
    typename Dot<P>::template Left<row_major> left;
    typename Dot<P>::template Right<row_major> right;
    load_tile(left, dy + depth, Shape::kLd);
    load_tile(right, B + depth * Shape::kRankLd, Shape::kRankLd);
    multiply_add(sum, left, right);
  }
  store_tile(shares + warp * kTile * kTile, sum, kTile, wmma::mem_row_major);
}

// The sum of the warps' shares of each element of dz, to row 0 and rank 0 of `to`.
template <typename P, int kRankTiles>
__device__ __forceinline__ void write_dz(const float* shares, int tiles, float* to, int64_t ld) {
  using Shape = OutputShape<P, kRankTiles>;
#pragma unroll 1
  for (int number = static_cast<int>(threadIdx.x); number < Shape::kRows * tiles * kTile; number += Shape::kThreads) {
    const int row = number / (tiles * kTile), rank = number % (tiles * kTile);
    const float* at = shares + rank / kTile * kTile * kTile + row * kTile + rank % kTile;
    float total = at[0];
#pragma unroll
    for (int split = 1; split < Shape::kSplits; ++split) total += at[split * kRankTiles * kTile * kTile];
    store(to + row * ld + rank, total);
  }
}

// dz [stripes, padded rows, padded ranks] and dB [parts, padded columns, padded ranks], null where not asked; rows are
// padded to kRows, columns to kColumns. Grid: stripes, parts, chunks of ranks.
template <typename X, typename P, int kRankTiles>
__global__ void __launch_bounds__(OutputShape<P, kRankTiles>::kThreads, 2)
    output_gradient_kernel(Rows<const X> dy, Rows<const P> z, Factor<P> factor, float* dz, float* dB,
                           int64_t padded_rows, int64_t padded_columns, int64_t padded_ranks, int64_t span) {
  using Shape = OutputShape<P, kRankTiles>;
  constexpr int kHeld = Shape::kRows * Shape::kColumns / kOctet / Shape::kThreads;
  MBF_SHARED(P, B);
  P* tile = B + Shape::kColumns * Shape::kRankLd;
  P* z_tile = tile + Shape::kRows * Shape::kLd;
  float* shares = reinterpret_cast<float*>(z_tile + Shape::kRows * Shape::kRankLd);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * Shape::kColumns;
  const int64_t first_rank = static_cast<int64_t>(blockIdx.z) * kRankTiles * kTile;
  const int all_tiles = rank_tiles(factor.B.columns, first_rank);
  const int tiles = all_tiles < kRankTiles ? all_tiles : kRankTiles;

  if (dz != nullptr) {
    const float lambda = factor.lambda();
    const int across = tiles * kTile / kOctet;
#pragma unroll 1
    for (int number = static_cast<int>(threadIdx.x); number < Shape::kColumns * across; number += Shape::kThreads) {
      const int column = number / across, rank = number % across * kOctet;
      put(B + column * Shape::kRankLd + rank, factor.at(first_column + column, first_rank + rank, lambda));
    }
  }

  typename Dot<P>::Sum sums[kRankTiles][Shape::kWarpColumns];
#pragma unroll
  for (int n = 0; n < kRankTiles; ++n) {
#pragma unroll
    for (int c = 0; c < Shape::kWarpColumns; ++c) clear(sums[n][c]);
  }

  const int64_t begin = static_cast<int64_t>(blockIdx.y) * span;
  const int64_t end = begin + span < dy.rows ? begin + span : dy.rows;
  for (int64_t row = begin; row < end; row += Shape::kRows) {
    Octet<X> held[kHeld];
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      const Place<Shape::kColumns, Shape::kThreads> place(n);
      held[n] = read(dy, row + place.row, first_column + place.column);
    }
    __syncthreads();  // the tiles before have been used
    if (dB != nullptr) {
      stage<Shape::kThreads>(z_tile, Shape::kRankLd, Shape::kRows, tiles * kTile, z, row, first_rank);
    }
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      const Place<Shape::kColumns, Shape::kThreads> place(n);
      put(tile + place.row * Shape::kLd + place.column, held[n]);
    }
    __syncthreads();
    if (dB != nullptr) {
      const P* own = tile + warp * Shape::kWarpColumns * kTile;
      add_outer<1>(sums, z_tile, Shape::kRankLd, tiles, own, Shape::kLd);
    }
    if (dz != nullptr) {
      share_of_dz<P, kRankTiles>(tile, B, tiles, shares);
      __syncthreads();
      write_dz<P, kRankTiles>(shares, tiles, dz + (blockIdx.x * padded_rows + row) * padded_ranks + first_rank,
                              padded_ranks);
    }
  }

  if (dB == nullptr) return;
  float* to = dB + (blockIdx.y * padded_columns + first_column + warp * Shape::kWarpColumns * kTile) * padded_ranks +
              first_rank;
#pragma unroll
  for (int n = 0; n < kRankTiles; ++n) {
#pragma unroll
    for (int c = 0; c < Shape::kWarpColumns; ++c) {
      if (n < tiles) {
        store_tile_global(to + c * kTile * padded_ranks + n * kTile, sums[n][c], padded_ranks, wmma::mem_col_major);
      }
    }
  }
}

}  // namespace mbf::cuda::lora
