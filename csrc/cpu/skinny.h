// The skinny products, those with an adapter's rank: one sweep over a wide matrix (x, dy) does all that need it.
#pragma once
#include <cstddef>
#include <vector>

#include "kernels/kernels.h"

namespace fastpeft::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Adapters that share one dropout mask (or have none): a range of rank blocks. The fields of a DoRA adapter are those
// of kernels.h's Tail; a scale stands in the forward pass alone.
struct RankGroup {
    int64_t first_rank, ranks;  // multiples of kLanes
    uint64_t seed;
    uint32_t threshold;  // 0: nothing is dropped
    size_t operand = 0;  // the base product that is its `second`, counted from 1; 0: it has none
    const float* scale = nullptr;
    void* z = nullptr;  // [rows, columns], contiguous
    DType z_dtype = {};
};

// What a sweep over a [rows, columns] matrix does; parts whose pointers are null are left out.
//   product  [rows, ranks]    = D(input) · panel_in                 (u from x; v from dy)
//   gradient [ranks, columns] = qᵀ D(input)                         (dA from x and v; dB from dy and u)
//   output   [rows, columns] (+)= D'(q · panel_out) + bias          (the low-rank part of y and of dx), group after
//                                                                    group, each with the Tail of kernels.h
struct Sweep {
    DType dtype;
    int64_t rows, columns, ranks;
    std::vector<RankGroup> groups;
    int64_t first_row = 0;  // the number that the masks give to the first row

    const void* input = nullptr;
    int64_t ld_input = 0;
    const void* panel_in = nullptr;
    float* product = nullptr;

    const float* q = nullptr;  // [rows, ranks], for gradient and output
    float* gradient = nullptr;
    int64_t ld_gradient = 0;  // at least columns, a multiple of kLanes

    const void* panel_out = nullptr;
    const float* bias = nullptr;
    void* output = nullptr;
    int64_t ld_output = 0;
    bool add = false;                  // onto the output instead of over it
    std::vector<const void*> seconds;  // [rows, columns] each, contiguous, in dtype
};

// Runs on torch's threads; the result depends on their number, not on their timing.
void run(const Kernels& kernels, const Sweep& sweep);

// Sweeps over other rows each: the large ones by all threads, one after the other, each small one by one thread.
void run(const Kernels& kernels, const std::vector<Sweep>& sweeps);

// Elements of the panel of a [rows, columns] matrix, and the packing itself.
int64_t panel_elements(int64_t rows, int64_t columns);
void pack(const Kernels& kernels, const Matrix& s, bool pairs, void* panel);

}  // namespace fastpeft::cpu
