#include "check.h"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>

namespace mbf::cpu {
namespace {

std::string shape(const Tensor& tensor) {
  std::ostringstream out;
  out << '[';
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) out << (axis > 0 ? ", " : "") << tensor.size(axis);
  out << ']';
  return out.str();
}

std::string size_or_any(int64_t size) { return size < 0 ? "any" : std::to_string(size); }

bool same_lead(const Tensor& tensor, const Tensor& like) {
  const int64_t axes = like.dim();
  if (tensor.dim() != axes) return false;
  for (int64_t axis = 0; axis + 1 < axes; ++axis) {
    if (tensor.size(axis) != like.size(axis)) return false;
  }
  return true;
}

// Whether the gate can be broadcast to [*lead of input, r].
bool broadcasts(const Tensor& gate, const Tensor& input, int64_t r) {
  const int64_t axes = gate.dim(), lead = input.dim() - axes;
  if (lead < 0) return false;
  for (int64_t axis = 0; axis < axes; ++axis) {
    const int64_t size = gate.size(axis);
    if (size != 1 && size != (axis + 1 == axes ? r : input.size(lead + axis))) return false;
  }
  return true;
}

}  // namespace

std::string described(const Tensor& tensor) {
  return std::string(toString(tensor.scalar_type())) + " " + shape(tensor) + (tensor.is_cpu() ? "" : " not on the CPU");
}

void refuse(const Argument& argument, const std::string& found_and_wanted) {
  std::ostringstream out;
  out << "mbf::" << argument.op << ": " << argument.name;
  if (argument.at >= 0) out << '[' << argument.at << ']';
  out << ' ' << found_and_wanted;
  throw std::runtime_error(out.str());
}

void check_float(const Argument& argument, const Tensor& tensor) {
  if (is_float(tensor.scalar_type()) && tensor.is_cpu()) return;
  refuse(argument, "is " + described(tensor) + "; it must be fp64, fp32, bf16 or fp16 and on the CPU");
}

void check_matrix(const Argument& argument, const Tensor& tensor, int64_t rows, int64_t columns) {
  check_float(argument, tensor);
  if (tensor.dim() == 2 && (rows < 0 || tensor.size(0) == rows) && (columns < 0 || tensor.size(1) == columns)) return;
  refuse(argument, "has shape " + shape(tensor) + "; it must be [" + size_or_any(rows) + ", " + size_or_any(columns) +
                       "] as the other arguments say");
}

void check_rows(const Argument& argument, const Tensor& tensor, int64_t columns) {
  check_float(argument, tensor);
  const int64_t axes = tensor.dim();
  if (axes >= 1 && (columns < 0 || tensor.size(axes - 1) == columns)) return;
  refuse(argument, "has shape " + shape(tensor) + "; it must be [..., " + size_or_any(columns) + "]");
}

void check_rows_like(const Argument& argument, const Tensor& tensor, const Tensor& like, int64_t columns) {
  check_rows(argument, tensor, columns);
  if (same_lead(tensor, like)) return;
  refuse(argument, "has shape " + shape(tensor) + "; but for the last axis it must be " + shape(like));
}

void check_type(const Argument& argument, const Tensor& tensor, ScalarType type) {
  if (tensor.scalar_type() == type) return;
  refuse(argument, std::string("is ") + toString(tensor.scalar_type()) + "; it must be " + toString(type) +
                       " as the other arguments are");
}

void check_number(const Argument& argument, const Tensor& tensor) {
  check_float(argument, tensor);
  if (tensor.dim() != 0) refuse(argument, "has shape " + shape(tensor) + "; it must be 0-d");
}

void check_writable(const Argument& argument, const Tensor& tensor) {
  int64_t reach = 1;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) reach += (tensor.size(axis) - 1) * tensor.stride(axis);
  if (tensor.numel() > std::max<int64_t>(reach, 0)) {
    refuse(argument, "is expanded: several of its elements are one; it is written, so pass its clone()");
  }
}

void check_length(const Argument& argument, size_t found, size_t wanted) {
  if (found == wanted) return;
  refuse(argument, "has " + std::to_string(found) + " entries; it must have " + std::to_string(wanted));
}

void check_dropout(const char* op, double p, const MaybeTensor& seed, int64_t at) {
  if (p == 0) return;
  if (!(p >= 0 && p <= 1)) {
    refuse({op, at < 0 ? "dropout_p" : "dropout_ps", at}, "is " + std::to_string(p) + "; it must lie in [0, 1]");
  }
  const Argument argument{op, at < 0 ? "seed" : "seeds", at};
  if (!seed) refuse(argument, "is absent; dropout needs one");
  if (seed->scalar_type() != ScalarType::Long || seed->dim() != 0 || !seed->is_cpu()) {
    refuse(argument, "is " + described(*seed) + "; it must be a 0-d int64 tensor on the CPU");
  }
}

