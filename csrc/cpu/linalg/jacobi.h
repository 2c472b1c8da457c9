// The singular value decomposition of a small square matrix by one-sided Jacobi rotations, serial and in fp64.
#pragma once

#include <cstdint>
#include <vector>

namespace mbf::cpu::linalg {

// M = U diag(S) V for M [k, k]; U [k, k] with orthonormal columns, V [k, k] with orthonormal rows, S descending. All
// row-major. Beyond the rank of M, U is completed to an orthonormal basis.
struct SmallSvd {
  std::vector<double> U, S, V;
};

SmallSvd svd(const double* M, int64_t k);

}  // namespace mbf::cpu::linalg
