// Which thread touched which byte, for kernels that are compiled to say so; see races.cpp.
#pragma once

#include <cstddef>

namespace mbf::emulation::races {

void start_launch();
void start_block();
void meet_block();
void meet_warp(size_t warp);  // some of its lanes
void start_atomic();          // until end_atomic, what the thread touches is no race
void end_atomic();

}  // namespace mbf::emulation::races
