// The one list of CUDA operators: namespace mbf_cuda on GPUs, and the same files under the stand-in as mbf_emulation
// on the CPU. One line an operator in each list.

#include "ops.h"

#include <torch/csrc/stable/library.h>

#ifdef MBF_EMULATION
#define MBF_NAMESPACE mbf_emulation
#define MBF_KEY CPU
#else
#define MBF_NAMESPACE mbf_cuda
#define MBF_KEY CUDA
#endif

// STABLE_TORCH_LIBRARY makes names and strings of its arguments, which must be expanded before.
#define MBF_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define MBF_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

// The operands of the low-rank branch, as in mbf/ops/_operands.py.
#define MBF_BRANCH                                                                              \
  "Tensor A, Tensor B, float scale, Tensor? gate, Tensor? mix, float dropout_p, Tensor? seed, " \
  "Tensor? merged_B, Tensor? merge_weight"

MBF_LIBRARY(MBF_NAMESPACE, m) {
  m.def("lora_accumulate(Tensor y, Tensor x, " MBF_BRANCH ") -> (Tensor, Tensor)");
  m.def("lora_accumulate_backward(Tensor dy, Tensor h, Tensor? x, " MBF_BRANCH
        ", bool[] needs) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("lora_linear(Tensor x, Tensor weight, Tensor? bias, " MBF_BRANCH ") -> (Tensor, Tensor)");
  m.def("lora_linear_backward(Tensor dy, Tensor h, Tensor? x, Tensor weight, " MBF_BRANCH
        ", bool[] needs) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("merge_(Tensor(a!)[] merged, Tensor[] finetuned, Tensor weight) -> ()");
  m.def("merge_with_norms_(Tensor(a!)[] merged, Tensor[] finetuned, Tensor weight) -> Tensor");
  m.def("orthonormal_rows(Tensor[] A, Tensor(a!)[] Q) -> Tensor");
  m.def("sketch(Tensor seeds, int n, int columns) -> Tensor");
  m.def("svd(Tensor[] matrices) -> Tensor[]");
  m.def(
      "task_boundary_(Tensor(a!)[] merged_A, Tensor(b!)[] merged_B, Tensor(c!)[] Q, Tensor[] A, Tensor[] B, "
      "Tensor weight) -> Tensor");
}

MBF_LIBRARY_IMPL(MBF_NAMESPACE, MBF_KEY, m) {
  m.impl("lora_accumulate", TORCH_BOX(&mbf::cuda::lora_accumulate));
  m.impl("lora_accumulate_backward", TORCH_BOX(&mbf::cuda::lora_accumulate_backward));
  m.impl("lora_linear", TORCH_BOX(&mbf::cuda::lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&mbf::cuda::lora_linear_backward));
  m.impl("merge_", TORCH_BOX(&mbf::cuda::merge_));
  m.impl("merge_with_norms_", TORCH_BOX(&mbf::cuda::merge_with_norms_));
  m.impl("orthonormal_rows", TORCH_BOX(&mbf::cuda::orthonormal_rows));
  m.impl("sketch", TORCH_BOX(&mbf::cuda::sketch));
  m.impl("svd", TORCH_BOX(&mbf::cuda::svd));
  m.impl("task_boundary_", TORCH_BOX(&mbf::cuda::task_boundary_));
}
