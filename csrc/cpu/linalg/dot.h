// The sum that the small factorisations take, in an order that lets the compiler use vectors.
#pragma once

#include <cstdint>

namespace mbf::cpu::linalg {

inline double dot(const double* x, const double* y, int64_t n) {
  double sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int k = 0; k < 4; ++k) sums[k] += x[i + k] * y[i + k];
  }
  for (; i < n; ++i) sums[0] += x[i] * y[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace mbf::cpu::linalg
