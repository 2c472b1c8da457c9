#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
extern "C" void mbf_emulation_switch(void** save, void* load);
asm(R"(
.text
.type mbf_emulation_switch, @function
.hidden mbf_emulation_switch
.globl mbf_emulation_switch
mbf_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mbf_emulation_switch, .-mbf_emulation_switch
)");
#endif

namespace mbf::emulation {
namespace {

// Of a fiber that ended, only its first frame is still on its stack.
void unpoison(const Stack& stack, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack.bottom() + kStackBytes - bytes, bytes);
#endif
  (void)stack, (void)bytes;
}

void finish_switch(Context& at, const void** bottom, size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(at.fake_stack, bottom, size);
#endif
  (void)at, (void)bottom, (void)size;
}

}  // namespace

Stack::Stack() : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  base_ = mmap(nullptr, page_ + kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (base_ == MAP_FAILED || mprotect(base_, page_, PROT_NONE) != 0) throw std::bad_alloc();
}

Stack::~Stack() { munmap(base_, page_ + kStackBytes); }

void prepare(Context& context, const Stack& stack, void (*entry)()) {
  unpoison(stack, 4096);
  context.bottom = stack.bottom();
  context.size = kStackBytes;
#if defined(__x86_64__)
  auto top = reinterpret_cast<uint64_t*>(stack.bottom() + kStackBytes) - 3;  // aligned as a call leaves it
  *top = 0;                                                                  // entry's return address: it never returns
  *--top = reinterpret_cast<uint64_t>(entry);                                // where the switch returns to
  for (int saved = 0; saved < 6; ++saved) *--top = 0;
  context.stack_pointer = top;
#else
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack.bottom();
  context.context.uc_stack.ss_size = kStackBytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
#endif
}

void arrived(Context& at, Context& from) { finish_switch(at, &from.bottom, &from.size); }

void switch_to(Context& from, Context& to, bool done) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(done ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
  (void)done;
#if defined(__x86_64__)
  mbf_emulation_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  finish_switch(from, nullptr, nullptr);
}

void forget(const Stack& stack) { unpoison(stack, kStackBytes); }

}  // namespace mbf::emulation
