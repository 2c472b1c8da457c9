// Which table of inner loops this machine runs.

#include "micro.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>

namespace mbf::cpu {
namespace {

enum class Level { kBaseline, kAvx2, kAvx512 };

Level probe() {
#if defined(__x86_64__) && defined(__GNUC__)
  const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
  const bool any = wish == nullptr || std::strcmp(wish, "default") != 0;
  const bool wide = any && (wish == nullptr || std::strcmp(wish, "avx2") != 0);
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (wide && avx512) return Level::kAvx512;
  if (any && avx2) return Level::kAvx2;
#endif
  return Level::kBaseline;
}

#if defined(__x86_64__) && defined(__GNUC__)
struct NativeHalves {
  bool bf16, fp16;
};

// CPUID leaf 7. ONEDNN_MAX_CPU_ISA, if it is set, keeps oneDNN below what the processor has: then nothing is native.
NativeHalves probe_halves() {
  unsigned a = 0, b = 0, c = 0, d = 0, last = 0;
  if (probe() != Level::kAvx512 || std::getenv("ONEDNN_MAX_CPU_ISA") != nullptr) return {false, false};
  if (!__get_cpuid_count(7, 0, &last, &b, &c, &d)) return {false, false};
  const bool amx_bf16 = (d >> 22) & 1, avx512_fp16 = (d >> 23) & 1;
  const bool avx512_bf16 = last >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && ((a >> 5) & 1);
  return {amx_bf16 || avx512_bf16, avx512_fp16};
}
#endif

#if defined(__x86_64__) && defined(__GNUC__)
// On others' processors MKL keeps to vectors of 256 bits.
bool made_by_intel() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx && c == signature_INTEL_ecx &&
         d == signature_INTEL_edx;
}
#endif

Level level() {
  static const Level found = probe();
  return found;
}

}  // namespace

template <typename C>
const Micro<C>& micro() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (level() == Level::kAvx512) return avx512::micro<C>();
  if (level() == Level::kAvx2) return avx2::micro<C>();
#endif
  return baseline::micro<C>();
}

template const Micro<float>& micro<float>();
template const Micro<double>& micro<double>();

const GemmLoops* gemm_loops() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool narrow_blas = !made_by_intel();
  if (level() == Level::kAvx512 && narrow_blas) return &avx512::gemm_loops();
  if (level() == Level::kAvx2) return &avx2::gemm_loops();
#endif
  return nullptr;
}

const char* instruction_set() {
  if (level() == Level::kAvx512) return "AVX-512";
  return level() == Level::kAvx2 ? "AVX2" : "baseline";
}

bool multiplies_natively(torch::headeronly::ScalarType type) {
#if defined(__x86_64__) && defined(__GNUC__)
  using torch::headeronly::ScalarType;
  static const NativeHalves native = probe_halves();
  if (type == ScalarType::BFloat16) return native.bf16;
  if (type == ScalarType::Half) return native.fp16;
#endif
  return false;
}

}  // namespace mbf::cpu
