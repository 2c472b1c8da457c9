// The inner loops for AVX-512 (F, BW, DQ, VL).

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "micro.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

namespace mbf::cpu {
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
}  // namespace mbf::cpu

// Without a mask GCC 12 passes its own intrinsics an undefined vector, and warns of it.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#define MBF_ISA avx512
#define MBF_BYTES 64
#define MBF_TILE_ROWS 8
#define MBF_TILE_VECTORS 3
#define MBF_DOT_RANKS 8
#define MBF_GEMM_ROWS 12
#define MBF_GEMM_VECTORS 2
#include "micro/table.h"
// What the table is made of serves products of whole matrices, too.
#include "micro/gemm.h"
#endif
