// One block: which of its fibers runs, where they meet, and what it is when they do not.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "machine.h"
#include "races.h"
#include "shared.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace mbf::emulation {
namespace {

// "__syncthreads (merge.cu:40)"
std::string text(const char* operation, const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  const char* file = slash == nullptr ? site.file : slash + 1;
  return std::string(operation) + " (" + file + ":" + std::to_string(site.line) + ")";
}

size_t number_of(const Fiber& fiber) {
  return fiber.index.x +
         static_cast<size_t>(blockDim.x) * (fiber.index.y + static_cast<size_t>(blockDim.y) * fiber.index.z);
}

// The first frame of a fiber. Nothing of its own is on its stack when it leaves for good.
void enter() {
  Machine& m = machine();
  arrived(m.current->context, m.scheduler);
  try {
    (*m.body)();
  } catch (...) {
    m.error = std::current_exception();
  }
  m.current->state = State::kDone;
  switch_to(m.current->context, m.scheduler, true);
  std::abort();
}

// Back to the scheduler, in the state that the current fiber has been given.
void leave() {
  Machine& m = machine();
  switch_to(m.current->context, m.scheduler);
}

void make_ready(const std::vector<Fiber*>& fibers) {
  Machine& m = machine();
  // The last of the list is taken first, unless the seed draws.
  if (m.seed == 1) {
    m.ready.insert(m.ready.end(), fibers.begin(), fibers.end());
  } else {
    m.ready.insert(m.ready.end(), fibers.rbegin(), fibers.rend());
  }
  for (Fiber* fiber : fibers) fiber->state = State::kReady;
}

Fiber* next_ready() {
  Machine& m = machine();
  if (m.seed > 1) std::swap(m.ready[m.draw(static_cast<uint32_t>(m.ready.size()))], m.ready.back());
  Fiber* fiber = m.ready.back();
  m.ready.pop_back();
  return fiber;
}

std::vector<Fiber*> all_of_block() {
  std::vector<Fiber*> found;
  for (size_t n = 0; n < machine().threads; ++n) found.push_back(machine().fibers[n].get());
  return found;
}

void open_block_barrier() {
  Machine& m = machine();
  int count = 0;
  for (size_t n = 0; n < m.threads; ++n) count += m.fibers[n]->predicate;
  for (size_t n = 0; n < m.threads; ++n) m.fibers[n]->source = count;
  m.at_block = 0;
  races::meet_block();
  make_ready(all_of_block());
}

// Lets the lanes of `mask` in `warp` go on where all of them have come to the same place.
void try_warp(size_t warp, unsigned int mask) {
  Machine& m = machine();
  const size_t first = warp * kLanes;
  if ((m.waiting[warp] & mask) != mask) return;
  std::vector<Fiber*> lanes;
  unsigned int votes = 0;
  for (unsigned int lane = 0; lane < kLanes; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    Fiber* fiber = m.fibers[first + lane].get();
    votes |= fiber->predicate ? 1u << lane : 0;
    lanes.push_back(fiber);
    const Fiber& other = *lanes.front();
    const bool same = fiber->mask == other.mask && fiber->operation == other.operation &&
                      fiber->site.line == other.site.line && fiber->site.file == other.site.file;
    if (!same) return;
  }
  for (Fiber* fiber : lanes) {
    fiber->result = m.fibers[first + static_cast<size_t>(fiber->source)]->value;
    fiber->result.votes = votes;
  }
  m.waiting[warp] &= ~mask;
  races::meet_warp(warp);
  make_ready(lanes);
}

// "3 have left the kernel; 61 wait at __syncthreads (merge.cu:40)", for when no thread can go on.
std::string whereabouts() {
  Machine& m = machine();
  std::vector<std::pair<std::string, int>> places;
  for (size_t n = 0; n < m.threads; ++n) {
    const Fiber& fiber = *m.fibers[n];
    const std::string place =
        fiber.state == State::kDone ? "have left the kernel" : "wait at " + text(fiber.operation, fiber.site);
    auto found = std::find_if(places.begin(), places.end(), [&](const auto& entry) { return entry.first == place; });
    if (found == places.end()) found = places.insert(places.end(), {place, 0});
    ++found->second;
  }
  std::string all;
  for (const auto& [place, count] : places) all += (all.empty() ? "" : "; ") + std::to_string(count) + " " + place;
  return all;
}

void resume(Fiber* fiber) {
  Machine& m = machine();
  m.current = fiber;
  threadIdx = fiber->index;
  switch_to(m.scheduler, fiber->context);
  m.current = nullptr;
}

void settle(Fiber* fiber) {
  Machine& m = machine();
  switch (fiber->state) {
    case State::kReady:
      m.ready.push_back(fiber);
      break;
    case State::kAtBlock:
      if (m.at_block == 0) m.first_at_block = fiber;
      if (++m.at_block == m.threads) open_block_barrier();
      break;
    case State::kAtWarp: {
      const size_t number = number_of(*fiber);
      m.waiting[number / kLanes] |= 1u << (number % kLanes);
      try_warp(number / kLanes, fiber->mask);
      break;
    }
    case State::kDone:
      ++m.done;
      break;
  }
}

void prepare_block(uint3 index) {
  Machine& m = machine();
  blockIdx = index;
  m.done = m.at_block = 0;
  std::fill(std::begin(m.waiting), std::end(m.waiting), 0u);
  size_t n = 0;
  for (unsigned int z = 0; z < blockDim.z; ++z) {
    for (unsigned int y = 0; y < blockDim.y; ++y) {
      for (unsigned int x = 0; x < blockDim.x; ++x, ++n) {
        if (n == m.fibers.size()) {
          m.fibers.push_back(std::make_unique<Fiber>());
          m.fibers[n]->stack = std::make_unique<Stack>();
        }
        m.fibers[n]->index = {x, y, z};
        prepare(m.fibers[n]->context, *m.fibers[n]->stack, enter);
      }
    }
  }
  m.ready.clear();
  make_ready(all_of_block());
}

}  // namespace

