// The CPU kernels of csrc/cpu/*.cpp, with the signatures of their schemas.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace mbf::cpu {

void merge_(std::vector<torch::stable::Tensor> merged, std::vector<torch::stable::Tensor> finetuned,
            torch::stable::Tensor weight);

}  // namespace mbf::cpu
