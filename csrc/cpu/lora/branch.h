// The low-rank branch s · (gate ⊙ (drop(x) Aᵀ mixᵀ)) B̂ᵀ and its derivatives, in the symbols of mbf/ops/_branch.py.
//
// The work comes in two phases each way. Forward: h from x; then y tile by tile, each given its share of the branch as
// soon as its base product is there. Backward: dz from dy, with dB̂'s sums; then dx tile by tile, each given its share
// of the branch with the dropout mask made anew, and the same tile of x gives its share of dA. Sums over rows are taken
// in chunks that depend on the shapes only, so results do not depend on the number of threads.
#pragma once

#include <vector>

#include "grid.h"
#include "micro.h"
#include "torch.h"

namespace mbf::cpu {

// One adapter's operands, as in the schemas.
struct Operands {
  Tensor A;
  Tensor B;
  double scale;
  MaybeTensor gate;
  MaybeTensor mix;
  double dropout_p;
  MaybeTensor seed;
  MaybeTensor merged_B;
  MaybeTensor merge_weight;
};

// Which gradients a member's branch is asked for.
struct Asked {
  bool A, B, gate, mix, merged_B, merge_weight;
  bool of_B() const { return B || merged_B || merge_weight; }
  bool any() const { return A || of_B() || gate || mix; }
};

struct BranchGradients {
  MaybeTensor A, B, gate, mix, merged_B, merge_weight;
};

// The operands as the inner loops want them.
template <typename C>
class Branch {
 public:
  // `input` is x [..., d_in], whose shape the gate is broadcast against.
  Branch(const Operands& operands, const Tensor& input);

  int64_t rank() const { return r_; }
  ScalarType type() const { return type_; }  // of A, and so of h
  C keep_scale() const { return keep_scale_; }

  // Which elements of rows `first` .. and columns `column` .. of x are kept; `bits` holds the stream.
  Mask mask(int64_t first, int64_t rows, int64_t column, int64_t columns, std::vector<uint8_t>& bits) const;
  // The mask of all columns of the rows from `origin` on, for threads to write in turns: rows share no byte. `bits` has
  // mask_bytes of them; none where nothing is dropped.
  int64_t mask_bytes(int64_t rows) const { return threshold_ == 0 ? 0 : rows * mask_ld() / 8 + 16; }
  Mask mask_at(int64_t origin, const uint8_t* bits) const;
  void write_mask(int64_t origin, int64_t first, int64_t rows, uint8_t* bits) const;

  // What tiles of y begin with.
  TileStart<C> start(const C* z) const { return {z, r_, e_.get(), lde_, {}, nullptr, false}; }

  // h [rows, r] of rows of x, and z = gate ⊙ (h mixᵀ) from it. `packed` is what packed_A made, or null.
  void project(int64_t first, int64_t rows, Rows x, const C* packed, C* h, C* z, std::vector<uint8_t>& bits) const;

  // A and s B̂ as gemm.h projects on them; nothing where it is of no use.
  Scratch<C> packed_A() const { return packed(a_, lda_, d_in_); }
  Scratch<C> packed_B() const { return packed(e_.get(), lde_, d_out_); }
  // y[:, column ..] += s z B̂ᵀ[:, column ..] for rows of y and z, y beginning at that column.
  void expand(Rows y, int64_t rows, int64_t column, int64_t columns, const C* z) const;

 private:
  template <typename>
  friend class BranchBackward;

  struct Routed {
    const C* u;
    const C* z;
  };
  // u = h mixᵀ and z = gate ⊙ u; the scratch is left alone where there is no mix or gate.
  Routed route(int64_t first, int64_t rows, const C* h, C* scratch_u, C* scratch_z) const;
  int64_t mask_ld() const { return d_in_ % 8 == 0 ? d_in_ : (d_in_ + 23) / 8 * 8 + d_in_ % 8; }
  int64_t gate_at(int64_t row, int64_t j) const { return (gate_rows_.empty() ? 0 : gate_rows_[row]) + j * gate_step_; }
  Scratch<C> packed(const C* factor, int64_t ld, int64_t depth) const;
  void pack_A();
  void pack_B();
  void read_gate(const std::vector<int64_t>& lead);

  Operands operands_;
  const Micro<C>& micro_;
  int64_t r_, d_in_, d_out_;
  ScalarType type_;
  int64_t lda_, lde_;  // of A and s B̂ᵀ, padded
  Scratch<C> packed_a_, e_, mix_;
  const C* a_ = nullptr;
  double lambda_ = 1;
  Scratch<C> gate_;
  std::vector<int64_t> gate_rows_;  // where each row's gate begins; empty: all rows share one
  int64_t gate_step_ = 0;           // 0: all ranks share one
  uint64_t seed_ = 0;
  uint32_t threshold_ = 0;  // in 2^-16; 0 drops nothing
  C keep_scale_ = 1;
};

// h of every member for rows `first` .. of x, saved in the type of A in hs[n] [all rows, r] (not saved where hs is
// empty), and z in zs[n] [rows, r]; packed[n] as for Branch::project, or none at all. Serial; x is read once.
template <typename C>
void project_all(const std::vector<Branch<C>>& branches, const std::vector<Scratch<C>>& packed, Rows x, int64_t first,
                 int64_t rows, const std::vector<Tensor>& hs, const std::vector<C*>& zs);

// The backward pass of members that share x.
template <typename C>
class BranchBackward {
 public:
  BranchBackward(const std::vector<Branch<C>>& branches, const std::vector<Asked>& asked, const std::vector<bool>& used,
                 const Grid& grid, bool need_dx);

  // The chunks of rows that tiles of dx and x must have: over x's columns.
  const Grid& grid() const { return grid_; }

  // First phase, for one chunk of rows: dys[n] begins at its first row, with null data if that output was not used (in
  // no chunk, then); hs[n] [all rows, r] as saved.
  void read_dy(int64_t chunk, const std::vector<Rows>& dys, const std::vector<Tensor>& hs);
  // What it leaves for the second, dh [rows, r] times what dropout scales by: an operator may have a first phase of its
  // own that does.
  C* dh(size_t member) { return sums_[member].dh.get(); }
  // Second phase, for one tile: rows of x (null if no dA is asked) and of dx (null if not asked), both beginning at the
  // tile's first row and column; dx is added to, or overwritten by the first member.
  void visit(int64_t row_chunk, int64_t column_chunk, Rows x, Rows dx, bool add);

  // Where the tiles of dx are made whole by gemm.h: before both phases, `begin` for rows that hold the chunks; as the
  // second, dA's share and the masks of a chunk, whose first row is x's; then what tiles of dx from row `first` on
  // begin with.
  void begin(int64_t first, int64_t rows);
  void read_x(int64_t chunk, Rows x);
  TileStart<C> start(size_t member, int64_t first) const;

  BranchGradients finish(size_t member);

 private:
  struct Sums {
    Scratch<C> dA, dBt, dmix;  // a chunk after the other: [r, d_in], [r, d_out], [r, r]
    Scratch<C> dgate, dh;      // [rows, r]; dh times what dropout scales by
    Scratch<uint8_t> masks;    // of rows from masks_from_ on
    Scratch<C> packed_B;
    bool used;
  };

  const std::vector<Branch<C>>& branches_;
  const std::vector<Asked>& asked_;
  bool need_dx_;
  Grid grid_;
  std::vector<Sums> sums_;
  int64_t masks_from_ = 0;
};

}  // namespace mbf::cpu
