// The CPU's kernels on raw pointers: a table of functions that each instruction set fills in. docs/kernels.md has the
// operations and bytes of each.
//
// All skinny products of a LoRA layer run over tiles of [kRows, kColumns] elements of a wide matrix (x, dy) that are
// first staged into contiguous scratch: converted, masked and zero-padded. Ranks come in blocks of kLanes.
// Two compute formats exist: float32, and bfloat16 pairs (float32 accumulation, two neighbours of the contracted
// dimension side by side: what dot-product and matrix-tile instructions want).
#pragma once
#include <cstdint>

#include "../../matrix.h"
#include "order64.h"

namespace fastpeft::cpu {

constexpr int64_t kLanes = 16;
constexpr int64_t kRows = 32;
constexpr int64_t kColumns = 256;
constexpr int64_t kKeepWords = kColumns / 64;  // one bit a column
constexpr int64_t kStripe = 64;                // columns of the base product's right operand that are packed at a time

// A [rows, columns] tile of a matrix in memory, its rows ld elements apart; null is a matrix of zeros.
struct Tile {
    const void* data;
    DType dtype;
    int64_t ld;
};

// What `expand` makes of its product: y = keep ∘ (product + second) + from + bias. With a scale per column (DoRA),
// z = product + (second, or from without one) is written too, and y = scale ∘ z + (from − second, with one) + bias.
struct Tail {
    const uint64_t* keep = nullptr;  // [rows][kKeepWords]; null keeps all, as it has to with a scale
    Tile from = {}, second = {};
    const float* bias = nullptr;
    const float* scale = nullptr;
    void* z = nullptr;  // null: not wanted
    DType z_dtype = {};
    int64_t ld_z = 0;
    void* y = nullptr;  // may be `from`
    DType dtype = {};
    int64_t ld_y = 0;
};

// A block of columns of a sparse matrix: the elements of row i are those from starts[i * stride] up to
// starts[i * stride + 1], each in a column of the block.
struct SparseBlock {
    const int32_t* starts;
    int64_t stride;
    const uint8_t* columns;
    const float* values;  // null where the places alone count
};

// Which of two ways is the faster with an instruction set's kernels, as bench/cpu_plans.py measured them.
struct Preferences {
    bool packs_float = false;  // float32: the product of our own, its sums shared with the low-rank part, beats a
                               // vendor's that is not tuned for the processor
    // bfloat16 pairs: packing a dense W for such sums does, from so many contracted elements on or up to so many
    // tokens.
    int64_t packs_from_depth = INT64_MAX, packs_up_to_tokens = 0;
    bool pairs_apart = false;     // bfloat16 pairs: the few elements that dropout drops, by themselves in float32, beat
                                  // a second product
    bool low_rank_first = false;  // bfloat16: the vendor's product adds onto the low-rank part at no cost
    int stripes_together = 1;     // bfloat16 pairs: of W, that meet each block of x at a time. Matrix units are faster
                                  // than x comes from the third-level cache
};

struct Kernels {
    const char* name;
    Preferences prefers;

    // Whether tiles and panels of a wide matrix of this dtype are bfloat16 pairs (2 bytes an element) or float32.
    bool (*pairs)(DType dtype);

    // Panel of S as the right operand of a product: [column blocks][rows padded to 16][16], pairs interleaved along
    // rows, zeros beyond the edges. Packs the 16 x 16 blocks [begin, end), counted down the columns.
    void (*pack)(const Matrix& s, bool pairs, void* panel, int64_t begin, int64_t end);

    // The left operand q [rows, ranks] (float32, ranks a multiple of 16) of `expand`, in compute format.
    void (*left)(const float* q, int64_t ld_q, int64_t rows, int64_t ranks, bool pairs, void* out);
    // The same q for `outer`: an opaque block of kRows times ranks elements, zero-padded.
    void (*left_outer)(const float* q, int64_t ld_q, int64_t rows, int64_t ranks, bool pairs, void* out);

    // One bit a column, set where the element is kept: words [rows][kKeepWords]. Columns start at a multiple of 8.
    void (*keep)(uint64_t seed, uint32_t threshold, int64_t row, int64_t column, int64_t rows, int64_t columns,
                 uint64_t* words);

    // Stages rows x columns elements of src (row stride ld) into a tile, dropping those whose keep bit is clear.
    void (*stage)(const void* src, DType dtype, int64_t ld, int64_t rows, int64_t columns, const uint64_t* keep,
                  void* tile);

    // out [rows, 16 blocks] += tile [rows, columns] · panel; panel blocks are panel_stride elements apart.
    void (*multiply)(const void* tile, bool pairs, int64_t rows, int64_t columns, const void* panel,
                     int64_t panel_stride, int64_t blocks, float* out, int64_t ld_out);

    // out [16 blocks, columns] += qᵀ tile, q from `left_outer`.
    void (*outer)(const void* tile, bool pairs, int64_t rows, int64_t columns, const void* q, int64_t blocks,
                  float* out, int64_t ld_out);

