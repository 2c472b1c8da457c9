// Faults to be caught, one a function: what the sanitizers would say of the extension, were it to do the same. Built
// with its flags (SANITIZER_FLAGS in setup.py) and called by test_planted.py.

#include <cstdint>
#include <cstdlib>
#include <limits>

#define PLANTED extern "C" __attribute__((visibility("default"), noinline))

// Reads the number after the last.
PLANTED float planted_overrun(const float* numbers, int64_t count) {
  float sum = 0;
  for (int64_t n = 0; n <= count; ++n) sum += numbers[n];
  return sum;
}

// Writes the number after the last.
PLANTED void planted_overwrite(float* numbers, int64_t count) {
  for (int64_t n = 0; n <= count; ++n) numbers[n] = 1;
}

// Divides, as sizes of zero once had the extension do.
PLANTED int64_t planted_division(int64_t size, int64_t by) { return (size + by - 1) / by; }

// Overflows a signed sum.
PLANTED int64_t planted_overflow(int64_t size) { return std::numeric_limits<int64_t>::max() + size; }

// Forgets what it allocated, ten times; a register or the stack may still hold the last.
PLANTED void planted_leak(int64_t size) {
  volatile char* forgotten = nullptr;
  for (int n = 0; n < 10; ++n) {
    forgotten = static_cast<char*>(std::malloc(static_cast<size_t>(size)));
    forgotten[0] = 1;
  }
}

// Does nothing wrong.
PLANTED float planted_right(const float* numbers, int64_t count) {
  float sum = 0;
  for (int64_t n = 0; n < count; ++n) sum += numbers[n];
  return sum;
}
