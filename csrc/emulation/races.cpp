// Races. A compiler's -fsanitize=thread has every access to memory call a function; those are defined here, and no
// sanitizer is linked. Two threads race where both touch a byte, one of them to write, with neither a barrier of their
// block nor, in one warp, a meeting of the warp in between. What two blocks touch in one launch is a race, too, unless
// the later of them has used an atomic: then it may know that the earlier is done.
//
// Only the last writer of a byte and the last two readers are known, and any atomic counts as order; so a race can go
// unseen, but what is reported is one.
#include "races.h"

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>

#include "runtime.h"

namespace mbf::emulation::races {
namespace {

// An access: when, counted in barriers of all blocks and in meetings of all warps, and by whom.
struct Access {
  uint32_t barrier = 0;  // 0: none
  uint32_t meeting = 0;
  uint32_t thread = 0;
};

struct Byte {
  Access wrote, read, read_before;
};

constexpr uintptr_t kPage = 4096;
using Page = std::array<Byte, kPage>;

struct Shadow {
  uint32_t barrier = 0, meeting = 0;
  uint32_t launch = 0, block = 0;  // the barriers at which they began
  uint32_t warps[32] = {};         // the last meeting of each warp
  bool acquired = false;           // whether the block has used an atomic
  bool atomic = false;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  uintptr_t last_number = ~uintptr_t{0};
  Page* last_page = nullptr;

  Byte& at(uintptr_t address) {
    const uintptr_t number = address / kPage;
    if (number != last_number) {
      std::unique_ptr<Page>& page = pages[number];
      if (page == nullptr) page = std::make_unique<Page>();
      last_number = number;
      last_page = page.get();
    }
    return (*last_page)[address % kPage];
  }
};

Shadow& shadow() {
  static Shadow only;
  return only;
}

bool races(const Access& before, const Access& now) {
  const Shadow& s = shadow();
  if (before.barrier < s.launch || before.barrier == 0) return false;
  if (before.barrier < s.block) return !s.acquired;
  if (before.thread == now.thread || before.barrier != now.barrier) return false;
  return before.thread / 32 != now.thread / 32 || before.meeting == now.meeting;
}

[[gnu::cold]] void report(const Access& before, const char* did, uintptr_t address, const char* does) {
  const bool shared = is_shared(reinterpret_cast<void*>(address));
  const std::string who =
      before.barrier < shadow().block ? std::string("another block") : "thread " + std::to_string(before.thread);
  abandon(std::string("race: ") + does + (shared ? " shared" : " global") + " memory that " + who + " " + did +
          (before.barrier < shadow().block ? "" : ", with no barrier in between"));
}

void touch(void* pointer, size_t bytes, bool write) {
  const int thread = running_thread();
  Shadow& s = shadow();
  if (thread < 0 || s.atomic || on_own_stack(pointer)) return;
  const auto number = static_cast<uint32_t>(thread);
  const Access now{s.barrier, s.warps[number / 32], number};
  const bool shared = is_shared(pointer);
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  for (uintptr_t n = address; n < address + bytes; ++n) {
    Byte& byte = s.at(n);
    if (shared && byte.wrote.barrier < s.block) byte.wrote = {};  // of another block, whose memory was another
    if (races(byte.wrote, now)) return report(byte.wrote, "wrote", n, write ? "writes" : "reads");
    if (!write) {
      if (byte.read.thread != number) byte.read_before = byte.read;
      byte.read = now;
      continue;
    }
    for (const Access& read : {byte.read, byte.read_before}) {
      if (shared && read.barrier < s.block) continue;
      if (races(read, now)) return report(read, "read", n, "writes");
    }
    byte.wrote = now;
  }
}

}  // namespace

void start_launch() {
  Shadow& s = shadow();
  s.pages.clear();
  s.last_number = ~uintptr_t{0};
  s.launch = s.barrier + 1;
}

void start_block() {
  Shadow& s = shadow();
  s.block = ++s.barrier;
  s.acquired = s.atomic = false;
}

void meet_block() { ++shadow().barrier; }

void meet_warp(size_t warp) { shadow().warps[warp] = ++shadow().meeting; }

void start_atomic() { shadow().atomic = shadow().acquired = true; }

void end_atomic() { shadow().atomic = false; }

}  // namespace mbf::emulation::races

#define MBF_ACCESS(bytes)                                                                       \
  void __tsan_read##bytes(void* p) { mbf::emulation::races::touch(p, bytes, false); }           \
  void __tsan_write##bytes(void* p) { mbf::emulation::races::touch(p, bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* p) { mbf::emulation::races::touch(p, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* p) { mbf::emulation::races::touch(p, bytes, true); }

// What host code in the same files does with std::atomic and with guards of static variables.
#define MBF_ATOMIC(bits, T)                                                                                         \
  T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }           \
  void __tsan_atomic##bits##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }           \
  T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); }

extern "C" {
MBF_ACCESS(1)
MBF_ACCESS(2)
MBF_ACCESS(4)
MBF_ACCESS(8)
MBF_ACCESS(16)
MBF_ATOMIC(8, char)
MBF_ATOMIC(32, int)
MBF_ATOMIC(64, long)
void __tsan_read_range(void* p, size_t bytes) { mbf::emulation::races::touch(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { mbf::emulation::races::touch(p, bytes, true); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
