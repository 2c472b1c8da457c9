// Whether the tensors that an operator writes lie apart in memory.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <initializer_list>
#include <vector>

namespace mbf::cpu {

// Tensors of which number n is the partner of number `first` + n of the operator's pairs.
struct Partners {
  const std::vector<torch::stable::Tensor>& tensors;
  size_t first = 0;
};

// Throws where memory of `written` is also another's, of `written` or `read`. What is read may be what its partner is
// written to, exactly; the two then lie alike.
void check_apart(const char* op, std::initializer_list<Partners> written, std::initializer_list<Partners> read);

}  // namespace mbf::cpu
