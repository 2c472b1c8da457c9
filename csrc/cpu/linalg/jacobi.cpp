// Hestenes' method on the columns of M: rotations from the right make them orthogonal, M R = U diag(S), and V = Rᵀ.
// Columns are kept as rows of a transposed copy, so that a rotation runs along memory. Every sweep visits all pairs,
// the longer column first (de Rijk), which also sorts them; singular values come out with a relative error of about k
// ε.

#include "jacobi.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "dot.h"
#include "gram_schmidt.h"

namespace mbf::cpu::linalg {
namespace {

constexpr int kSweeps = 60;  // about ten are needed

void rotate(double* x, double* y, int64_t n, double c, double s) {
  for (int64_t i = 0; i < n; ++i) {
    const double a = x[i], b = y[i];
    x[i] = c * a - s * b;
    y[i] = s * a + c * b;
  }
}

// Makes two columns orthogonal, the longer one first; returns whether they were not.
bool orthogonalise(double* x, double* y, double* v, double* w, int64_t k) {
  double xx = dot(x, x, k), yy = dot(y, y, k);
  const double xy = dot(x, y, k);
  if (xx < yy) {
    std::swap_ranges(x, x + k, y);
    std::swap_ranges(v, v + k, w);
    std::swap(xx, yy);
  }
  if (!(std::abs(xy) > std::numeric_limits<double>::epsilon() * std::sqrt(xx) * std::sqrt(yy))) return false;
  const double zeta = (yy - xx) / (2 * xy);
  const double t = std::copysign(1 / (std::abs(zeta) + std::hypot(1, zeta)), zeta);
  const double c = 1 / std::hypot(1, t), s = c * t;
  rotate(x, y, k, c, s);
  rotate(v, w, k, c, s);
  return true;
}

}  // namespace

SmallSvd svd(const double* M, int64_t k) {
  std::vector<double> columns(k * k), rotations(k * k, 0.0);
  double largest = 0;
  for (int64_t i = 0; i < k * k; ++i) largest = std::max(largest, std::abs(M[i]));
  const double scale = largest > 0 ? largest : 1;
  for (int64_t i = 0; i < k; ++i) {
    rotations[i * k + i] = 1;
    for (int64_t j = 0; j < k; ++j) columns[j * k + i] = M[i * k + j] / scale;
  }
  bool rotated = true;
  for (int sweep = 0; sweep < kSweeps && rotated; ++sweep) {
    rotated = false;
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = i + 1; j < k; ++j) {
        rotated |= orthogonalise(&columns[i * k], &columns[j * k], &rotations[i * k], &rotations[j * k], k);
      }
    }
  }
  SmallSvd found{std::vector<double>(k * k), std::vector<double>(k), std::vector<double>(k * k)};
  std::vector<double> lengths(k);
  for (int64_t i = 0; i < k; ++i) lengths[i] = std::sqrt(dot(&columns[i * k], &columns[i * k], k));
  std::vector<int64_t> order(k);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  const double zero = lengths.empty() ? 0 : lengths[order[0]] * static_cast<double>(k) * 1e-300;
  std::vector<double> Ut(k * k, 0.0);
  for (int64_t i = 0; i < k; ++i) {
    const int64_t from = order[i];
    found.S[i] = lengths[from] * scale;
    for (int64_t j = 0; j < k; ++j) {
      if (lengths[from] > zero) Ut[i * k + j] = columns[from * k + j] / lengths[from];
      found.V[i * k + j] = rotations[from * k + j];
    }
  }
  gram_schmidt(Ut.data(), k, k);  // columns of next to no length are not orthogonal to more than their own rounding
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < k; ++j) found.U[j * k + i] = Ut[i * k + j];
  }
  return found;
}

}  // namespace mbf::cpu::linalg
