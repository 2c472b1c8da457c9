// Whether the tensors that an operator writes lie apart in memory.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace mbf::cpu {

// Throws where memory of `written` is also another's, of `written` or `read`. A tensor may be its own partner, at the
// same place of the other list; the two then lie alike.
void check_apart(const char* op, const std::vector<torch::stable::Tensor>& written,
                 const std::vector<torch::stable::Tensor>& read);

}  // namespace mbf::cpu
