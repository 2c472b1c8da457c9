// cpu_kernels: which of the kernels' variants this processor runs, in words.

#include "../kernels.h"
#include "amx.h"
#include "gemm.h"
#include "micro.h"

namespace mbf::cpu {

std::string cpu_kernels() {
  using torch::headeronly::ScalarType;
  std::string found = instruction_set();
  if (multiplies_natively(ScalarType::BFloat16)) found += ", native bf16";
  if (multiplies_natively(ScalarType::Half)) found += ", native fp16";
  if (amx::usable()) found += ", fp32 on AMX";
  if (gemm::usable()) found += ", own products";
  return found;
}

}  // namespace mbf::cpu
