// The CPU kernels of csrc/cpu/*.cpp, with the signatures of their schemas.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace mbf::cpu {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using MaybeTensors = std::vector<MaybeTensor>;

// What the processor lets the kernels use: "AVX-512, native bf16, fp32 on AMX".
std::string cpu_kernels();

Tensor dropout_mask(Tensor seed, std::vector<int64_t> shape, double p);

Tensors empty_like_all(Tensors like);

Tensor frozen_linear(Tensor x, Tensor weight, MaybeTensor bias);
Tensor frozen_linear_backward(Tensor dy, Tensor weight);

std::tuple<Tensor, Tensor> lilora_accumulate(Tensor y, Tensor x, Tensor A, Tensor B, Tensor Ea, Tensor Eb,
                                             Tensor weight, Tensor scale, double dropout_p, MaybeTensor seed);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lilora_accumulate_backward(
    Tensor dy, Tensor h, MaybeTensor x, Tensor A, Tensor B, Tensor Ea, Tensor Eb, Tensor weight, Tensor scale,
    double dropout_p, MaybeTensor seed, std::vector<bool> needs);

void merge_(Tensors merged, Tensors finetuned, Tensor weight);
Tensor merge_with_norms_(Tensors merged, Tensors finetuned, Tensor weight);

Tensors orthonormal_rows(Tensors A);

Tensors rsvd(Tensors matrices, Tensor seeds, int64_t rank, int64_t oversample, int64_t n_iter);
Tensors svd_factors(Tensors B, Tensors A, int64_t rank);

Tensor task_boundary_(Tensors merged_A, Tensors merged_B, Tensors Q, Tensors A, Tensors B, Tensor weight);

std::tuple<Tensor, Tensor> lora_linear(Tensor x, Tensor weight, MaybeTensor bias, Tensor A, Tensor B, double scale,
                                       MaybeTensor gate, MaybeTensor mix, double dropout_p, MaybeTensor seed,
                                       MaybeTensor merged_B, MaybeTensor merge_weight);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lora_linear_backward(
    Tensor dy, Tensor h, MaybeTensor x, Tensor weight, Tensor A, Tensor B, double scale, MaybeTensor gate,
    MaybeTensor mix, double dropout_p, MaybeTensor seed, MaybeTensor merged_B, MaybeTensor merge_weight,
    std::vector<bool> needs);

std::tuple<Tensor, Tensor> lora_accumulate(Tensor y, Tensor x, Tensor A, Tensor B, double scale, MaybeTensor gate,
                                           MaybeTensor mix, double dropout_p, MaybeTensor seed, MaybeTensor merged_B,
                                           MaybeTensor merge_weight);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lora_accumulate_backward(
    Tensor dy, Tensor h, MaybeTensor x, Tensor A, Tensor B, double scale, MaybeTensor gate, MaybeTensor mix,
    double dropout_p, MaybeTensor seed, MaybeTensor merged_B, MaybeTensor merge_weight, std::vector<bool> needs);

Tensors lora_group(Tensor x, Tensors weights, MaybeTensors biases, Tensors A, Tensors B, std::vector<double> scales,
                   MaybeTensors gates, MaybeTensors mixes, std::vector<double> dropout_ps, MaybeTensors seeds,
                   MaybeTensors merged_Bs, MaybeTensors merge_weights);

Tensors lora_group_backward(MaybeTensors dys, Tensors hs, MaybeTensor x, Tensors weights, Tensors A, Tensors B,
                            std::vector<double> scales, MaybeTensors gates, MaybeTensors mixes,
                            std::vector<double> dropout_ps, MaybeTensors seeds, MaybeTensors merged_Bs,
                            MaybeTensors merge_weights, std::vector<bool> needs);

Tensors lora_mlp(Tensor x, Tensors weights, MaybeTensors biases, Tensors A, Tensors B, std::vector<double> scales,
                 MaybeTensors gates, MaybeTensors mixes, std::vector<double> dropout_ps, MaybeTensors seeds,
                 MaybeTensors merged_Bs, MaybeTensors merge_weights, int64_t activation, bool recompute);

Tensors lora_mlp_backward(Tensor dy, Tensor x, MaybeTensor g, MaybeTensor u, Tensors hs, Tensors weights,
                          MaybeTensors biases, Tensors A, Tensors B, std::vector<double> scales, MaybeTensors gates,
                          MaybeTensors mixes, std::vector<double> dropout_ps, MaybeTensors seeds,
                          MaybeTensors merged_Bs, MaybeTensors merge_weights, int64_t activation,
                          std::vector<bool> needs);

Tensor mora_accumulate(Tensor y, Tensor x, Tensor M, int64_t kind, double scale, double dropout_p, MaybeTensor seed);
std::tuple<Tensor, Tensor> mora_accumulate_backward(Tensor dy, MaybeTensor x, Tensor M, int64_t d_in, int64_t kind,
                                                    double scale, double dropout_p, MaybeTensor seed,
                                                    std::vector<bool> needs);

}  // namespace mbf::cpu
