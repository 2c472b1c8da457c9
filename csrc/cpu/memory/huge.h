// Huge pages for results that lie together and have not been touched.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace mbf::cpu {

constexpr int64_t kHugePage = int64_t{1} << 21;  // bytes

// The first huge page's beginning from here on.
inline const char* huge_page_from(const char* place) {
  return place + static_cast<int64_t>(-reinterpret_cast<uintptr_t>(place) & (kHugePage - 1));
}

// Asks for huge pages where [begin, end) covers some as a whole. Nothing is lost where the system has none.
inline void ask_for_huge_pages(const char* begin, const char* end) {
#ifdef __linux__
  const char* first = huge_page_from(begin);
  const char* last = end - static_cast<int64_t>(reinterpret_cast<uintptr_t>(end) & (kHugePage - 1));
  if (first < last) madvise(const_cast<char*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)end;
#endif
}

}  // namespace mbf::cpu
