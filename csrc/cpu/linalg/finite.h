// Numbers of any dtype that are or aren't finite.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace mbf::cpu {

// n contiguous numbers of fp64, fp32, bf16 or fp16.
bool all_finite(const void* numbers, torch::headeronly::ScalarType type, int64_t n);

// NaN in their place.
void fill_nan(void* numbers, torch::headeronly::ScalarType type, int64_t n);

}  // namespace mbf::cpu
