// versions: what CUDA runtime is inside the library, and what CUDA the machine's driver is of (0 without a driver).

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <vector>

namespace {

std::vector<int64_t> versions() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  return {CUDART_VERSION, driver};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mbf_cuda, m) { m.def("versions() -> int[]"); }

STABLE_TORCH_LIBRARY_IMPL(mbf_cuda, CompositeExplicitAutograd, m) { m.impl("versions", TORCH_BOX(&versions)); }
