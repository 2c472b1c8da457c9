// The CPU kernels of csrc/cpu/*.cpp, with the signatures of their schemas.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace mbf::cpu {

torch::stable::Tensor dropout_mask(torch::stable::Tensor seed, std::vector<int64_t> shape, double p);

void merge_(std::vector<torch::stable::Tensor> merged, std::vector<torch::stable::Tensor> finetuned,
            torch::stable::Tensor weight);

}  // namespace mbf::cpu
