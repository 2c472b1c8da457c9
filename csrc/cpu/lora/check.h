// What the operators can be given: Python's faces have looked already, but anybody can call the operators themselves,
// and a size that doesn't fit would be read beyond. Each check throws "mbf::<op>: <argument> ..." and costs next to
// nothing where all is well.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "branch.h"
#include "layers.h"

namespace mbf::cpu {

// An operator's argument; `at` is its place in a list.
struct Argument {
  const char* op;
  const char* name;
  int64_t at = -1;
};

[[noreturn]] void refuse(const Argument& argument, const std::string& found_and_wanted);
std::string described(const Tensor& tensor);

inline bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
         type == ScalarType::Double;
}

// A tensor of fp64, fp32, bf16 or fp16 on the CPU.
void check_float(const Argument& argument, const Tensor& tensor);
// The same with these sizes; −1 stands for any.
void check_matrix(const Argument& argument, const Tensor& tensor, int64_t rows, int64_t columns);
// The same [..., columns].
void check_rows(const Argument& argument, const Tensor& tensor, int64_t columns);
// The same with the leading shape of `like`.
void check_rows_like(const Argument& argument, const Tensor& tensor, const Tensor& like, int64_t columns);
void check_type(const Argument& argument, const Tensor& tensor, ScalarType type);
// A 0-d tensor of these types.
void check_number(const Argument& argument, const Tensor& tensor);
// Written in place, so no element may stand for several of an expanded tensor.
void check_writable(const Argument& argument, const Tensor& tensor);
// Lists that go together.
void check_length(const Argument& argument, size_t found, size_t wanted);

// p in [0, 1], and the seed that it needs.
void check_dropout(const char* op, double p, const MaybeTensor& seed, int64_t at = -1);

// A branch from `d_in` to `d_out` numbers for rows [..., any] of `input`.
void check_branch(const char* op, const Operands& operands, const Tensor& input, int64_t d_in, int64_t d_out,
                  int64_t at = -1);

// b [d_out] of the weight's type.
void check_bias(const char* op, const Tensor& bias, const Tensor& weight, int64_t at = -1);

// A layer for rows [..., d_in] of activations of `type`, whose leading shape is that of `input`; −1 stands for any
// d_in.
void check_layer(const char* op, const Layer& layer, const Tensor& input, ScalarType type, int64_t d_in,
                 int64_t at = -1);

// The gradient of the layer's output and the h that belong together, and x [..., d_in].
void check_gradient(const char* op, const Layer& layer, const Tensor& dy, const Tensor& h, int64_t at = -1);
void check_input(const char* op, const Tensor& x, const Tensor& dy, int64_t d_in, ScalarType type);
void check_h(const char* op, const Operands& operands, const Tensor& h, const Tensor& dy, int64_t at = -1);

// What backward can give: nothing for operands that aren't there, and no A's without x.
Asked possible(const Asked& asked, const Operands& operands, bool x_is_there);

// The lists of lora_group and lora_mlp: an entry for each of `members`, or as many as there are weights.
void check_members(const char* op, const std::vector<Tensor>& weights, const std::vector<MaybeTensor>* biases,
                   const std::vector<Tensor>& A, const std::vector<Tensor>& B, const std::vector<double>& scales,
                   const std::vector<MaybeTensor>& gates, const std::vector<MaybeTensor>& mixes,
                   const std::vector<double>& dropout_ps, const std::vector<MaybeTensor>& seeds,
                   const std::vector<MaybeTensor>& merged_Bs, const std::vector<MaybeTensor>& merge_weights);

}  // namespace mbf::cpu
