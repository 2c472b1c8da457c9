// Stacks and the switch between them. On x86-64 the switch is a dozen instructions; elsewhere it is ucontext's, which
// asks the system for each. AddressSanitizer is told of every switch.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace mbf::emulation {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 * 1024;
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif

// Where a thread of control stopped, and the bounds of its stack.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
  const void* bottom = nullptr;
  size_t size = 0;
};

// A stack with an inaccessible page below it.
class Stack {
 public:
  Stack();
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* bottom() const { return static_cast<char*>(base_) + page_; }

 private:
  void* base_;
  size_t page_;
};

// Has `entry`, which never returns, start on `stack` when `context` is first switched to.
void prepare(Context& context, const Stack& stack, void (*entry)());

// Called first by an entry; `from`, which switched to it, learns the bounds of its own stack.
void arrived(Context& at, Context& from);

// Leaves `from` for `to`; returns when `from` is switched to again. A context that is `done` never is.
void switch_to(Context& from, Context& to, bool done = false);

// Forgets what the frames of an abandoned fiber have poisoned on its stack.
void forget(const Stack& stack);

}  // namespace mbf::emulation
