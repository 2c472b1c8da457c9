// Products of whole matrices by inner loops of our own, on processors whose widest vectors are AVX2's and, with
// AVX-512, on those that Intel has not made.
//
// There the BLAS that torch carries stays an eighth below the multiply-adds that an AMD core can do, and the branch
// has to visit its output again. Here a tile's accumulators begin with the branch, half types are widened on their way
// into the packed operands, and all threads share a product, so that W is packed once for all rows.
//
// An element's sum is taken in blocks of the depth that depend on the depth only, so the bits don't depend on how the
// matrix is cut.
#pragma once

#include "micro.h"
#include "torch.h"

namespace mbf::cpu::gemm {

// A matrix that is read by element strides: fp32, bf16 or fp16.
struct Strided {
  const void* data;
  ScalarType type;
  int64_t row, column;
};

// out [rows, columns] (+)= left [rows, depth] right [depth, columns] + drop(z e) + bias.
struct Product {
  Rows out;
  int64_t rows, columns, depth;
  Rows left;
  Strided right;
  TileStart<float>
      start;  // beside `add`, all of it optional: z [rows, r], e [r, columns] with padded rows, bias [columns]
};

constexpr int64_t kMostRank = 256;  // that scratch is made for

bool usable();

// Whether a product of these sizes is faster so than in the BLAS.
bool worthwhile(int64_t rows, int64_t columns, int64_t depth);

// By all threads.
void multiply(const Product& product);

// Whether the thin products of the branch are faster by these tiles than row against row: where its ranks fill them.
bool projects(int64_t rank);

// The r columns of right [depth, r], for `project`.
Scratch<float> packed(const Strided& right, int64_t depth, int64_t r);

// h [rows, r] = keep(x) right, for a few rows of x. Serial.
void project(const Rows& x, int64_t rows, int64_t depth, const float* packed, int64_t r, const Mask& mask, float* h);

}  // namespace mbf::cpu::gemm

namespace mbf::cpu {

// The same for either type of arithmetic; nothing is ever packed for fp64.
template <typename C>
void project_on(const C* packed, const Rows& x, int64_t rows, int64_t depth, int64_t r, const Mask& mask, C* h) {
  if constexpr (sizeof(C) == 4) gemm::project(x, rows, depth, packed, r, mask, h);
}

}  // namespace mbf::cpu
