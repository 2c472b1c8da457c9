// The inner loops for AVX2, FMA and F16C.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "micro.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

namespace mbf::cpu {
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
}  // namespace mbf::cpu

#pragma GCC target("avx2,fma,f16c,bmi2")
#define MBF_ISA avx2
#define MBF_BYTES 32
#define MBF_TILE_ROWS 4
#define MBF_TILE_VECTORS 3
#define MBF_DOT_RANKS 4
#define MBF_GEMM_ROWS 6
#define MBF_GEMM_VECTORS 2
#include "micro/table.h"
// What the table is made of serves products of whole matrices, too.
#include "micro/gemm.h"
#endif
