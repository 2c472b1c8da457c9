// The host side of csrc/cuda/*.cu, with the signatures of the schemas in ops.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace mbf::cuda {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

// merge.cu
void merge_(Tensors merged, Tensors finetuned, Tensor weight);
Tensor merge_with_norms_(Tensors merged, Tensors finetuned, Tensor weight);

// basis.cu
Tensor orthonormal_rows(Tensors A, Tensors Q);

// rsvd.cu
Tensor sketch(Tensor seeds, int64_t n, int64_t columns);
Tensors svd(Tensors matrices);

// task_boundary.cu
Tensor task_boundary_(Tensors merged_A, Tensors merged_B, Tensors Q, Tensors A, Tensors B, Tensor weight);

// lora_linear.cu
std::tuple<Tensor, Tensor> lora_linear(Tensor x, Tensor weight, MaybeTensor bias, Tensor A, Tensor B, double scale,
                                       MaybeTensor gate, MaybeTensor mix, double dropout_p, MaybeTensor seed,
                                       MaybeTensor merged_B, MaybeTensor merge_weight);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_backward(
    Tensor dy, Tensor h, MaybeTensor x, Tensor weight, Tensor A, Tensor B, double scale, MaybeTensor gate,
    MaybeTensor mix, double dropout_p, MaybeTensor seed, MaybeTensor merged_B, MaybeTensor merge_weight,
    std::vector<bool> needs);

// lora_accumulate.cu
std::tuple<Tensor, Tensor> lora_accumulate(Tensor y, Tensor x, Tensor A, Tensor B, double scale, MaybeTensor gate,
                                           MaybeTensor mix, double dropout_p, MaybeTensor seed, MaybeTensor merged_B,
                                           MaybeTensor merge_weight);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lora_accumulate_backward(
    Tensor dy, Tensor h, MaybeTensor x, Tensor A, Tensor B, double scale, MaybeTensor gate, MaybeTensor mix,
    double dropout_p, MaybeTensor seed, MaybeTensor merged_B, MaybeTensor merge_weight, std::vector<bool> needs);

}  // namespace mbf::cuda
