// out = base + s · keep ⊙ (z F) for z [rows, r], F [r, columns] being B̂ᵀ or A, and in the same pass dA = zᵀ drop(x).
//
// That is y += s z B̂ᵀ of the forward pass, and dx += drop(dh A) with dA of the backward one. A block takes
// a stripe of the columns, whose F stays in shared memory with all ranks, and goes down its part of the rows. A
// thread moves the same octets of x and of out, so it makes their mask once. dA of the stripe stays in registers. The
// product's tiles go through shared memory, fp32, where x's tile was, so that out is read and written by 16 bytes and
// rounded once; what it had is on its way meanwhile. More ranks make the stripe narrower, as F and dA's sums must find
// room.
#pragma once

#include "outer.cuh"
#include "tile.cuh"

namespace mbf::cuda::lora {

// kRankTiles: 4 or 16.
template <typename P, int kRankTiles>
struct ExpandShape {
  static constexpr int kWarps = kRankTiles == 16 && sizeof(P) == 4 ? 4 : 8, kThreads = kWarps * kWarp;
  static constexpr int kRowTiles = kRankTiles == 16 && sizeof(P) == 2 ? 4 : 2, kRows = kRowTiles * kTile;
  static constexpr int kColumns = kRankTiles == 4 ? 128 : 32;
  static constexpr int kLd = padded_row<P>(kColumns), kOutLd = padded_row<float>(kColumns);
  static constexpr int kRankLd = padded_row<P>(kRankTiles * kTile);
  // Warps stand side by side across the stripe, a tile's columns each, in groups that share out dA's ranks, out's rows.
  static constexpr int kAcross = kColumns / kTile, kGroups = kWarps / kAcross;
  static constexpr int kWarpRanks = kRankTiles / kGroups;
  static constexpr size_t kTileBytes =
      kRows * (kLd * sizeof(P) > kOutLd * sizeof(float) ? kLd * sizeof(P) : kOutLd * sizeof(float));
  static constexpr size_t shared_bytes(int tiles) {  // at most 96 KiB, of which sm_86 and sm_89 have no more than 99
    return kTileBytes + (tiles * kTile * kLd + kRows * kRankLd) * sizeof(P);
  }
};

// As a kernel's parameter.
template <typename X, typename P>
struct Expansion {
  Rows<const P> z;
  Rows<const P> A;  // F; where it has no data, F is the transpose of `factor`
  Factor<P> factor;
  Rows<const X> base;  // without rows it counts as zero
  Rows<X> out;         // where it has no data, only dA is asked
  float scale;
  Rows<const X> x;
  Dropout dropout;
  float* dA;  // [parts, padded ranks, padded columns], without the factor of dropout
  int64_t padded_ranks, padded_columns;
  int64_t columns, span;
};

// F of the block's columns.
template <typename X, typename P, int kRankTiles>
__device__ __forceinline__ void stage_factor(P* to, const Expansion<X, P>& e, int tiles, int64_t first_column) {
  using Shape = ExpandShape<P, kRankTiles>;
  if (e.A.data != nullptr) {
    return stage<Shape::kThreads>(to, Shape::kLd, tiles * kTile, Shape::kColumns, e.A, 0, first_column);
  }
  const float lambda = e.factor.lambda();
  const int octets = Shape::kColumns * tiles * kTile / kOctet;
  for (int number = static_cast<int>(threadIdx.x); number < octets; number += Shape::kThreads) {
    const int column = number % Shape::kColumns, rank = number / Shape::kColumns * kOctet;
    const Octet<P> found = e.factor.at(first_column + column, rank, lambda);
#pragma unroll
    for (int n = 0; n < kOctet; ++n) to[(rank + n) * Shape::kLd + column] = found[n];
  }
}

// z F of the row tile, to shared memory.
template <typename P, int kRankTiles>
__device__ __forceinline__ void multiply(const P* z, const P* factor, int tiles, float* to) {
  using Shape = ExpandShape<P, kRankTiles>;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int column = warp % Shape::kAcross * kTile;
#pragma unroll 1
  for (int m = warp / Shape::kAcross; m < Shape::kRowTiles; m += Shape::kGroups) {
    typename Dot<P>::Sum sum;
    clear(sum);
    for (int n = 0; n < tiles; ++n) {
      typename Dot<P>::template Left<row_major> left;
      typename Dot<P>::template Right<row_major> right;
      load_tile(left, z + m * kTile * Shape::kRankLd + n * kTile, Shape::kRankLd);
      load_tile(right, factor + n * kTile * Shape::kLd + column, Shape::kLd);
      multiply_add(sum, left, right);
    }
    store_tile(to + m * kTile * Shape::kOutLd + column, sum, Shape::kOutLd, wmma::mem_row_major);
  }
}

// base + s · keep ⊙ product, to out.
template <typename X, typename P>
__device__ __forceinline__ void write_out(const Expansion<X, P>& e, int64_t row, int64_t column, const Octet<X>& octet,
                                          const float* product, uint32_t keep) {
  float values[kOctet];
#pragma unroll
  for (int n = 0; n < kOctet; ++n) {
    const float more = e.scale * product[n];
    values[n] = convert<float>(octet[n]) + (keep >> n & 1 ? more : 0.0f);
  }
  write(e.out, row, column, Octet<X>::of(values));
}

// Grid: stripes, parts of the rows.
template <typename X, typename P, int kRankTiles, bool kOuter>
__global__ void __launch_bounds__(ExpandShape<P, kRankTiles>::kThreads, 2) expand_kernel(Expansion<X, P> e) {
  using Shape = ExpandShape<P, kRankTiles>;
  constexpr int kHeld = Shape::kRows * Shape::kColumns / kOctet / Shape::kThreads;
  static_assert(kHeld <= 4, "the masks of a thread's octets lie in one word");
  MBF_SHARED(unsigned char, shared);
  const int tiles = static_cast<int>((e.z.columns + kTile - 1) / kTile);
  P* tile = reinterpret_cast<P*>(shared);
  float* product = reinterpret_cast<float*>(shared);
  P* factor = reinterpret_cast<P*>(shared + Shape::kTileBytes);
  P* z_tile = factor + tiles * kTile * Shape::kLd;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, group = warp / Shape::kAcross;
  const int warp_column = warp % Shape::kAcross * kTile;
  const int warp_rank = group * Shape::kWarpRanks;  // tiles
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * Shape::kColumns;
  const Mask mask(e.dropout, e.columns);
  if (e.out.data != nullptr) stage_factor<X, P, kRankTiles>(factor, e, tiles, first_column);

  typename Dot<P>::Sum sums[kOuter ? Shape::kWarpRanks : 1][1];
  if constexpr (kOuter) {
#pragma unroll
    for (int n = 0; n < Shape::kWarpRanks; ++n) clear(sums[n][0]);
  }

  const int64_t begin = static_cast<int64_t>(blockIdx.y) * e.span;
  const int64_t end = begin + e.span < e.z.rows ? begin + e.span : e.z.rows;
  for (int64_t row = begin; row < end; row += Shape::kRows) {
    Octet<X> held[kHeld];  // of x where dA is asked; of base in the end
    uint32_t keep = 0;
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      const Place<Shape::kColumns, Shape::kThreads> place(n);
      held[n] = read(kOuter ? e.x : e.base, row + place.row, first_column + place.column);
    }
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      const Place<Shape::kColumns, Shape::kThreads> place(n);
      keep |= mask(row + place.row, first_column + place.column) << (8 * n);
    }
    __syncthreads();  // the tiles before have been used
    stage<Shape::kThreads>(z_tile, Shape::kRankLd, Shape::kRows, tiles * kTile, e.z, row, 0);
    if constexpr (kOuter) {
#pragma unroll
      for (int n = 0; n < kHeld; ++n) {
        const Place<Shape::kColumns, Shape::kThreads> place(n);
        held[n].drop(keep >> (8 * n));
        put(tile + place.row * Shape::kLd + place.column, held[n]);
      }
    }
    __syncthreads();
    if constexpr (kOuter) {
      add_outer<Shape::kRowTiles>(sums, z_tile + warp_rank * kTile, Shape::kRankLd, tiles - warp_rank,
                                  tile + warp_column, Shape::kLd);
      if (e.out.data == nullptr) continue;
#pragma unroll
      for (int n = 0; n < kHeld; ++n) {
        const Place<Shape::kColumns, Shape::kThreads> place(n);
        held[n] = read(e.base, row + place.row, first_column + place.column);
      }
      __syncthreads();  // the product takes the place of x
    }
    multiply<P, kRankTiles>(z_tile, factor, tiles, product);
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      const Place<Shape::kColumns, Shape::kThreads> place(n);
      write_out(e, row + place.row, first_column + place.column, held[n],
                product + place.row * Shape::kOutLd + place.column, keep >> (8 * n));
    }
  }

  if constexpr (kOuter) {
    float* to =
        e.dA + (blockIdx.y * e.padded_ranks + warp_rank * kTile) * e.padded_columns + first_column + warp_column;
#pragma unroll
    for (int n = 0; n < Shape::kWarpRanks; ++n) {
      if (n < tiles - warp_rank) {
        store_tile_global(to + n * kTile * e.padded_columns, sums[n][0], e.padded_columns, wmma::mem_row_major);
      }
    }
  }
}

}  // namespace mbf::cuda::lora
