// The one list of native kernels. The schemas are defined beside their references in mbf/ops/*.py.

#include <torch/csrc/stable/library.h>

#include "cpu/kernels.h"

STABLE_TORCH_LIBRARY_IMPL(mbf, CPU, m) {
  m.impl("dropout_mask", TORCH_BOX(&mbf::cpu::dropout_mask));
  m.impl("merge_", TORCH_BOX(&mbf::cpu::merge_));
}
