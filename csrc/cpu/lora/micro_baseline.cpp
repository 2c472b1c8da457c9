// The inner loops for any processor: 128-bit vectors, which every compiler knows how to lower.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "micro.h"

namespace mbf::cpu {
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
}  // namespace mbf::cpu

#define MBF_ISA baseline
#define MBF_BYTES 16
#define MBF_TILE_ROWS 4
#define MBF_TILE_VECTORS 2
#define MBF_DOT_RANKS 4
#include "micro/table.h"
