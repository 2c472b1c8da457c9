#include "triples.h"

#include <algorithm>
#include <cmath>

#include "../lora/micro.h"
#include "dot.h"
#include "finite.h"
#include "gram_schmidt.h"
#include "jacobi.h"

namespace mbf::cpu::linalg {
namespace {

// n numbers to a dtype.
void narrow(const double* from, int64_t n, ScalarType type, void* to) {
  if (type == ScalarType::Double) {
    std::copy_n(from, n, static_cast<double*>(to));
    return;
  }
  const std::vector<float> floats(from, from + n);
  micro<float>().narrow(floats.data(), n, to, type);
}

// [rank, k] times rows [k, d].
std::vector<double> combine(const std::vector<double>& factors, int64_t rank, int64_t k,
                            const std::vector<double>& rows, int64_t d) {
  std::vector<double> out(rank * d);
  micro<double>().expand({out.data(), ScalarType::Double, d}, rank, d, factors.data(), k, rows.data(), d, {}, false);
  return out;
}

std::vector<double> transposed(const std::vector<double>& matrix, int64_t rows, int64_t columns) {
  std::vector<double> out(matrix.size());
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t i = 0; i < columns; ++i) out[i * rows + t] = matrix[t * columns + i];
  }
  return out;
}

}  // namespace

bool make_orthonormal(std::vector<double>& rows, int64_t k, int64_t d, std::vector<double>* L) {
  const Orthonormal fast({rows.data(), ScalarType::Double, k, d});
  if (fast.status() == kNotFinite) return false;
  std::vector<double> Q(k * d);
  if (L != nullptr) L->resize(k * k);
  if (fast.status() == kDone) {
    fast.write(Q.data());
    if (L != nullptr) fast.write_factor(L->data());
  } else {
    Q = rows;
    gram_schmidt(Q.data(), k, d);
    for (int64_t i = 0; i < k && L != nullptr; ++i) {
      for (int64_t j = 0; j < k; ++j) (*L)[i * k + j] = dot(&rows[i * d], &Q[j * d], d);
    }
  }
  rows = std::move(Q);
  return true;
}

void Triples::write(const std::vector<double>& left, const std::vector<double>& core, const std::vector<double>& right,
                    int64_t k) const {
  const SmallSvd found = svd(core.data(), k);
  std::vector<double> Ut = combine(transposed(found.U, k, k), rank, k, left, m);
  std::vector<double> V = combine(found.V, rank, k, right, n);
  for (int64_t j = 0; j < rank; ++j) {
    double* row = &V[j * n];
    const double largest =
        *std::max_element(row, row + n, [](double a, double b) { return std::abs(a) < std::abs(b); });
    if (largest >= 0) continue;
    for (int64_t i = 0; i < n; ++i) row[i] = -row[i];
    for (int64_t i = 0; i < m; ++i) Ut[j * m + i] = -Ut[j * m + i];
  }
  narrow(transposed(Ut, rank, m).data(), m * rank, type, U);
  narrow(found.S.data(), rank, type, S);
  narrow(V.data(), rank * n, type, Vh);
}

void Triples::clear() const {
  fill_nan(U, type, m * rank);
  fill_nan(S, type, rank);
  fill_nan(Vh, type, rank * n);
}

}  // namespace mbf::cpu::linalg
