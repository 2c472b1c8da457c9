// Has BLAS compute a tile on the calling thread alone.
//
// MKL, which torch carries on x86, else splits even the sums of some products by how many threads it could have, and
// the bits would follow the number of threads. Where it is not the BLAS, nothing happens.
#pragma once

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace mbf::cpu {

class SerialBlas {
 public:
  SerialBlas() : before_(set(1)) {}
  ~SerialBlas() { set(before_); }
  SerialBlas(const SerialBlas&) = delete;
  SerialBlas& operator=(const SerialBlas&) = delete;

 private:
  using Setter = int (*)(int);

  static int set(int threads) {
#if defined(__linux__)
    static const Setter setter = [] {
      void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
      return reinterpret_cast<Setter>(torch == nullptr ? nullptr : dlsym(torch, "MKL_Set_Num_Threads_Local"));
    }();
    if (setter != nullptr) return setter(threads);
#endif
    return 0;
  }

  int before_;
};

}  // namespace mbf::cpu
