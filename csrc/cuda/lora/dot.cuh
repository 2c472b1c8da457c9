// Products of 16x16 tiles in shared memory by a warp: on tensor cores for half and bfloat16, by FMA for fp32.
//
// Both have the same face. An operand is loaded into Left (of 16 rows and a depth of 16) or Right (a depth of 16 and 16
// columns), whose layout is that of the memory; multiply_add adds their product to a Sum, which is fp32.
#pragma once

#include "../device.h"
#ifdef MBF_EMULATION
#include "../../emulation/wmma.h"
#else
#include <mma.h>
#endif

namespace mbf::cuda::lora {

namespace wmma = nvcuda::wmma;
using wmma::col_major;
using wmma::row_major;

constexpr int kTile = 16;

// Elements between rows of a tile in shared memory: 16 bytes more than the columns, so that the rows that are read
// together begin in different banks.
template <typename P>
__host__ __device__ constexpr int padded_row(int columns) {
  return columns + 16 / static_cast<int>(sizeof(P));
}

// -- half and bfloat16 ------------------------------------------------------------------------------------------------

template <typename P>
struct Dot {
  template <typename Layout>
  using Left = wmma::fragment<wmma::matrix_a, kTile, kTile, kTile, P, Layout>;
  template <typename Layout>
  using Right = wmma::fragment<wmma::matrix_b, kTile, kTile, kTile, P, Layout>;
  using Sum = wmma::fragment<wmma::accumulator, kTile, kTile, kTile, float>;
};

template <typename Sum>
__device__ __forceinline__ void clear(Sum& sum) {
  wmma::fill_fragment(sum, 0.0f);
}

template <typename Fragment, typename P>
__device__ __forceinline__ void load_tile(Fragment& to, const P* at, int ld) {
  wmma::load_matrix_sync(to, at, ld);
}

template <typename Sum, typename Left, typename Right>
__device__ __forceinline__ void multiply_add(Sum& sum, const Left& left, const Right& right) {
  wmma::mma_sync(sum, left, right, sum);
}

template <typename Sum>
__device__ __forceinline__ void store_tile(float* at, const Sum& sum, int ld, wmma::layout_t layout) {
  wmma::store_matrix_sync(at, sum, ld, layout);
}

// -- fp32 -------------------------------------------------------------------------------------------------------------

// An operand stays where it is.
template <typename Layout>
struct InPlace {
  const float* at;
  int ld;
};

// Of lane n: rows n / 4 and n / 4 + 8, and four columns from 4 (n % 4) on.
struct FloatSum {
  float x[2][4];
};

template <>
struct Dot<float> {
  template <typename Layout>
  using Left = InPlace<Layout>;
  template <typename Layout>
  using Right = InPlace<Layout>;
  using Sum = FloatSum;
};

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

__device__ __forceinline__ void clear(FloatSum& sum) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sum.x[i][j] = 0.0f;
  }
}

template <typename Layout>
__device__ __forceinline__ void load_tile(InPlace<Layout>& to, const float* at, int ld) {
  to = {at, ld};
}

// Four numbers that follow each other from (row, column) on along the direction of the layout, or across it.
template <typename Layout>
__device__ __forceinline__ void four(float (&to)[4], const InPlace<Layout>& from, int row, int column, bool down) {
  constexpr bool kByRows = std::is_same_v<Layout, row_major>;
  const float* at = from.at + (kByRows ? row * from.ld + column : column * from.ld + row);
  if (down != kByRows) {
    const float4 found = *reinterpret_cast<const float4*>(at);
    to[0] = found.x, to[1] = found.y, to[2] = found.z, to[3] = found.w;
  } else {
#pragma unroll
    for (int n = 0; n < 4; ++n) to[n] = at[n * from.ld];
  }
}

template <typename LayoutLeft, typename LayoutRight>
__device__ __forceinline__ void multiply_add(FloatSum& sum, const InPlace<LayoutLeft>& left,
                                             const InPlace<LayoutRight>& right) {
  constexpr bool kRightByRows = std::is_same_v<LayoutRight, row_major>;
  const int row = lane() / 4, column = lane() % 4 * 4;
#pragma unroll
  for (int depth = 0; depth < kTile; depth += 4) {
    float a[2][4], b[4][4];  // b: [depth][column], or its transpose as memory has it
#pragma unroll
    for (int i = 0; i < 2; ++i) four(a[i], left, row + 8 * i, depth, false);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      four(b[n], right, depth + (kRightByRows ? n : 0), column + (kRightByRows ? 0 : n), !kRightByRows);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum.x[i][j] = fmaf(a[i][k], kRightByRows ? b[k][j] : b[j][k], sum.x[i][j]);
      }
    }
  }
}

__device__ __forceinline__ void store_tile(float* at, const FloatSum& sum, int ld, wmma::layout_t layout) {
  const int row = lane() / 4, column = lane() % 4 * 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int r = row + 8 * i, c = column + j;
      at[layout == wmma::mem_row_major ? r * ld + c : c * ld + r] = sum.x[i][j];
    }
  }
}

// -- both -------------------------------------------------------------------------------------------------------------

// store_tile to global memory, at most 16 rows or columns of 2^26 elements.
template <typename Sum>
__device__ __forceinline__ void store_tile_global(float* at, const Sum& sum, int64_t ld, wmma::layout_t layout) {
#ifdef MBF_EMULATION
  emulation::stored(at, kTile * kTile / kWarp * sizeof(float), alignof(float));  // the lane's share
#endif
  store_tile(at, sum, static_cast<int>(ld), layout);
}

}  // namespace mbf::cuda::lora
