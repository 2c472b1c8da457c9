#include "range.h"

#include <algorithm>
#include <cmath>

#include "../lora/arithmetic.h"
#include "finite.h"
#include "sketch.h"

namespace mbf::cpu::linalg {
namespace {

constexpr int64_t kStripRows = 512;
constexpr int64_t kBlockRows = 48;

// The least length of a column of MᵀM V that its rounding hasn't reached.
template <typename C>
constexpr double kShortest = sizeof(C) == 8 ? 1e-130 : 1e-25;

// How far apart rows of n numbers lie: padded, and no multiple of 2 KiB, or they would share two sets of the
// first-level cache.
template <typename C>
int64_t apart(int64_t n) {
  const int64_t lanes = micro<C>().lanes, ld = padded(n, lanes);
  return ld * static_cast<int64_t>(sizeof(C)) % 2048 == 0 ? ld + lanes : ld;
}

// Rows from one on, as what is read next.
Ahead ahead_of(const Rows& M, int64_t row, int64_t end) {
  const int64_t size = element_size(M.type);
  return {static_cast<const char*>(M.at(row).data), M.ld * size, end - row, size};
}

}  // namespace

template <typename C>
RangeFinder<C>::RangeFinder(Matrix M, int64_t k, int64_t n_iter, uint64_t seed)
    : M_(M), k_(k), n_iter_(n_iter), ld_(apart<C>(M.d)), seed_(seed) {}

template <typename C>
int64_t RangeFinder<C>::strips() const {
  return (M_.r + kStripRows - 1) / kStripRows;
}

template <typename C>
void RangeFinder<C>::begin() {
  V_ = Scratch<C>(k_ * ld_);
  std::fill_n(V_.get(), k_ * ld_, C(0));
  Y_.resize(M_.r * k_);
  Z_.resize(strips());
  sketch(seed_, M_.d * k_, [&](int64_t e, float number) { V_[e % k_ * ld_ + e / k_] = number; });
}

template <typename C>
void RangeFinder<C>::strip(int64_t phase, int64_t n) {
  if (status_ != kDone) return;
  const Micro<C>& loops = micro<C>();
  const int64_t begin = n * kStripRows, end = std::min(M_.r, begin + kStripRows);
  const Rows M{const_cast<void*>(M_.data), M_.type, M_.d};
  const bool down = phase != n_iter_, last = phase == n_iter_ + 1;
  if (down) Z_[n].resize(k_ * M_.d);
  std::vector<C> here(down && !last ? kBlockRows * k_ : 0);
  for (int64_t row = begin; row < end; row += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, end - row);
    C* y = here.empty() ? &Y_[row * k_] : here.data();
    if (!last) loops.project(M.at(row), rows, M_.d, V_.get(), ld_, k_, {}, y);
    if (down)
      loops.outer(M.at(row), rows, M_.d, y, k_, {}, ahead_of(M, row + rows, end), Z_[n].data(), M_.d, row > begin);
  }
}

// Of Z, the sum of the strips.
template <typename C>
void RangeFinder<C>::check_range() {
  double longest = 0;
  for (int64_t j = 0; j < k_; ++j) {
    double square = 0;
    for (int64_t i = 0; i < M_.d; ++i) square += double(Z_[0][j * M_.d + i]) * double(Z_[0][j * M_.d + i]);
    if (!std::isfinite(square)) {
      status_ = all_finite(M_.data, M_.type, M_.r * M_.d) ? kGivenUp : kNotFinite;
      return;
    }
    longest = std::max(longest, std::sqrt(square));
  }
  if (longest < kShortest<C>) status_ = kGivenUp;
}

// Adds the strips' sums to the first one's.
template <typename C>
void RangeFinder<C>::sum_strips() {
  for (size_t n = 1; n < Z_.size(); ++n) {
    for (int64_t i = 0; i < k_ * M_.d; ++i) Z_[0][i] += Z_[n][i];
  }
}

// V = orth(Z).
template <typename C>
void RangeFinder<C>::refine() {
  constexpr ScalarType type = sizeof(C) == 8 ? ScalarType::Double : ScalarType::Float;
  const int64_t n = M_.d;
  std::vector<C>& Z = Z_[0];
  const Orthonormal fast({Z.data(), type, k_, n});
  if (fast.status() == kDone) {
    std::vector<C> Q(k_ * n);
    fast.write(Q.data());
    for (int64_t j = 0; j < k_; ++j) std::copy_n(&Q[j * n], n, &V_[j * ld_]);
    return;
  }
  std::vector<double> rows(Z.begin(), Z.begin() + k_ * n);
  make_orthonormal(rows, k_, n);
  for (int64_t j = 0; j < k_; ++j) {
    for (int64_t i = 0; i < n; ++i) V_[j * ld_ + i] = static_cast<C>(rows[j * n + i]);
  }
}

// Q = orth(Y), as rows in fp64 and, for the product with M, as [m, k].
template <typename C>
void RangeFinder<C>::finish_left() {
  const int64_t m = M_.r;
  left_.resize(k_ * m);
  for (int64_t t = 0; t < m; ++t) {
    for (int64_t j = 0; j < k_; ++j) left_[j * m + t] = Y_[t * k_ + j];
  }
  if (!make_orthonormal(left_, k_, m)) {
    status_ = all_finite(M_.data, M_.type, m * M_.d) ? kGivenUp : kNotFinite;
    return;
  }
  for (int64_t t = 0; t < m; ++t) {
    for (int64_t j = 0; j < k_; ++j) Y_[t * k_ + j] = static_cast<C>(left_[j * m + t]);
  }
}

template <typename C>
void RangeFinder<C>::end(int64_t phase) {
  if (status_ != kDone) return;
  if (phase == n_iter_) return finish_left();
  sum_strips();
  if (phase > n_iter_) return;
  if (phase == 0) check_range();  // later V is orthonormal, and Z no larger
  if (status_ == kDone) refine();
}

template <typename C>
void RangeFinder<C>::write(const Triples& triples) const {
  if (status_ != kDone) return triples.clear();
  std::vector<double> right(Z_[0].begin(), Z_[0].begin() + k_ * M_.d), core;
  make_orthonormal(right, k_, M_.d, &core);
  triples.write(left_, core, right, k_);
}

template class RangeFinder<float>;
template class RangeFinder<double>;

}  // namespace mbf::cpu::linalg
