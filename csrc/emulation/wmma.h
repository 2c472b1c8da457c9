// nvcuda::wmma of the stand-in: products of 16x16 tiles of half or bfloat16 with sums in fp32.
//
// Lane n holds eight elements of a tile, those of one half of row n / 2; CUDA's order is another, and its own affair. A
// product reads the fragments of the other lanes where they lie, between two meetings of the warp.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda.h"

namespace nvcuda::wmma {

struct row_major;
struct col_major;
struct matrix_a;
struct matrix_b;
struct accumulator;

enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int m, int n, int k, typename T, typename Layout = void>
struct fragment {
  static_assert(m == 16 && n == 16 && k == 16, "the stand-in knows 16x16x16 only");
  static constexpr int num_elements = 8;
  T x[num_elements];
};

namespace stand_in {

constexpr int kLanes = 32, kWarps = 32;
inline const void* handed[2][kWarps][kLanes];

inline int warp() {
  return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) / kLanes;
}
inline int row() { return mbf::emulation::lane() / 2; }
inline int column() { return mbf::emulation::lane() % 2 * 8; }

template <typename T>
void check_place(const T* at, unsigned ld) {
  if (reinterpret_cast<uintptr_t>(at) % 32 != 0) mbf::emulation::fail("a wmma tile that is no multiple of 32 bytes");
  if (ld * sizeof(T) % 16 != 0) mbf::emulation::fail("a wmma tile with rows that are no multiple of 16 bytes apart");
}

inline float wide(__half value) { return __half2float(value); }
inline float wide(__nv_bfloat16 value) { return __bfloat162float(value); }

}  // namespace stand_in

template <typename Fragment, typename T>
void fill_fragment(Fragment& to, T value) {
  for (auto& element : to.x) element = value;
}

template <typename Use, typename T, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& to, const T* at, unsigned ld) {
  stand_in::check_place(at, ld);
  __syncwarp();
  const int row = stand_in::row(), column = stand_in::column();
  for (int e = 0; e < to.num_elements; ++e) {
    to.x[e] = std::is_same_v<Layout, row_major> ? at[row * ld + column + e] : at[(column + e) * ld + row];
  }
}

inline void store_matrix_sync(float* at, const fragment<accumulator, 16, 16, 16, float>& from, unsigned ld,
                              layout_t layout) {
  stand_in::check_place(at, ld);
  __syncwarp();
  const int row = stand_in::row(), column = stand_in::column();
  for (int e = 0; e < from.num_elements; ++e) {
    at[layout == mem_row_major ? row * ld + column + e : (column + e) * ld + row] = from.x[e];
  }
}

// d = a b + c. What passes between the lanes here is not the kernel's memory, so no race of it.
template <typename T, typename LayoutA, typename LayoutB>
__attribute__((noinline, no_sanitize("thread"))) void mma_sync(fragment<accumulator, 16, 16, 16, float>& d,
                                                               const fragment<matrix_a, 16, 16, 16, T, LayoutA>& a,
                                                               const fragment<matrix_b, 16, 16, 16, T, LayoutB>& b,
                                                               const fragment<accumulator, 16, 16, 16, float>& c) {
  const int warp = stand_in::warp(), lane = mbf::emulation::lane();
  stand_in::handed[0][warp][lane] = a.x;
  stand_in::handed[1][warp][lane] = b.x;
  __syncwarp();
  float sums[8];
  for (int e = 0; e < 8; ++e) sums[e] = c.x[e];
  for (int k = 0; k < 16; ++k) {
    const T* left = static_cast<const T*>(stand_in::handed[0][warp][lane / 2 * 2 + k / 8]);
    const T* right = static_cast<const T*>(stand_in::handed[1][warp][2 * k + lane % 2]);
    const float factor = stand_in::wide(left[k % 8]);
    for (int e = 0; e < 8; ++e) sums[e] += factor * stand_in::wide(right[e]);
  }
  __syncwarp();  // until here the others read this lane's fragments
  for (int e = 0; e < 8; ++e) d.x[e] = sums[e];
}

}  // namespace nvcuda::wmma