void run_block(uint3 index) {
  Machine& m = machine();
  fill_shared();
  races::start_block();
  prepare_block(index);
  while (!m.ready.empty()) {
    Fiber* fiber = next_ready();
    resume(fiber);
    if (m.error != nullptr) break;
    settle(fiber);
  }
  if (m.error == nullptr && m.done == m.threads) return check_shared();
  for (size_t n = 0; n < m.threads; ++n) forget(*m.fibers[n]->stack);
  if (m.error != nullptr) std::rethrow_exception(std::exchange(m.error, nullptr));
  throw error_of("divergence: of " + std::to_string(m.threads) + " threads " + whereabouts(), false);
}

std::string text(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

std::runtime_error error_of(const std::string& what, bool of_thread) {
  Machine& m = machine();
  const std::string place = ", block " + text(blockIdx) + (of_thread ? ", thread " + text(threadIdx) : "");
  return std::runtime_error("mbf emulation: " + m.kernel + place + ": " + what);
}

void fail(const std::string& what) { throw error_of(what, true); }

void abandon(const std::string& what) {
  machine().error = std::make_exception_ptr(error_of(what, true));
  leave();
}

int running_thread() {
  const Fiber* current = machine().current;
  return current == nullptr ? -1 : static_cast<int>(number_of(*current));
}

bool on_own_stack(const void* address) {
  const auto at = static_cast<const char*>(address);
  const char* bottom = machine().current->stack->bottom();
  return at >= bottom && at < bottom + kStackBytes;
}

int lane() { return static_cast<int>(number_of(*machine().current) % kLanes); }

void overtake(unsigned int one_in) {
  Machine& m = machine();
  if (m.seed > 1 && m.draw(one_in) == 0) leave();
}

int meet_block(Site site, const char* operation, bool predicate) {
  Machine& m = machine();
  Fiber& self = *m.current;
  if (m.at_block > 0) {
    const Fiber& other = *m.first_at_block;
    if (other.site.line != site.line || std::strcmp(other.site.file, site.file) != 0) {
      fail("divergence: comes to " + text(operation, site) + " while thread " + text(other.index) + " waits at " +
           text(other.operation, other.site));
    }
  }
  self.site = site;
  self.operation = operation;
  self.predicate = predicate;
  self.state = State::kAtBlock;
  leave();
  return self.source;
}

Handed meet_warp(Site site, const char* operation, unsigned int mask, Handed value, int source, bool predicate) {
  Machine& m = machine();
  Fiber& self = *m.current;
  const size_t number = number_of(self);
  const size_t left = m.threads - number / kLanes * kLanes;  // lanes of a last warp that is not full
  const unsigned int own = 1u << (number % kLanes);
  if (left < kLanes) mask &= (1u << left) - 1;
  if ((mask & own) == 0) fail(text(operation, site) + ": the mask leaves out the thread that calls");
  if (source < 0 || source >= static_cast<int>(kLanes) || (mask >> source & 1) == 0) {
    fail(text(operation, site) + ": reads lane " + std::to_string(source) + ", which the mask leaves out");
  }
  self.site = site;
  self.operation = operation;
  self.mask = mask;
  self.value = value;
  self.source = source;
  self.predicate = predicate;
  self.state = State::kAtWarp;
  leave();
  return self.result;
}

}  // namespace mbf::emulation
