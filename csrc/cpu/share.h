// Work of uneven pieces, shared out among torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace mbf::cpu {

// Calls body(n) for every n < count, so that a body may not depend on who ran before. Every thread begins a stretch of
// its own, whose results so lie apart (the first touch of a huge page, which clears it, is nobody else's wait), and
// goes on with what the others have left.
template <typename Body>
void for_each(int64_t count, const Body& body) {
  struct alignas(64) Stretch {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  std::vector<Stretch> stretches(threads);
  for (int64_t t = 0; t < threads; ++t) {
    stretches[t].next = count * t / threads;
    stretches[t].end = count * (t + 1) / threads;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    for (int64_t t = 0; t < threads; ++t) {
      Stretch& here = stretches[(first + t) % threads];
      for (int64_t n = here.next++; n < here.end; n = here.next++) body(n);
    }
  });
}

}  // namespace mbf::cpu