    // The tail on q [rows, ranks] · panel [ranks, columns]; q from `left`, panel column blocks panel_stride
    // elements apart.
    void (*expand)(const void* q, bool pairs, int64_t rows, int64_t columns, int64_t ranks, const void* panel,
                   int64_t panel_stride, const Tail& tail);

    // Squares of w + q · panel, operands as for `expand`, added onto row_sums [rows] or, where that is null, onto
    // column_sums [columns].
    void (*squares)(const void* q, bool pairs, int64_t rows, int64_t columns, int64_t ranks, const void* panel,
                    int64_t panel_stride, Tile w, float* row_sums, float* column_sums);

    // out = factor · keep ∘ scale ∘ in, all [rows, columns] in one dtype; keep [rows][kKeepWords] and the scale, one
    // number a column, may be null.
    void (*scale)(Tile in, int64_t rows, int64_t columns, const uint64_t* keep, const float* scale, float factor,
                  void* out, int64_t ld_out);

    // sums [columns] += column sums of a ∘ b.
    void (*column_dots)(Tile a, Tile b, int64_t rows, int64_t columns, float* sums);

    // The base product in float32: out [rows, 16 blocks] = x [rows, depth] · panel, or `onto` what is there; panel
    // blocks are panel_stride elements apart.
    void (*product)(const float* x, int64_t ld_x, int64_t rows, int64_t depth, const float* panel, int64_t panel_stride,
                    int64_t blocks, bool onto, float* out, int64_t ld_out);

    // Of elements that dropout drops. out [rows, 16 blocks] = x · panel, or `onto` what is there; with a `base`, for
    // the last part of the contracted dimension, factor · (base - that).
    void (*product_dropped)(const SparseBlock& x, int64_t rows, const float* panel, int64_t panel_stride,
                            int64_t blocks, bool onto, const float* base, float factor, float* out, int64_t ld_out);
    // Where `wanted` has elements: out = x [rows, depth] · Sᵀ, or `onto` what is there. S [.., depth] in blocks of
    // sixteen columns, panel_stride elements apart, zero-padded.
    void (*product_sampled)(const float* x, int64_t ld_x, const SparseBlock& wanted, int64_t rows, int64_t depth,
                            const float* panel, int64_t panel_stride, bool onto, float* out, int64_t ld_out);

    // Elements [first, first + count) of a 4-bit weight, and as many ld_w further on for each further row: value times
    // scale in float32, rounded once to `rounding`, which is as narrow as dtype or narrower.
    void (*decode)(const FourBit& w, int64_t first, int64_t ld_w, int64_t rows, int64_t count, DType rounding,
                   void* out, DType dtype, int64_t ld_out);

    // For the base product: rows [row, row + rows) and columns [column, column + kStripe) of S, with zeros beyond the
    // edges of S. In float32 the panel of `product`, sixteen columns ld_out elements behind the sixteen before.
    void (*pack_stripe_float)(const Matrix& s, int64_t row, int64_t rows, int64_t column, float* out, int64_t ld_out);
    // In bfloat16 pairs (of a bfloat16 S) [rows / 2][kStripe][2]; null where the instruction set computes in none.
    void (*pack_stripe)(const Matrix& s, int64_t row, int64_t rows, int64_t column, void* out);

    // A few tokens against rows [begin, end) of W, each row read once: y = x Wᵀ + q Bᵀ + bias, summed in float32.
    // x [tokens, K] is bfloat16 where W's dtype computes in pairs, else float32 and zero-padded to a multiple of 16;
    // q [tokens, ranks] float32, already scaled; rows of W and B are contiguous; q and bias may be null.
    void (*dot)(const void* x, int64_t ld_x, int64_t tokens, const Matrix& w, const float* q, const Matrix& b,
                const float* bias, void* y, DType y_dtype, int64_t ld_y, int64_t begin, int64_t end);

    // The same for a 4-bit W [N, columns] of whole blocks, columns a multiple of 64, decoded in registers and rounded
    // to dtype. x is [columns / 64][tokens][64], in bfloat16 where dtype computes in pairs, else in float32, each 64 in
    // the order in which decoded elements come: a table's own for float32, kEvenThenOdd for pairs.
    const Order64* float_order;
    void (*dot_four_bit)(const void* x, DType dtype, int64_t tokens, int64_t columns, const FourBit& w, const float* q,
                         const Matrix& b, const float* bias, void* y, DType y_dtype, int64_t ld_y, int64_t begin,
                         int64_t end);
};

extern const Kernels kPlain;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;  // without BF16
extern const Kernels kAvx512Bf16;
extern const Kernels kAmx;
extern const Kernels kEmulatedAmx;  // for tests, only by override
#elif defined(__aarch64__)
extern const Kernels kNeon;
extern const Kernels kNeonBf16;
#endif

// select.cpp
const Kernels& kernels();                // the fastest that the processor has, or the override
bool set_kernels(const char* name);      // "auto", a name, or "emulated_amx"; false when the processor lacks it
const char* const* available_kernels();  // null-terminated, fastest first

}  // namespace fastpeft::cpu
