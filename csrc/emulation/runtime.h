// The machine that runs a kernel on the host: the threads of a block as fibers of one thread of the system.
//
// A fiber runs until it meets the others (a barrier, a shuffle, a vote) or may be overtaken (an atomic, a load or store
// of global memory); which goes on then is drawn from a seed, so that code which depends on an order that CUDA does not
// promise gives another result under some seed. Blocks run one after another, in an order of the seed's, too; a kernel
// whose blocks wait for each other does not end here. Memory is sequentially consistent: fences do nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

struct uint3 {
  unsigned int x, y, z;
};

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace mbf::emulation {

// A place in a kernel's source.
struct Site {
  const char* file;
  int line;
};

// Runs `thread` once for every thread of the grid, and throws std::runtime_error where the kernel breaks a rule.
void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

// The launch's dynamic shared memory, of exactly as many bytes as were asked for.
void* dynamic_shared();
bool is_shared(const void* address);

// Ends the launch with an error that names the kernel, the block and the thread.
[[noreturn]] void fail(const std::string& what);

// The same without an exception, for code that the compiler takes to throw none; does not return to the kernel.
void abandon(const std::string& what);

// The number of the thread that runs in its block, or -1 outside of kernels.
int running_thread();
bool on_own_stack(const void* address);

// The seed of all later launches. 0 runs threads in their order and 1 in the reverse, both without being overtaken;
// any other draws. Initially that of the environment's MBF_EMULATION_SEED, or 0.
void set_seed(uint64_t seed);

// A point where other threads may go on before this one.
void overtake(unsigned int one_in);

// __syncthreads: how many threads of the block came with a true `predicate`.
int meet_block(Site site, const char* operation, bool predicate);

// The operations of a warp: lanes of `mask` hand in 16 bytes and a lane whose bytes they want.
struct Handed {
  uint64_t bits[2];
  unsigned int votes;  // the lanes whose predicate was true
};
Handed meet_warp(Site site, const char* operation, unsigned int mask, Handed value, int source, bool predicate);

int lane();

// A site's access to global memory: what is counted, and whether `address` is a multiple of `alignment`.
void loaded(const void* address, size_t bytes, size_t alignment);
void stored(const void* address, size_t bytes, size_t alignment);

// What was launched since the last reset, kernel by kernel in the order of their first launch.
struct Traffic {
  std::string kernel;
  int64_t launches = 0, loaded = 0, stored = 0;  // bytes
};
const std::vector<Traffic>& traffic();
void reset_traffic();

}  // namespace mbf::emulation
