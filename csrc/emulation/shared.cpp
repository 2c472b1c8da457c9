// Dynamic shared memory is an allocation of the very size asked for: AddressSanitizer guards it, or without it a border
// that must be intact after every block. Static shared memory is one static variable for all fibers. Such variables are
// thread-local (see __shared__ in cuda.h), because those of one library lie side by side, where they can be filled; the
// build with AddressSanitizer, which does not guard thread-local variables, has plain ones and leaves them unfilled.
#include "shared.h"

#include <link.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "runtime.h"

namespace mbf::emulation {
namespace {

constexpr unsigned char kUnset = 0xff, kBorder = 0xa5;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kBorderBytes = 0;
#else
constexpr size_t kBorderBytes = 128;
#endif

struct Aligned {
  void operator()(unsigned char* memory) const { ::operator delete[](memory, std::align_val_t(128)); }
};

struct Range {
  unsigned char* begin;
  size_t bytes;
};

std::unique_ptr<unsigned char[], Aligned> memory;
size_t dynamic_bytes = 0;
Range static_memory{nullptr, 0};

#if !defined(__SANITIZE_ADDRESS__)

thread_local unsigned char anchor[16];  // tells which library's thread-local variables are the kernels'

int find_anchored(dl_phdr_info* info, size_t, void* found) {
  for (int n = 0; n < info->dlpi_phnum; ++n) {
    if (info->dlpi_phdr[n].p_type != PT_TLS) continue;
    auto begin = static_cast<unsigned char*>(info->dlpi_tls_data);
    const size_t bytes = info->dlpi_phdr[n].p_memsz;
    if (begin == nullptr || anchor < begin || anchor >= begin + bytes) continue;
    *static_cast<Range*>(found) = {begin, bytes};
    return 1;
  }
  return 0;
}

Range find_static() {
  Range range{nullptr, 0};
  dl_iterate_phdr(find_anchored, &range);
  return range;
}

#else

Range find_static() { return {nullptr, 0}; }

#endif

}  // namespace

void* dynamic_shared() { return memory.get() + kBorderBytes; }

bool is_shared(const void* address) {
  const auto at = static_cast<const unsigned char*>(address);
  const auto dynamic = static_cast<const unsigned char*>(dynamic_shared());
  return (at >= dynamic && at < dynamic + dynamic_bytes) ||
         (at >= static_memory.begin && at < static_memory.begin + static_memory.bytes);
}

void allocate_shared(size_t bytes) {
  dynamic_bytes = bytes;
  static_memory = find_static();
  memory.reset(static_cast<unsigned char*>(::operator new[](bytes + 2 * kBorderBytes, std::align_val_t(128))));
}

void fill_shared() {
  std::memset(memory.get(), kBorder, kBorderBytes);
  std::memset(memory.get() + kBorderBytes, kUnset, dynamic_bytes);
  std::memset(memory.get() + kBorderBytes + dynamic_bytes, kBorder, kBorderBytes);
  std::fill_n(static_memory.begin, static_memory.bytes, kUnset);
}

void check_shared() {
  const auto intact = [](const unsigned char* border) {
    return std::all_of(border, border + kBorderBytes, [](unsigned char byte) { return byte == kBorder; });
  };
  if (intact(memory.get()) && intact(memory.get() + kBorderBytes + dynamic_bytes)) return;
  fail("wrote beyond the " + std::to_string(dynamic_bytes) + " bytes of its dynamic shared memory");
}

}  // namespace mbf::emulation
