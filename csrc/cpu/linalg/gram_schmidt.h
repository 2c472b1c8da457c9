// Orthonormal rows by Gram and Schmidt, every projection twice, for what Cholesky QR gives up: slow and always right.
#pragma once

#include <cstdint>

namespace mbf::cpu::linalg {

// Makes rows [r, d], r ≤ d, of finite numbers orthonormal in place, in order. A row that depends on the rows before it
// to within rounding gives way to the part of a unit vector, the one furthest from them, that is orthogonal to them.
void gram_schmidt(double* rows, int64_t r, int64_t d);

}  // namespace mbf::cpu::linalg
