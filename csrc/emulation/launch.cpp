// A launch: what sizes it may have, in which order its blocks run, and what it moves.

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "machine.h"
#include "races.h"
#include "shared.h"

namespace mbf::emulation {
namespace {

constexpr size_t kMostShared = 163 * 1024;  // of sm_80, the least of what we compile for

// "merge_kernel" of "(merge_kernel<float, 4>)".
std::string base_name(const std::string& name) {
  const size_t begin = name.find_first_not_of("( ");
  const size_t end = name.find_first_of("< )", begin);
  return name.substr(begin, end == std::string::npos ? end : end - begin);
}

void check_size(dim3 grid, dim3 block, size_t shared_bytes) {
  const auto product = [](dim3 d) { return static_cast<size_t>(d.x) * d.y * d.z; };
  const auto text_of = [](dim3 d) { return text(uint3{d.x, d.y, d.z}); };
  const std::string kernel = "mbf emulation: " + machine().kernel + ": ";
  if (product(grid) == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error(kernel + "the grid is " + text_of(grid) +
                             "; 1..2^31-1, 1..65535, 1..65535 can be launched");
  }
  if (product(block) == 0 || product(block) > 1024 || block.z > 64) {
    throw std::runtime_error(kernel + "the block is " + text_of(block) + "; 1 to 1024 threads, at most 64 along z");
  }
  if (shared_bytes > kMostShared) {
    throw std::runtime_error(kernel + std::to_string(shared_bytes) + " bytes of shared memory; a block has at most " +
                             std::to_string(kMostShared));
  }
}

std::vector<uint64_t> order_of_blocks(uint64_t count) {
  Machine& m = machine();
  std::vector<uint64_t> order(count);
  for (uint64_t n = 0; n < count; ++n) order[n] = m.seed == 1 ? count - 1 - n : n;
  if (m.seed > 1) {
    for (uint64_t n = count; n > 1; --n) std::swap(order[n - 1], order[m.draw(static_cast<uint32_t>(n))]);
  }
  return order;
}

Traffic* traffic_of(const std::string& kernel) {
  std::vector<Traffic>& all = machine().traffic;
  auto found = std::find_if(all.begin(), all.end(), [&](const Traffic& entry) { return entry.kernel == kernel; });
  if (found == all.end()) {
    all.push_back({kernel});
    found = all.end() - 1;
  }
  return &*found;
}

void check_alignment(const void* address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    fail("an address that is no multiple of the " + std::to_string(alignment) + " bytes that its type needs");
  }
}

}  // namespace

Machine::Machine() : seed(0) {
  const char* of_environment = std::getenv("MBF_EMULATION_SEED");
  if (of_environment != nullptr) seed = std::strtoull(of_environment, nullptr, 10);
}

Machine& machine() {
  static Machine only;
  return only;
}

void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  Machine& m = machine();
  const std::lock_guard<std::recursive_mutex> lock(m.mutex);
  m.kernel = base_name(kernel);
  check_size(grid, block, shared_bytes);
  m.counted = traffic_of(m.kernel);
  ++m.counted->launches;
  m.draw = Draw(m.seed);
  m.body = &thread;
  gridDim = grid;
  blockDim = block;
  m.threads = static_cast<size_t>(block.x) * block.y * block.z;
  allocate_shared(shared_bytes);
  races::start_launch();
  for (const uint64_t n : order_of_blocks(static_cast<uint64_t>(grid.x) * grid.y * grid.z)) {
    const uint64_t row = n / grid.x;
    run_block({static_cast<unsigned int>(n % grid.x), static_cast<unsigned int>(row % grid.y),
               static_cast<unsigned int>(row / grid.y)});
  }
}

void set_seed(uint64_t seed) { machine().seed = seed; }

void loaded(const void* address, size_t bytes, size_t alignment) {
  check_alignment(address, alignment);
  overtake(16);
  machine().counted->loaded += static_cast<int64_t>(bytes);
}

void stored(const void* address, size_t bytes, size_t alignment) {
  check_alignment(address, alignment);
  overtake(16);
  machine().counted->stored += static_cast<int64_t>(bytes);
}

const std::vector<Traffic>& traffic() { return machine().traffic; }

void reset_traffic() { machine().traffic.clear(); }

}  // namespace mbf::emulation
