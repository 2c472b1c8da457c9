// The two halves of a randomised SVD of one dense matrix (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1),
// cut into strips of rows that threads share out.
//
//   V = sketch; `n_iter` times V = orth(Mᵀ (M V)); Q = orth(M V); B = Qᵀ M
//
// A power iteration reads M once: while a block of rows is in cache, it takes y = M_blk V and adds M_blkᵀ y. So M is
// read n_iter + 2 times for 2 n_iter + 2 products. V isn't made orthonormal between M and Mᵀ: its columns come graded,
// the leading ones first, and what rounding mixes into a later column lies along those before it, which orth takes out.
#pragma once

#include <cstdint>
#include <vector>

#include "../lora/micro.h"
#include "triples.h"

namespace mbf::cpu::linalg {

// C: the arithmetic, fp32 for fp32 and the halves, fp64 for fp64.
template <typename C>
class RangeFinder {
 public:
  RangeFinder(Matrix M, int64_t k, int64_t n_iter, uint64_t seed);

  int64_t strips() const;
  // To begin, then for phases 0 .. n_iter + 1 all strips, in any order, and the end.
  void begin();
  int64_t phases() const { return n_iter_ + 2; }
  void strip(int64_t phase, int64_t n);
  void end(int64_t phase);

  // Afterwards: NaN where the status isn't kDone.
  void write(const Triples& triples) const;

  // kGivenUp: zeros, or numbers whose squares leave C.
  Status status() const { return status_; }

 private:
  void check_range();
  void sum_strips();
  void refine();
  void finish_left();

  Matrix M_;
  int64_t k_, n_iter_, ld_;
  uint64_t seed_;
  Status status_ = kDone;
  Scratch<C> V_;                   // Vᵀ [k, n], its rows ld_ apart with zeros between
  std::vector<C> Y_;               // [m, k]
  std::vector<std::vector<C>> Z_;  // [k, n], a sum for each strip
  std::vector<double> left_;       // Qᵀ [k, m]
};

}  // namespace mbf::cpu::linalg
