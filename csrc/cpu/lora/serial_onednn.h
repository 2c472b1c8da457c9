// Has oneDNN compute a product on the calling thread alone, in an order that depends on its sizes only.
//
// oneDNN chooses its blocks by how many threads OpenMP could give it, also where it is called by one of several, and
// the bits would follow. The number is set for the calling thread by the OpenMP that torch carries.
#pragma once

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace mbf::cpu {

class SerialOneDnn {
 public:
  // Whether there is such an OpenMP.
  static bool possible() { return openmp().get != nullptr && openmp().set != nullptr; }

  SerialOneDnn() : before_(possible() ? openmp().get() : 1) { set(1); }
  ~SerialOneDnn() { set(before_); }
  SerialOneDnn(const SerialOneDnn&) = delete;
  SerialOneDnn& operator=(const SerialOneDnn&) = delete;

 private:
  struct OpenMp {
    int (*get)() = nullptr;
    void (*set)(int) = nullptr;
  };

  static const OpenMp& openmp() {
    static const OpenMp found = [] {
      OpenMp functions;
#if defined(__linux__)
      if (void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD)) {
        functions.get = reinterpret_cast<int (*)()>(dlsym(torch, "omp_get_max_threads"));
        functions.set = reinterpret_cast<void (*)(int)>(dlsym(torch, "omp_set_num_threads"));
      }
#endif
      return functions;
    }();
    return found;
  }

  static void set(int threads) {
    if (possible()) openmp().set(threads);
  }

  int before_;
};

}  // namespace mbf::cpu
