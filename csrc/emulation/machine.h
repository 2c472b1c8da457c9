// The state of the one machine there is: a launch in progress, and the block of it that runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "runtime.h"

namespace mbf::emulation {

constexpr unsigned int kLanes = 32;

enum class State { kReady, kAtBlock, kAtWarp, kDone };

struct Fiber {
  Context context;
  std::unique_ptr<Stack> stack;
  uint3 index;
  State state;
  Site site;
  const char* operation;
  unsigned int mask;
  int source;
  bool predicate;
  Handed value, result;
};

// xorshift64*: the same draws on every machine.
class Draw {
 public:
  explicit Draw(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u | 1) {
    for (int n = 0; n < 8; ++n) (*this)(2);
  }
  uint32_t operator()(uint32_t bound) {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>(((state_ * 0x2545f4914f6cdd1du) >> 32) * bound >> 32);
  }

 private:
  uint64_t state_;
};

struct Machine {
  Machine();

  std::recursive_mutex mutex;  // one launch at a time
  uint64_t seed;
  Draw draw{0};
  std::vector<Traffic> traffic;

  Traffic* counted = nullptr;  // of the launch in progress
  std::string kernel;
  const std::function<void()>* body = nullptr;
  Context scheduler;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* current = nullptr;
  std::exception_ptr error;

  size_t threads = 0;
  std::vector<Fiber*> ready;
  size_t done = 0, at_block = 0;
  Fiber* first_at_block = nullptr;
  unsigned int waiting[kLanes] = {};  // lanes of each warp that wait for others of their warp
};

Machine& machine();

// Runs one block of the launch to its end.
void run_block(uint3 index);

std::string text(uint3 index);

// `what`, with the kernel, the block and, where one runs, the thread.
std::runtime_error error_of(const std::string& what, bool of_thread);

}  // namespace mbf::emulation
