// The low-rank branch s · (gate ⊙ (drop(x) Aᵀ mixᵀ)) B̂ᵀ and its derivatives, in the symbols of mbf/ops/_branch.py.
//
// Rows are worked through in blocks that stay in a core's second-level cache: forward, a block of x gives h, and h goes
// into the same block of y; backward, a block of dy gives dz and its share of dB̂, and at once the same rows of x and dx
// are visited, with the dropout mask made anew in between. Row blocks are shared out among torch's threads. Sums over
// rows are taken in chunks whose number depends on the shapes only, so results do not depend on the number of threads.
#pragma once

#include <vector>

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

  // Which elements of rows `first` .. of x are kept; `bits` holds the stream.
  Mask mask(int64_t first, int64_t rows, std::vector<uint8_t>& bits) const;
  // h [rows, r] of rows of x.
  void project(Rows x, int64_t rows, Mask mask, C* h) const;
  // u = h mixᵀ and z = gate ⊙ u of rows `first` .. ; the scratch is left alone where there is no mix or gate.
  struct Routed {
    const C* u;
    const C* z;
  };
  Routed route(int64_t first, int64_t rows, const C* h, C* scratch_u, C* scratch_z) const;
  // y += s z B̂ᵀ
  void expand(Rows y, int64_t rows, const C* z) const;

 private:
  template <typename>
  friend class BranchBackward;

  int64_t gate_at(int64_t row, int64_t j) const { return (gate_rows_.empty() ? 0 : gate_rows_[row]) + j * gate_step_; }
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

// y += branch for every member; x is read once. ys[n] are the rows of member n's output, hs[n] [rows, r] receive h in
// the type of A. `first` is the number of the first row within the whole x.
template <typename C>
void add_branches(const std::vector<const Branch<C>*>& branches, Rows x, int64_t first, int64_t rows,
                  const std::vector<Rows>& ys, const std::vector<Tensor>& hs);

// The backward pass of members that share x. Rows are differentiated in any number of calls of `run`, each over whole
// chunks, then `finish` sums the chunks.
template <typename C>
class BranchBackward {
 public:
  BranchBackward(const std::vector<Branch<C>>& branches, const std::vector<Asked>& asked, int64_t rows, bool need_dx);

  int64_t chunks() const { return chunks_; }
  int64_t begin(int64_t chunk) const { return rows_ * chunk / chunks_; }

  // dys[n].data may be null: that output was not used. hs[n] as saved; x is read only for dA and may be null; dx is
  // added to (`add`) or overwritten. All start at row begin(from).
  void run(int64_t from, int64_t to, const std::vector<Rows>& dys, const std::vector<Tensor>& hs, Rows x, Rows dx,
           bool add);

  BranchGradients finish(size_t member);

 private:
  struct Sums {
    Scratch<C> dA, dBt, dmix;  // a chunk after the other: [r, d_in], [r, d_out], [r, r]
    Scratch<C> dgate;          // [rows, r]
    bool used = false;
  };
  void run_chunk(int64_t chunk, int64_t base, const std::vector<Rows>& dys, const std::vector<Tensor>& hs, Rows x,
                 Rows dx, bool add);

  const std::vector<Branch<C>>& branches_;
  const std::vector<Asked>& asked_;
  int64_t rows_, chunks_;
  bool need_dx_;
  std::vector<Sums> sums_;
};

}  // namespace mbf::cpu
