// Orthonormal rows by Cholesky QR in fp64: A = L Q with Q Qᵀ = I and L lower triangular with a positive diagonal.
//
// The rows are scaled to unit length by the diagonal of their Gram matrix, G = A Aᵀ; then G = L Lᵀ and Q = L⁻¹ A. That
// leaves Q Qᵀ − I of about ε κ² (ε of fp64). Where κ makes that matter for the dtype asked for, the same is done once
// more with Q in place of A ("CholeskyQR2"), which leaves ε alone. Rows too close to dependent are given up with a
// flag. Where L⁻¹ hardly enlarges what it meets, as with the rows of a LoRA, both the Gram matrix and Q are made in
// fp32, or Q alone. A is read twice, or three times with the second round, in blocks of columns that stay in the
// second-level cache.
#pragma once

#include <cstdint>
#include <vector>

#include "../lora/torch.h"

namespace mbf::cpu::linalg {

enum Status : int32_t {
  kDone = 0,
  kGivenUp = 1,    // dependent rows, or numbers whose squares leave fp64
  kNotFinite = 2,  // NaN or infinity
};

// Contiguous rows [r, d] of fp64, fp32, bf16 or fp16.
struct Matrix {
  const void* data;
  ScalarType type;
  int64_t r, d;
};

// One matrix on its way. Serial; scratch memory is the thread's own.
class Orthonormal {
 public:
  // Reads A, and in the end fetches the beginning of what is read next, where that is known.
  explicit Orthonormal(const Matrix& A, const Matrix* next = nullptr);

  Status status() const { return status_; }

  // For a write() later on, by whatever thread: gives up what the scratch memory holds, and what write_factor() needs.
  void put_aside();

  // Q in A's dtype, NaN where the status isn't kDone, into other memory or over A; `past_caches` where nobody reads it
  // soon.
  void write(void* Q, bool past_caches = false) const;

  // L [r, r], of A = L Q. Needs fp64 and the status kDone.
  void write_factor(double* L) const;

 private:
  bool try_in_floats(const Matrix* next);  // false, and nothing has happened, unless the rows are far from dependent
  double factor_round(std::vector<double>& gram, int round);
  void scale_to_unit(std::vector<double>& gram) const;
  double longest_row() const;
  void fold_lengths();

  Matrix A_;
  Status status_ = kDone;
  std::vector<double> length_;      // of the rows
  std::vector<float> in_floats_;    // L⁻¹ in panels where fp32 does for Q
  const float* rows_ = nullptr;     // A in fp32 in the thread's scratch memory, if it is still there as a whole
  std::vector<double> upper_[2];    // Lᵀ of both rounds
  std::vector<double> inverse_[2];  // L⁻¹ of both rounds, the lengths folded into the first; the second may be empty
};

}  // namespace mbf::cpu::linalg
