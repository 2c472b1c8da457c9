// The table of micro.h, compiled once an instruction set by ../micro_*.cpp, which include micro.h and the few headers
// that it takes, define MBF_ISA (the namespace), MBF_BYTES (of a vector) and the block sizes below, and switch the
// target on before they include this file. Nothing of the standard library may be used in this folder: an instance
// compiled for AVX-512 would be linked into code that runs everywhere.
//
// Block sizes, so that the accumulators and operands of a tile stay in registers:
//   MBF_TILE_ROWS × MBF_TILE_VECTORS   of expand and outer
//   3 × MBF_DOT_RANKS                  of project
#pragma once

#include "activation.h"
#include "expand.h"
#include "gram.h"
#include "outer.h"
#include "philox.h"
#include "project.h"
#include "triangle.h"
#include "turn.h"

namespace mbf::cpu::MBF_ISA {
namespace {

using torch::headeronly::ScalarType;

template <typename C, typename Use>
MBF_INLINE void with_type(ScalarType type, void* data, const Use& use) {
  if constexpr (sizeof(C) == 8) {
    use(static_cast<double*>(data));
  } else if (type == ScalarType::Float) {
    use(static_cast<float*>(data));
  } else if (type == ScalarType::BFloat16) {
    use(static_cast<BFloat16*>(data));
  } else {
    use(static_cast<Half*>(data));
  }
}

template <typename C>
void project(Rows x, int64_t rows, int64_t columns, const C* a, int64_t lda, int64_t r, Mask mask, C* h) {
  with_type<C>(x.type, x.data, [&](auto* p) { project_rows<C>(p, x.ld, rows, columns, a, lda, r, mask, h); });
}

template <typename C>
void expand(Rows y, int64_t rows, int64_t columns, const C* z, int64_t r, const C* e, int64_t lde, Mask mask,
            bool add) {
  with_type<C>(y.type, y.data, [&](auto* p) { expand_rows<C>(p, y.ld, rows, columns, z, r, e, lde, mask, add); });
}

template <typename C>
void outer(Rows x, int64_t rows, int64_t columns, const C* z, int64_t r, Mask mask, Ahead ahead, C* g, int64_t ldg,
           bool add) {
  with_type<C>(x.type, x.data, [&](auto* p) { outer_rows<C>(p, x.ld, rows, columns, z, r, mask, ahead, g, ldg, add); });
}

template <typename C>
void triangle(const C* panels, int64_t r, const C* x, int64_t ldx, int64_t columns, Rows q, bool past_caches) {
  with_type<C>(q.type, q.data, [&](auto* p) { triangle_rows<C>(panels, r, x, ldx, columns, p, q.ld, past_caches); });
}

template <typename C>
void widen(const void* from, ScalarType type, int64_t n, C* to) {
  with_type<C>(type, const_cast<void*>(from), [&](auto* p) {
    int64_t i = 0;
    for (; i + kLanes<C> <= n; i += kLanes<C>) store(to + i, load(p + i));
    if (i < n) store_first<C>(to + i, load_first<C>(p + i, n - i), n - i);
  });
}

template <typename C>
void narrow(const C* from, int64_t n, void* to, ScalarType type) {
  with_type<C>(type, to, [&](auto* p) {
    int64_t i = 0;
    for (; i + kLanes<C> <= n; i += kLanes<C>) store(p + i, load(from + i));
    if (i < n) store_first<C>(p + i, load_first<C>(from + i, n - i), n - i);
  });
}

template <typename C>
void add(const void* y, ScalarType type, const C* v, C factor, int64_t n, void* out) {
  with_type<C>(type, out,
               [&](auto* p) { add_scaled<C>(static_cast<decltype(p)>(const_cast<void*>(y)), v, factor, n, p); });
}

}  // namespace

template <typename C>
const Micro<C>& micro() {
  static constexpr Micro<C> table = {kLanes<C>,         project<C>,     expand<C>, outer<C>,  gram<C>,
                                     triangle<C>,       mask_bits,      widen<C>,  narrow<C>, gated<C>,
                                     gated_backward<C>, keep_scaled<C>, turn<C>,   add<C>};
  return table;
}

template const Micro<float>& micro<float>();
template const Micro<double>& micro<double>();

}  // namespace mbf::cpu::MBF_ISA
