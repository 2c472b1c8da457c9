// Shared memory. At the start of every block all of it is bytes 0xff: NaN in every floating dtype, -1 in integers.
#pragma once

#include <cstddef>

namespace mbf::emulation {

void allocate_shared(size_t dynamic_bytes);  // at the start of a launch
void fill_shared();                          // at the start of a block
void check_shared();                         // at its end: whether it wrote beyond its dynamic shared memory

}  // namespace mbf::emulation
