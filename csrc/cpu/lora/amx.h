// Products of fp32 matrices on the bf16 tiles of a processor that has them (AMX), to fp32 accuracy.
//
// An fp32 number is the sum of three bf16 ones, 8 bits of the significand each; of the nine products of the parts of
// two numbers the six above 2^-24 are summed in fp32. That is six times the multiplications at sixteen times their
// speed. The error is below that of BLAS, at any depth. Infinities come out as NaN; parts below 2^-126 count as zero.
//
// An element's sum is taken in an order that depends on k only, so the bits don't depend on how the matrix is cut.
#pragma once

#include <cstdint>

namespace mbf::cpu::amx {

// A matrix that is read by element strides, one of which must be 1.
struct Strided {
  const float* data;
  int64_t row, column;
};

// Whether processor and system have tiles; ATEN_CPU_CAPABILITY below AVX-512 and ONEDNN_MAX_CPU_ISA say no to them.
bool usable();

// Whether a product of these sizes is faster on tiles than in the BLAS.
bool worthwhile(int64_t m, int64_t n, int64_t k);

// out [m, n] (+)= left [m, k] right [k, n]; left's columns lie side by side. Serial.
void multiply(float* out, int64_t ldo, int64_t m, int64_t n, int64_t k, Strided left, Strided right, bool add);

}  // namespace mbf::cpu::amx
