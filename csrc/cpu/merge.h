// The merge of a list of tensor pairs, cut into pieces for whoever shares them out.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "lora/check.h"

namespace mbf::cpu {

// Merges elements `begin` .. `end` of a pair, and where `squares` is given takes their three sums of squares.
using MergeSpan = void (*)(void* merged, const void* finetuned, int64_t begin, int64_t end, double weight,
                           double* squares);

class Merge {
 public:
  // M ← M + λ (F − M) for every pair; weight is λ, 0-d in fp64. Throws, in the names of the operator's arguments, where
  // pairs don't fit.
  Merge(const Argument& merged_name, const std::vector<torch::stable::Tensor>& merged, const Argument& finetuned_name,
        const std::vector<torch::stable::Tensor>& finetuned, const torch::stable::Tensor& weight);

  int64_t pieces() const { return static_cast<int64_t>(pieces_.size()); }
  int64_t pair_of(int64_t piece) const { return static_cast<int64_t>(pieces_[piece].pair); }

  // Merges one piece. `squares`, where it is given, takes three sums of squares: of F, of F − M before, of M after.
  void run(int64_t piece, double* squares = nullptr) const;

  // Whether a piece of F holds neither NaN nor infinity.
  bool finite(int64_t piece) const;

  // Once all pieces are merged: writes what isn't contiguous.
  void finish() const;

 private:
  struct Pair {
    torch::stable::Tensor merged, finetuned;  // contiguous
    void* m;
    const void* f;
    MergeSpan span;
  };
  struct Piece {
    size_t pair;
    int64_t begin, end;
  };

  std::vector<torch::stable::Tensor> merged_;
  std::vector<Pair> pairs_;
  std::vector<Piece> pieces_;
  double lambda_;
};

}  // namespace mbf::cpu
