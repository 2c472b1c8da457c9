// Cholesky factors of small Gram matrices, serial and in fp64.
#pragma once

#include <cstdint>

namespace mbf::cpu::linalg {

// What is left of a row of unit length after the rows before it are projected out, squared, below which the rows count
// as dependent: about the rounding error of their Gram matrix.
constexpr double kDependent = 1e-13;

// G = L Lᵀ for a Gram matrix G [r, r] of rows of unit length, whole and row-major. Overwrites G with Lᵀ in its upper
// triangle and writes L⁻¹, whole with its zeros, to `inverse`. Returns ‖L‖_F ‖L⁻¹‖_F, which bounds the condition of the
// rows; infinity where a row depends on the rows before it, and then neither is of use.
double factor(double* gram, int64_t r, double* inverse);

}  // namespace mbf::cpu::linalg
