// The one list of native kernels. The schemas are defined beside their references in mbf/ops/*.py.

#include <torch/csrc/stable/library.h>

#include "cpu/kernels.h"

STABLE_TORCH_LIBRARY_IMPL(mbf, CompositeExplicitAutograd, m) {
  m.impl("cpu_kernels", TORCH_BOX(&mbf::cpu::cpu_kernels));
}

STABLE_TORCH_LIBRARY_IMPL(mbf, CPU, m) {
  m.impl("dropout_mask", TORCH_BOX(&mbf::cpu::dropout_mask));
  m.impl("empty_like_all", TORCH_BOX(&mbf::cpu::empty_like_all));
  m.impl("frozen_linear", TORCH_BOX(&mbf::cpu::frozen_linear));
  m.impl("frozen_linear_backward", TORCH_BOX(&mbf::cpu::frozen_linear_backward));
  m.impl("lilora_accumulate", TORCH_BOX(&mbf::cpu::lilora_accumulate));
  m.impl("lilora_accumulate_backward", TORCH_BOX(&mbf::cpu::lilora_accumulate_backward));
  m.impl("lora_accumulate", TORCH_BOX(&mbf::cpu::lora_accumulate));
  m.impl("lora_accumulate_backward", TORCH_BOX(&mbf::cpu::lora_accumulate_backward));
  m.impl("lora_group", TORCH_BOX(&mbf::cpu::lora_group));
  m.impl("lora_group_backward", TORCH_BOX(&mbf::cpu::lora_group_backward));
  m.impl("lora_linear", TORCH_BOX(&mbf::cpu::lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&mbf::cpu::lora_linear_backward));
  m.impl("lora_mlp", TORCH_BOX(&mbf::cpu::lora_mlp));
  m.impl("lora_mlp_backward", TORCH_BOX(&mbf::cpu::lora_mlp_backward));
  m.impl("merge_", TORCH_BOX(&mbf::cpu::merge_));
  m.impl("merge_with_norms_", TORCH_BOX(&mbf::cpu::merge_with_norms_));
  m.impl("mora_accumulate", TORCH_BOX(&mbf::cpu::mora_accumulate));
  m.impl("mora_accumulate_backward", TORCH_BOX(&mbf::cpu::mora_accumulate_backward));
  m.impl("orthonormal_rows", TORCH_BOX(&mbf::cpu::orthonormal_rows));
  m.impl("rsvd", TORCH_BOX(&mbf::cpu::rsvd));
  m.impl("svd_factors", TORCH_BOX(&mbf::cpu::svd_factors));
  m.impl("task_boundary_", TORCH_BOX(&mbf::cpu::task_boundary_));
}
