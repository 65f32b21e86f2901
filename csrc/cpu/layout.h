// Where the ranks of each adapter lie in the padded matrices of the CPU's kernels; the buffers of a call.
#pragma once
#include "../tensors.h"
#include "skinny.h"

namespace fastpeft::cpu {

at::Tensor floats(at::IntArrayRef shape);  // uninitialised
int64_t padded(int64_t n);                 // up to whole vectors
// Of a [ranks, columns] sum over so many tokens.
int64_t gradient_stride(int64_t tokens, int64_t columns);
uint64_t seed_of(const Adapters& adapters, size_t i);
at::Tensor panel(const Kernels& kernels, const at::Tensor& s, bool pairs);
// The panels of a stack [E, rows, columns] one after the other, of those alone that are wanted.
at::Tensor panels(const Kernels& kernels, const at::Tensor& stack, bool pairs, const std::vector<bool>& wanted);

// few_tokens.cpp: u and y = x Wᵀ + s u Bᵀ + bias (float32, may be undefined) for x [tokens, K]; y contiguous, float32
// or as x.
void few_tokens_product(const at::Tensor& x, const Weight& weight, const at::Tensor& bias, const Adapters& adapters,
                        const at::Tensor& u, const at::Tensor& y);

// Where each adapter's ranks lie: those without a mask side by side in the first group, each other in its own; with
// DoRA each in its own, in order, since one adapter's scale acts on those before it.
class Layout {
  public:
    // Apart: each from a multiple of kLanes on, as of different layers.
    explicit Layout(const Adapters& adapters, bool apart = false);

    int64_t rank(size_t i) const { return adapters_.A[i].size(-2); }

    // One adapter's columns of q, contiguous, and back.
    at::Tensor columns_of(const at::Tensor& q, size_t i) const;
    void put_columns(const at::Tensor& q, size_t i, const at::Tensor& columns) const;

    // All adapters as one group: in LoRA, masks are on x and dx alone, not on y and dy.
    RankGroup unmasked() const { return {.first_rank = 0, .ranks = ranks}; }

    // All A (or Bᵀ) one below the other [ranks, columns], zeros in between; a view where there is one adapter. Of
    // experts' stacks [E, ranks, columns].
    at::Tensor stacked(const std::vector<at::Tensor>& parts, bool transposed) const;

    // The panel of all A (or Bᵀ) one below the other, of adapters apart; `turned`: of its transposition.
    at::Tensor panel_of(const Kernels& kernels, const std::vector<at::Tensor>& parts, bool pairs, bool turned) const;

    // Between the padded layout q [M, ranks] of the kernels and the dense one u [M, Σ r] of the op; every adapter's
    // columns of q are multiplied with its scaling once u is taken from them.
    at::Tensor dense_then_scale_(const at::Tensor& q) const;
    void scale_(const at::Tensor& q) const;
    at::Tensor padded_from(const at::Tensor& u) const;

    // Clears the tokens that an adapter does not serve.
    void select_(const at::Tensor& q) const;

    // One adapter's gradient from the sums [ranks, columns + …] of a sweep: dA [r, columns], or dB [columns, r] scaled,
    // also by `factor` [columns] where it is given. The threads that summed the columns copy them: their caches hold
    // them.
    at::Tensor rows_of(const at::Tensor& sums, size_t i, int64_t columns) const;
    at::Tensor scaled_columns_of(const at::Tensor& sums, size_t i, int64_t columns, const at::Tensor& factor) const;

    // One adapter's part [.., r, columns] of sums [.., ranks, columns + …].
    at::Tensor part_of(const at::Tensor& sums, size_t i, int64_t columns) const;

    std::vector<RankGroup> groups;
    int64_t ranks = 0;

  private:
    template <typename F>
    void each_run(const at::Tensor& q, F f) const;

    const Adapters& adapters_;
    std::vector<int64_t> first_rank;
};

}  // namespace fastpeft::cpu