void check_branch(const char* op, const Operands& operands, const Tensor& input, int64_t d_in, int64_t d_out,
                  int64_t at) {
  check_matrix({op, "A", at}, operands.A, -1, d_in);
  const int64_t r = operands.A.size(0);
  check_matrix({op, "B", at}, operands.B, d_out, r);
  check_type({op, "B", at}, operands.B, operands.A.scalar_type());
  if (operands.gate) {
    const Argument gate{op, at < 0 ? "gate" : "gates", at};
    check_float(gate, *operands.gate);
    if (!broadcasts(*operands.gate, input, r)) {
      refuse(gate, "has shape " + shape(*operands.gate) + "; it must broadcast to [..., " + std::to_string(r) +
                       "] with the leading axes of " + shape(input));
    }
  }
  if (operands.mix) check_matrix({op, at < 0 ? "mix" : "mixes", at}, *operands.mix, r, r);
  if (operands.merged_B || operands.merge_weight) {
    const Argument merged{op, at < 0 ? "merged_B" : "merged_Bs", at};
    const Argument weight{op, at < 0 ? "merge_weight" : "merge_weights", at};
    if (!operands.merged_B) refuse(merged, "is absent; it goes with the merge weight");
    if (!operands.merge_weight) refuse(weight, "is absent; it goes with the merged B");
    check_matrix(merged, *operands.merged_B, operands.B.size(0), r);
    check_type(merged, *operands.merged_B, operands.B.scalar_type());
    check_number(weight, *operands.merge_weight);
  }
  check_dropout(op, operands.dropout_p, operands.seed, at);
}

void check_bias(const char* op, const Tensor& bias, const Tensor& weight, int64_t at) {
  const Argument argument{op, at < 0 ? "bias" : "biases", at};
  check_float(argument, bias);
  check_type(argument, bias, weight.scalar_type());
  if (bias.dim() == 1 && bias.size(0) == weight.size(0)) return;
  refuse(argument, "has shape " + shape(bias) + "; it must be [" + std::to_string(weight.size(0)) + "]");
}

void check_layer(const char* op, const Layer& layer, const Tensor& input, ScalarType type, int64_t d_in, int64_t at) {
  const Argument weight{op, at < 0 ? "weight" : "weights", at};
  check_matrix(weight, layer.weight, -1, d_in);
  check_type(weight, layer.weight, type);
  if (layer.bias) check_bias(op, *layer.bias, layer.weight, at);
  check_branch(op, layer.branch, input, layer.weight.size(1), layer.weight.size(0), at);
}

void check_h(const char* op, const Operands& operands, const Tensor& h, const Tensor& dy, int64_t at) {
  const Argument argument{op, at < 0 ? "h" : "hs", at};
  check_rows_like(argument, h, dy, operands.A.size(0));
  check_type(argument, h, operands.A.scalar_type());
}

void check_gradient(const char* op, const Layer& layer, const Tensor& dy, const Tensor& h, int64_t at) {
  const Argument argument{op, at < 0 ? "dy" : "dys", at};
  check_rows(argument, dy, layer.weight.size(0));
  check_h(op, layer.branch, h, dy, at);
}

void check_input(const char* op, const Tensor& x, const Tensor& dy, int64_t d_in, ScalarType type) {
  check_rows_like({op, "x"}, x, dy, d_in);
  check_type({op, "x"}, x, type);
}

Asked possible(const Asked& asked, const Operands& operands, bool x_is_there) {
  const bool merged = operands.merged_B.has_value();
  return {asked.A && x_is_there,
          asked.B,
          asked.gate && operands.gate.has_value(),
          asked.mix && operands.mix.has_value(),
          asked.merged_B && merged,
          asked.merge_weight && merged};
}

void check_members(const char* op, const std::vector<Tensor>& weights, const std::vector<MaybeTensor>* biases,
                   const std::vector<Tensor>& A, const std::vector<Tensor>& B, const std::vector<double>& scales,
                   const std::vector<MaybeTensor>& gates, const std::vector<MaybeTensor>& mixes,
                   const std::vector<double>& dropout_ps, const std::vector<MaybeTensor>& seeds,
                   const std::vector<MaybeTensor>& merged_Bs, const std::vector<MaybeTensor>& merge_weights) {
  const size_t n = weights.size();
  if (n == 0) refuse({op, "weights"}, "is empty; there must be a layer");
  if (biases != nullptr) check_length({op, "biases"}, biases->size(), n);
  check_length({op, "A"}, A.size(), n);
  check_length({op, "B"}, B.size(), n);
  check_length({op, "scales"}, scales.size(), n);
  check_length({op, "gates"}, gates.size(), n);
  check_length({op, "mixes"}, mixes.size(), n);
  check_length({op, "dropout_ps"}, dropout_ps.size(), n);
  check_length({op, "seeds"}, seeds.size(), n);
  check_length({op, "merged_Bs"}, merged_Bs.size(), n);
  check_length({op, "merge_weights"}, merge_weights.size(), n);
}

}  // namespace mbf::cpu
