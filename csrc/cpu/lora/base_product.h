// The frozen product of a layer and its derivative where the branch is a pass of its own, by the fastest means there is
// for the sizes: the processor's tiles (amx.h), one pass over W for a single row, BLAS for all else. Products that
// begin with the branch are gemm.h's.
#pragma once

#include "torch.h"

namespace mbf::cpu {

// Whether a base product y [m, n] of depth k, or its derivative, has the same bits however it is cut.
bool cuts_freely(ScalarType type, int64_t m, int64_t n, int64_t k);

// Whether the one row goes through W by the kernels of the branch, which read W as they do their packed factors: fp32,
// in rows of whole vectors.
bool is_one_row(int64_t rows, const Tensor& weight);

// Who computes a product: the calling thread, which has a tile to itself, or all threads.
enum class By { kThis, kAll };

// y = x Wᵀ + b and dx (+)= dy W.
void base_product(const Tensor& y, const Tensor& x, const Tensor& weight, const MaybeTensor& bias, By threads);
void base_gradient(const Tensor& dx, const Tensor& dy, const Tensor& weight, bool add, By threads);

}  // namespace mbf::cpu
