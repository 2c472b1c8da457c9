// CUDA's language and runtime as far as mbf's kernels use it, for a host compiler: keywords, vector types, 16-bit
// floats, barriers, the operations of a warp, atomics and mathematics. The names and their meaning are CUDA's; what
// CUDA leaves undefined (a divergent barrier, a shuffle from a lane that does not take part) is an error here.
#pragma once

#include "half.h"
#include "keywords.h"
#include "mathematics.h"
#include "runtime.h"
#include "synchronise.h"
#include "types.h"
