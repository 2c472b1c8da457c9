// The launches of merge.cu, for the operators that merge on the way.
#pragma once

#include <cstdint>
#include <vector>

#include "device.h"
#include "tensors.h"

namespace mbf::cuda {

// Pairs of contiguous tensors of equal sizes on one device, in any mix of dtypes.
struct MergeLists {
  std::vector<Tensor> merged;
  std::vector<Tensor> finetuned;
};

// λ where kernels can read it.
const double* weight_on_device(const Tensor& weight);

// Checks two lists, and makes what is not contiguous so.
MergeLists contiguous_pairs(const char* name, const std::vector<Tensor>& merged, const std::vector<Tensor>& finetuned);

// Writes what was copied to be contiguous back into `merged`.
void write_back(const std::vector<Tensor>& merged, const MergeLists& lists);

// M += λ (F − M). Where `veto` is not null and the number there is not 0, nothing is written.
void launch_merge(const MergeLists& lists, const double* weight, const int32_t* veto, cudaStream_t stream);

// M ← F, likewise.
void launch_replace(const MergeLists& lists, const int32_t* veto, cudaStream_t stream);

}  // namespace mbf::cuda
