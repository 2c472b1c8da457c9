// The Cholesky factor of a small matrix and its inverse, by all threads of a block, in global memory and fp64.
#pragma once

#include "device.h"

namespace mbf::cuda {

constexpr int kCholeskyThreads = 256;
constexpr double kDependent = 1e-13;  // as csrc/cpu/linalg/cholesky.h

// L in place of the lower triangle of G; false where rows depend on one another.
__device__ bool cholesky(double* G, int r) {
  for (int j = 0; j < r; ++j) {
    const double pivot = load(G + j * r + j);
    __syncthreads();
    if (!(pivot >= kDependent * r)) return false;  // the same in all threads
    const double root = sqrt(pivot);
    for (int i = j + static_cast<int>(threadIdx.x); i < r; i += kCholeskyThreads)
      store(G + i * r + j, load(G + i * r + j) / root);
    __syncthreads();
    const int below = r - j - 1;
    for (int n = threadIdx.x; n < below * below; n += kCholeskyThreads) {
      const int i = j + 1 + n / below, k = j + 1 + n % below;
      if (k > i) continue;
      store(G + i * r + k, __fma_rn(-load(G + i * r + j), load(G + k * r + j), load(G + i * r + k)));
    }
    __syncthreads();
  }
  return true;
}

// L⁻¹, a column a thread; returns the thread's share of the squares of L and of L⁻¹, whose rows may be divided by the
// lengths as they're written.
__device__ void invert(const double* L, int r, const double* lengths, double* inverse, double& squares,
                       double& of_inverse) {
  for (int j = threadIdx.x; j < r; j += kCholeskyThreads) {
    for (int i = 0; i < r; ++i) {
      double sum = i == j ? 1.0 : 0.0;
      for (int k = j; k < i; ++k) sum = __fma_rn(-load(L + i * r + k), load(inverse + k * r + j), sum);
      const double number = i < j ? 0.0 : sum / load(L + i * r + i);
      store(inverse + i * r + j, number);
      if (i < j) continue;
      of_inverse = __fma_rn(number, number, of_inverse);
      squares = __fma_rn(load(L + i * r + j), load(L + i * r + j), squares);
    }
    for (int i = j; i < r; ++i) store(inverse + i * r + j, load(inverse + i * r + j) / lengths[j]);
  }
}

}  // namespace mbf::cuda
