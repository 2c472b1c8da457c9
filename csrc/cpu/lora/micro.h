// The inner loops of the low-rank branch, one table of functions an instruction set, chosen at run time.
//
// All matrices are row-major with a leading dimension in elements. C is the type of the arithmetic and of what is
// packed, scratch or gradient (fp32, or fp64 where an operand is fp64); activations are read and written in their own
// type. The order in which a sum is taken depends on the shapes and the instruction set only.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "../philox.h"

namespace mbf::cpu {

// An activation matrix where it lies: fp32, bf16 or fp16 for C = float, fp64 for C = double.
struct Rows {
  void* data;
  torch::headeronly::ScalarType type;
  int64_t ld;

  Rows at(int64_t row) const;
};

// Which elements dropout keeps, as bits: element (t, i) is bit `first + t * ld + i` of the stream. The stream must be
// readable for eight bytes beyond its last bit. No stream: everything is kept.
struct Mask {
  const uint8_t* bits = nullptr;
  int64_t first = 0;
  int64_t ld = 0;
};

// Rows that will be read next, to be fetched meanwhile.
struct Ahead {
  const char* next = nullptr;
  int64_t stride = 0, rows = 0;  // bytes from row to row, and how many are left
  int64_t size = 0;              // bytes of an element

  // One row more, or where there is none, memory that is in the caches anyway.
  const char* take(const char* otherwise) {
    if (rows == 0) return otherwise;
    const char* row = next;
    next += stride;
    --rows;
    return row;
  }
};

constexpr int64_t kTrianglePanel = 4;  // rows of a triangle that are taken as a rectangle

template <typename C>
struct Micro {
  int64_t lanes;  // packed rows are zero-padded to a multiple of it

  // h[t, j] = Σ_i keep(t, i) x[t, i] a[j, i]  for t < rows, j < r; a's rows are padded.
  void (*project)(Rows x, int64_t rows, int64_t columns, const C* a, int64_t lda, int64_t r, Mask mask, C* h);

  // y[t, :] (+)= keep(t, :) ⊙ Σ_j z[t, j] e[j, :]; e's rows are padded. `add` false overwrites y.
  void (*expand)(Rows y, int64_t rows, int64_t columns, const C* z, int64_t r, const C* e, int64_t lde, Mask mask,
                 bool add);

  // g[j, :] (+)= Σ_t z[t, j] keep(t, :) ⊙ x[t, :]. `add` false overwrites g. What is ahead begins with x's first
  // column.
  void (*outer)(Rows x, int64_t rows, int64_t columns, const C* z, int64_t r, Mask mask, Ahead ahead, C* g, int64_t ldg,
                bool add);

  // g[i, j] += Σ_k x[i, k] x[j, k] for j ≤ i < r, and some above the diagonal; columns a multiple of lanes.
  void (*gram)(const C* x, int64_t r, int64_t columns, int64_t ld, Ahead ahead, double* g);

  // Rows of q = T x for a lower triangle T [r, r], x's rows padded, q not over x; both from the same column on. T
  // comes in panels of kTrianglePanel rows, each as many numbers a row as the panel is deep. Where q can be written
  // past the caches and this is asked, other threads may see it only after streamed().
  void (*triangle)(const C* panels, int64_t r, const C* x, int64_t ldx, int64_t columns, Rows q, bool past_caches);

  // The bits of `blocks` blocks of eight elements from block `first` of Philox on; see mbf/ops/philox.py.
  void (*mask_bits)(uint64_t seed, uint32_t threshold, uint64_t first, int64_t blocks, uint8_t* bits);

  // n contiguous elements to C and back.
  void (*widen)(const void* from, torch::headeronly::ScalarType type, int64_t n, C* to);
  void (*narrow)(const C* from, int64_t n, void* to, torch::headeronly::ScalarType type);

  // Gated activations of an MLP, n contiguous elements of C: a = act(g) u, and dg, du from da. Outputs may be inputs.
  void (*gated)(const C* g, const C* u, int64_t n, bool gelu, C* a);
  void (*gated_backward)(const C* da, const C* g, const C* u, int64_t n, bool gelu, C* dg, C* du);

  // Of MoRA, n contiguous elements each: v = keep(v) times factor; (a, b) = (a cos − b sin, b cos + a sin);
  // out = y + v times factor, for y and out of one type.
  void (*keep)(C* v, int64_t n, Mask mask, C factor);
  void (*turn)(C* a, C* b, int64_t n, const C* cosine, const C* sine);
  void (*add)(const void* y, torch::headeronly::ScalarType type, const C* v, C factor, int64_t n, void* out);
};

// What a tile of a product begins with, and whether it is added to the output. Pointers are to the tile's own columns.
template <typename C>
struct TileStart {
  const C* z = nullptr;  // [rows, r]
  int64_t r = 0;         // 0: no branch
  const C* e = nullptr;  // [r, columns]
  int64_t lde = 0;
  Mask mask;
  const C* bias = nullptr;
  bool add = false;
};

// The inner loops of products of whole matrices (gemm.h).
struct GemmLoops {
  int64_t rows, columns;  // of a tile; right is packed in slivers of so many columns

  // Columns of right [depth, columns], read by element strides, as slivers padded with zeros.
  void (*pack)(const void* right, torch::headeronly::ScalarType type, int64_t row, int64_t column, int64_t columns,
               int64_t depth, float* to);

  // What the mask keeps of rows of an activation matrix, as fp32.
  void (*copy)(Rows from, int64_t rows, int64_t columns, Mask mask, float* to, int64_t ld);

  // out [rows, a sliver] = start + left [rows, depth] sliver. Beyond left's last row its number of numbers is fetched.
  void (*multiply)(const float* left, int64_t ldl, int64_t rows, const float* sliver, int64_t depth, float* out,
                   int64_t ldo, const TileStart<float>& start);
};

namespace baseline {
template <typename C>
const Micro<C>& micro();
}
namespace avx2 {
template <typename C>
const Micro<C>& micro();
const GemmLoops& gemm_loops();
}  // namespace avx2
namespace avx512 {
template <typename C>
const Micro<C>& micro();
const GemmLoops& gemm_loops();
}  // namespace avx512

// The best table for this machine. ATEN_CPU_CAPABILITY=default or avx2 lowers it, as it does torch's own kernels.
template <typename C>
const Micro<C>& micro();

// The loops of gemm.h for the same instruction set; null where the BLAS is left to it.
const GemmLoops* gemm_loops();

// The table's instruction set, as it is called.
const char* instruction_set();

// Whether the processor multiplies matrices of this half type itself (AVX512-BF16 or AMX; AVX512-FP16 or AMX).
bool multiplies_natively(torch::headeronly::ScalarType type);

inline int64_t element_size(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

inline Rows Rows::at(int64_t row) const { return {static_cast<char*>(data) + row * ld * element_size(type), type, ld}; }

}  // namespace mbf::cpu
