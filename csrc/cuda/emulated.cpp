// Operators that only the emulated library has: the seed of the order of threads, and what its kernels moved.

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../emulation/runtime.h"

namespace mbf::emulation {
namespace {

void seed(int64_t value) { set_seed(static_cast<uint64_t>(value)); }

// [launches, bytes loaded, bytes stored] since the last reset.
std::vector<int64_t> counters() {
  std::vector<int64_t> sums(3, 0);
  for (const Traffic& kernel : traffic()) {
    sums[0] += kernel.launches;
    sums[1] += kernel.loaded;
    sums[2] += kernel.stored;
  }
  return sums;
}

// A line "name launches loaded stored" for each kernel.
std::string kernels() {
  std::string lines;
  for (const Traffic& kernel : traffic()) {
    lines += kernel.kernel + " " + std::to_string(kernel.launches) + " " + std::to_string(kernel.loaded) + " " +
             std::to_string(kernel.stored) + "\n";
  }
  return lines;
}

}  // namespace
}  // namespace mbf::emulation

STABLE_TORCH_LIBRARY_FRAGMENT(mbf_emulation, m) {
  m.def("seed(int value) -> ()");
  m.def("counters() -> int[]");
  m.def("kernels() -> str");
  m.def("reset_counters() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mbf_emulation, CompositeExplicitAutograd, m) {
  m.impl("seed", TORCH_BOX(&mbf::emulation::seed));
  m.impl("counters", TORCH_BOX(&mbf::emulation::counters));
  m.impl("kernels", TORCH_BOX(&mbf::emulation::kernels));
  m.impl("reset_counters", TORCH_BOX(&mbf::emulation::reset_traffic));
}
