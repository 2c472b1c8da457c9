// Orthonormal rows on the device in two halves, for the operators that do other things between them.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "tensors.h"

namespace mbf::cuda {

// Of a matrix, as mbf/ops/_status.py.
enum Status : int32_t { kDone = 0, kGivenUp = 1, kNotFinite = 2 };

// Many matrices [..., r, d] of any mixture of shapes and dtypes on their way to orthonormal rows; see basis.cu.
class Basis {
 public:
  // A: contiguous stacks [..., r, d], 1 ≤ r ≤ d, on one device.
  explicit Basis(const std::vector<Tensor>& A);

  int64_t count() const { return static_cast<int64_t>(matrices_.size()); }

  // First half: reads A and writes the status of every matrix.
  void measure(int32_t* status, cudaStream_t stream);

  // Second half: Q of every matrix into stacks of A's shapes and dtypes, NaN where the status isn't kDone. Where `veto`
  // is not null and the number there is not 0, nothing is written.
  void write(const std::vector<Tensor>& Q, int32_t* status, const int32_t* veto, cudaStream_t stream) const;

 private:
  struct Matrix {
    const void* A;
    ScalarType type;
    int64_t r, d;
    int64_t partial, inverse, first_piece;  // where its numbers and flags begin
  };

  template <typename Use>
  void in_tables(const std::vector<void*>& Q, int32_t* status, const int32_t* veto, const Use& use) const;

  std::vector<Matrix> matrices_;
  std::optional<Tensor> workspace_;  // fp64
  std::optional<Tensor>
      flags_;  // int32: of every piece whether all is finite; of every matrix whether a second round is made
  int64_t pieces_ = 0;
};

}  // namespace mbf::cuda
