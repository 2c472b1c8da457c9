#include "gram_schmidt.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dot.h"

namespace mbf::cpu::linalg {
namespace {

// Takes the parts along the first `count` rows out of x; returns what length is left.
double project_out(const double* rows, int64_t count, int64_t d, double* x) {
  for (int64_t j = 0; j < count; ++j) {
    const double part = dot(rows + j * d, x, d);
    for (int64_t i = 0; i < d; ++i) x[i] -= part * rows[j * d + i];
  }
  return std::sqrt(dot(x, x, d));
}

void divide(double* x, int64_t d, double by) {  // a factor of 1 / by would be infinite where by is subnormal
  for (int64_t i = 0; i < d; ++i) x[i] /= by;
}

// The unit vector that is furthest from the first `count` rows; the first of those that rounding alone sets apart.
void furthest_unit(const double* rows, int64_t count, int64_t d, double* x) {
  for (int64_t i = 0; i < d; ++i) {
    x[i] = 1;
    for (int64_t j = 0; j < count; ++j) x[i] -= rows[j * d + i] * rows[j * d + i];
  }
  const double* most = std::max_element(x, x + d);
  const int64_t place = std::find_if<const double*>(x, most, [&](double it) { return it >= *most - 1e-9; }) - x;
  std::fill(x, x + d, 0.0);
  x[place] = 1;
}

}  // namespace

void gram_schmidt(double* rows, int64_t r, int64_t d) {
  const double rounding = static_cast<double>(d) * std::numeric_limits<double>::epsilon();
  for (int64_t j = 0; j < r; ++j) {
    double* row = rows + j * d;
    const double largest =
        std::abs(*std::max_element(row, row + d, [](double a, double b) { return std::abs(a) < std::abs(b); }));
    if (largest > 0) divide(row, d, largest);
    const double before = std::sqrt(dot(row, row, d));
    double left = project_out(rows, j, d, row);
    if (left <= rounding * before) {
      furthest_unit(rows, j, d, row);
      left = project_out(rows, j, d, row);
    }
    divide(row, d, left);
    divide(row, d, project_out(rows, j, d, row));
  }
}

}  // namespace mbf::cpu::linalg
