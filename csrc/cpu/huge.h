// Huge pages for results that lie together and have not been touched.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace mbf::cpu {

// Asks for huge pages where [begin, end) covers some as a whole. Nothing is lost where the system has none.
inline void ask_for_huge_pages(const char* begin, const char* end) {
#ifdef __linux__
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t last = reinterpret_cast<uintptr_t>(end) & ~(kHuge - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)end;
#endif
}

}  // namespace mbf::cpu
