// Work of uneven pieces, shared out among torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace mbf::cpu {

// Calls body(n) for every n < count; a thread that is done takes the next. So a body may not depend on who ran before.
template <typename Body>
void for_each(int64_t count, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t n = next++; n < count; n = next++) body(n);
  });
}

}  // namespace mbf::cpu
