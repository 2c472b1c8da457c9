// Singular triples of a product M = Leftᵀ core Right with orthonormal rows on both sides.
#pragma once

#include <cstdint>
#include <vector>

#include "orthonormal.h"

namespace mbf::cpu::linalg {

// Makes finite rows [k, d], k ≤ d, orthonormal in place, whatever their rank; rows = L times what they become. False
// where they are not finite.
bool make_orthonormal(std::vector<double>& rows, int64_t k, int64_t d, std::vector<double>* L = nullptr);

// The `rank` leading triples of M [m, n] = Leftᵀ core Right, with left [k, m], core [k, k] and right [k, n]: U [m,
// rank], S [rank] and Vh [rank, n] of one dtype. The entry of largest magnitude of each row of Vh is positive.
struct Triples {
  ScalarType type;
  int64_t m, n, rank;
  void *U, *S, *Vh;

  void write(const std::vector<double>& left, const std::vector<double>& core, const std::vector<double>& right,
             int64_t k) const;

  // NaN throughout.
  void clear() const;
};

}  // namespace mbf::cpu::linalg
