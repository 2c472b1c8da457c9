#include "cholesky.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace mbf::cpu::linalg {
namespace {

// y[0:n] -= a x[0:n]
void subtract(double a, const double* x, int64_t n, double* y) {
  for (int64_t i = 0; i < n; ++i) y[i] -= a * x[i];
}

}  // namespace

double factor(double* gram, int64_t r, double* inverse) {
  const double least = kDependent * static_cast<double>(r);
  for (int64_t j = 0; j < r; ++j) {
    double* row = gram + j * r;
    if (!(row[j] >= least)) return std::numeric_limits<double>::infinity();
    const double pivot = std::sqrt(row[j]);
    for (int64_t i = j; i < r; ++i) row[i] /= pivot;
    for (int64_t i = j + 1; i < r; ++i) subtract(row[i], row + i, r - i, gram + i * r + i);
  }
  double norm = 0, inverse_norm = 0;
  std::fill(inverse, inverse + r * r, 0.0);
  for (int64_t i = 0; i < r; ++i) {  // row i of L⁻¹ = (e_i − Σ_j L_ij row j) / L_ii
    double* row = inverse + i * r;
    row[i] = 1;
    for (int64_t j = 0; j < i; ++j) subtract(gram[j * r + i], inverse + j * r, j + 1, row);
    for (int64_t j = 0; j <= i; ++j) {
      row[j] /= gram[i * r + i];
      inverse_norm += row[j] * row[j];
      norm += gram[j * r + i] * gram[j * r + i];
    }
  }
  return std::sqrt(norm * inverse_norm);
}

}  // namespace mbf::cpu::linalg
