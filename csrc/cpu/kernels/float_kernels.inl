// Kernels in float32 arithmetic over V16, for every dtype, and the packing of both compute formats.
// Included by each translation unit after the V16 of its instruction set; everything has internal linkage.
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace {

using fastpeft::DType;
using fastpeft::FourBit;
using fastpeft::Matrix;
using fastpeft::cpu::kColumns;
using fastpeft::cpu::Kernels;
using fastpeft::cpu::kKeepWords;
using fastpeft::cpu::kLanes;
using fastpeft::cpu::kRows;
using fastpeft::cpu::kStripe;
using fastpeft::cpu::Tail;
using fastpeft::cpu::Tile;

// ---- elements of any dtype --------------------------------------------------------------------------------------

inline const char* at(const void* p, DType dtype, int64_t index) {
    return static_cast<const char*>(p) + index * (dtype == DType::f32 ? 4 : 2);
}
inline char* at(void* p, DType dtype, int64_t index) {
    return static_cast<char*>(p) + index * (dtype == DType::f32 ? 4 : 2);
}

template <DType D>
inline V16 load_as(const void* p) {
    if constexpr (D == DType::f32) return load(static_cast<const float*>(p));
    if constexpr (D == DType::bf16) return load_bf16(static_cast<const uint16_t*>(p));
    if constexpr (D == DType::f16) return load_f16(static_cast<const uint16_t*>(p));
}
inline V16 load_any(const void* p, DType dtype) {
    if (dtype == DType::bf16) return load_as<DType::bf16>(p);
    if (dtype == DType::f16) return load_as<DType::f16>(p);
    return load_as<DType::f32>(p);
}
inline V16 load_first(const void* p, DType dtype, int64_t n) {  // n of 16 elements, zeros behind them
    if (n >= kLanes) return load_any(p, dtype);
    alignas(64) char padded[64] = {};
    if (n > 0) std::memcpy(padded, p, n * (dtype == DType::f32 ? 4 : 2));
    return load_any(padded, dtype);
}
inline void store_any(void* p, DType dtype, V16 v) {
    if (dtype == DType::bf16) return store_bf16(static_cast<uint16_t*>(p), v);
    if (dtype == DType::f16) return store_f16(static_cast<uint16_t*>(p), v);
    store(static_cast<float*>(p), v);
}
inline void store_first(void* p, DType dtype, V16 v, int64_t n) {
    if (n >= kLanes) return store_any(p, dtype, v);
    alignas(64) char padded[64];
    store_any(padded, dtype, v);
    std::memcpy(p, padded, n * (dtype == DType::f32 ? 4 : 2));
}
inline uint16_t keep_bits(const uint64_t* words, int64_t column) {  // of 16 columns
    return static_cast<uint16_t>(words[column / 64] >> (column % 64));
}
inline V16 sub(V16 a, V16 b) { return fma(b, splat(-1.0f), a); }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls run<n>() for an n of 1 to Most.
template <int Most, typename Run>
inline void with_count(int64_t n, Run run) {
    if constexpr (Most > 1)
        if (n < Most) return with_count<Most - 1>(n, run);
    run.template operator()<Most>();
}

// ---- packing ----------------------------------------------------------------------------------------------------

// Sixteen rows of S from `row`, its columns `column` … + 15; zeros beyond the edges.
inline void load_block(const Matrix& s, int64_t row, int64_t column, V16 (&v)[16]) {
    const bool transposed = s.column_stride != 1;
    const int64_t rows = s.rows - row, columns = s.columns - column;
    const int64_t outer = transposed ? columns : rows, inner = transposed ? rows : columns;
    const int64_t stride = transposed ? s.column_stride : s.row_stride;
    const char* base = at(s.data, s.dtype, row * s.row_stride + column * s.column_stride);
    if (s.dtype == DType::f32 && inner >= kLanes && outer >= kLanes)
        for (int64_t i = 0; i < kLanes; ++i) v[i] = load(reinterpret_cast<const float*>(base) + i * stride);
    else
        for (int64_t i = 0; i < kLanes; ++i)
            v[i] = i < outer ? load_first(at(base, s.dtype, i * stride), s.dtype, inner) : zero();
    if (transposed) transpose(v);
}

// Calls put(sixteen rows, element of the panel at which they start) for the 16 x 16 blocks [begin, end).
template <typename Put>
inline void pack_blocks(const Matrix& s, int64_t begin, int64_t end, Put put) {
    const int64_t row_blocks = (s.rows + kLanes - 1) / kLanes;
    for (int64_t block = begin; block < end; ++block) {
        V16 v[16];
        load_block(s, block % row_blocks * kLanes, block / row_blocks * kLanes, v);
        put(v, block * kLanes * kLanes);
    }
}

void pack_float(const Matrix& s, bool, void* panel, int64_t begin, int64_t end) {
    pack_blocks(s, begin, end, [&](const V16(&v)[16], int64_t offset) {
        for (int64_t i = 0; i < kLanes; ++i) store(static_cast<float*>(panel) + offset + i * kLanes, v[i]);
    });
}

// Along the rows of W (the columns of S) sixteen streams run, which the processor foresees; down its rows, a stripe wide,
// there is nothing to foresee, and lines further down are asked for.
void pack_stripe_float(const Matrix& s, int64_t row, int64_t rows, int64_t column, float* out, int64_t ld_out) {
    constexpr int64_t kAhead = 2 * kLanes;
    const bool down = s.column_stride == 1;
    const auto pack_block = [&](int64_t c, int64_t k) {
        V16 v[16];
        load_block(s, row + k, column + c, v);
        for (int64_t i = 0; i < smaller(kLanes, rows - k); ++i)
            store(out + c / kLanes * ld_out + (k + i) * kLanes, v[i]);
    };
    if (down)
        for (int64_t k = 0; k < rows; k += kLanes) {
            for (int64_t i = 0; i < kLanes; ++i)
                for (int64_t c = 0; c < kStripe; c += kLanes)
                    __builtin_prefetch(at(s.data, s.dtype, (row + k + kAhead + i) * s.row_stride + column + c), 0, 2);
            for (int64_t c = 0; c < kStripe; c += kLanes) pack_block(c, k);
        }
    else
        for (int64_t c = 0; c < kStripe; c += kLanes)
            for (int64_t k = 0; k < rows; k += kLanes) pack_block(c, k);
}

void left_float(const float* q, int64_t ld_q, int64_t rows, int64_t ranks, bool, void* out) {
    for (int64_t m = 0; m < rows; ++m)
        std::memcpy(static_cast<float*>(out) + m * ranks, q + m * ld_q, ranks * sizeof(float));
}

// ---- dropout and staging ----------------------------------------------------------------------------------------

template <DType D>
inline void stage_float(const void* src, int64_t ld, int64_t rows, int64_t columns, const uint64_t* keep, float* tile) {
    const int64_t padded = (columns + kLanes - 1) / kLanes * kLanes;
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t c = 0; c < padded; c += kLanes) {
            const char* p = at(src, D, m * ld + c);
            V16 v = c + kLanes <= columns ? load_as<D>(p) : load_first(p, D, columns - c);
            if (keep) v = where_kept(v, keep_bits(keep + m * kKeepWords, c));
            store(tile + m * kColumns + c, v);
        }
}

void stage_float(const void* src, DType dtype, int64_t ld, int64_t rows, int64_t columns, const uint64_t* keep,
                 void* tile) {
    float* t = static_cast<float*>(tile);
    if (dtype == DType::f32) return stage_float<DType::f32>(src, ld, rows, columns, keep, t);
    if (dtype == DType::f16) return stage_float<DType::f16>(src, ld, rows, columns, keep, t);
    stage_float<DType::bf16>(src, ld, rows, columns, keep, t);
}

// ---- the three skinny products ----------------------------------------------------------------------------------
// A tile, or a part of it, is summed by itself and then added to the total: the rounding errors of a long sum grow with
// the length of the parts and with their number, not with the product of the two.

template <int Rows>
inline void multiply_rows(const float* tile, int64_t columns, const float* panel, float* out, int64_t ld_out) {
    constexpr int64_t kChain = 64;  // columns that are summed by themselves
    for (int64_t begin = 0; begin < columns; begin += kChain) {
        V16 sums[Rows];
        for (int i = 0; i < Rows; ++i) sums[i] = zero();
        for (int64_t c = begin; c < smaller(begin + kChain, columns); ++c) {
            const V16 p = load(panel + c * kLanes);
            for (int i = 0; i < Rows; ++i) sums[i] = fma(splat(tile[i * kColumns + c]), p, sums[i]);
        }
        for (int i = 0; i < Rows; ++i) store(out + i * ld_out, add(load(out + i * ld_out), sums[i]));
    }
}

void multiply_float(const void* tile, bool, int64_t rows, int64_t columns, const void* panel, int64_t panel_stride,
                    int64_t blocks, float* out, int64_t ld_out) {
    const float* t = static_cast<const float*>(tile);
    for (int64_t b = 0; b < blocks; ++b) {
        const float* p = static_cast<const float*>(panel) + b * panel_stride;
        for (int64_t m = 0; m < rows; m += kFloatRows)
            with_count<kFloatRows>(rows - m, [&]<int Rows>() {
                multiply_rows<Rows>(t + m * kColumns, columns, p, out + m * ld_out + b * kLanes, ld_out);
            });
    }
}

// The base product: Rows x Blocks accumulators stay in registers along the whole depth. The three loops over them are
// apart because the compiler keeps an array in registers only where each of its loops is one of constant bounds.
template <int Rows, int Blocks>
inline void product_rows(const float* x, int64_t ld_x, int64_t depth, const float* panel, int64_t panel_stride,
                         bool onto, float* out, int64_t ld_out) {
    V16 sums[Rows][Blocks];
    for (int i = 0; i < Rows; ++i)
        for (int b = 0; b < Blocks; ++b) sums[i][b] = zero();
    const auto step = [&](int64_t k) __attribute__((always_inline)) {
        V16 p[Blocks];
        for (int b = 0; b < Blocks; ++b) p[b] = load(panel + b * panel_stride + k * kLanes);
        for (int i = 0; i < Rows; ++i) {
            const V16 t = splat(x[i * ld_x + k]);
            for (int b = 0; b < Blocks; ++b) sums[i][b] = fma(t, p[b], sums[i][b]);
        }
    };
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
        for (int i = 0; i < Rows; ++i) __builtin_prefetch(x + (Rows + i) * ld_x + k);  // of the rows that come next
#pragma GCC unroll 8
        for (int j = 0; j < kLanes; ++j) step(k + j);
    }
    for (; k < depth; ++k) step(k);
    if (onto)
        for (int i = 0; i < Rows; ++i)
            for (int b = 0; b < Blocks; ++b) sums[i][b] = add(sums[i][b], load(out + i * ld_out + b * kLanes));
    for (int i = 0; i < Rows; ++i)
        for (int b = 0; b < Blocks; ++b) store(out + i * ld_out + b * kLanes, sums[i][b]);
}

void product(const float* x, int64_t ld_x, int64_t rows, int64_t depth, const float* panel, int64_t panel_stride,
             int64_t blocks, bool onto, float* out, int64_t ld_out) {
    constexpr int64_t kTogether =
        96 / kProductRows * kProductRows;  // rows of x that wait for the next panel in a cache
    for (int64_t first = 0; first < rows; first += kTogether) {
        const int64_t end = smaller(first + kTogether, rows);
        const auto some = [&]<int Blocks>(int64_t b) {
            const float* p = panel + b * panel_stride;
            for (int64_t m = first; m < end; m += kProductRows)
                with_count<kProductRows>(end - m, [&]<int Rows>() {
                    product_rows<Rows, Blocks>(x + m * ld_x, ld_x, depth, p, panel_stride, onto,
                                               out + m * ld_out + b * kLanes, ld_out);
                });
        };
        for (int64_t b = 0; b < blocks; b += kProductBlocks)
            with_count<kProductBlocks>(blocks - b, [&]<int Blocks>() { some.template operator()<Blocks>(b); });
    }
}

template <int Ranks>
inline void outer_ranks(const float* tile, int64_t rows, const float* q, int64_t ld_q, float* out, int64_t ld_out) {
    V16 sums[Ranks];
    for (int r = 0; r < Ranks; ++r) sums[r] = zero();
    for (int64_t m = 0; m < rows; ++m) {
        const V16 t = load(tile + m * kColumns);
        for (int r = 0; r < Ranks; ++r) sums[r] = fma(splat(q[m * ld_q + r]), t, sums[r]);
    }
    for (int r = 0; r < Ranks; ++r) store(out + r * ld_out, add(load(out + r * ld_out), sums[r]));
}

void outer_float(const void* tile, bool, int64_t rows, int64_t columns, const void* q, int64_t blocks, float* out,
                 int64_t ld_out) {
    const int64_t ranks = blocks * kLanes;
    for (int64_t c = 0; c < columns; c += kLanes)
        for (int64_t r = 0; r < ranks; r += kFloatRanks)
            outer_ranks<kFloatRanks>(static_cast<const float*>(tile) + c, rows, static_cast<const float*>(q) + r, ranks,
                                     out + r * ld_out + c, ld_out);
}

inline V16 load_tile(const Tile& tile, int64_t m, int64_t c, int64_t n) {
    return load_first(at(tile.data, tile.dtype, m * tile.ld + c), tile.dtype, n);
}

struct Put : Tail {
    int64_t columns;

    // y of 16 columns, n of them within the tile; z is written.
    V16 finish(V16 product, int64_t m, int64_t c, int64_t n) const {
        const V16 below = from.data ? load_tile(from, m, c, n) : zero();
        V16 out;
        if (scale) {
            const V16 other = second.data ? load_tile(second, m, c, n) : below;
            const V16 sum = add(product, other);
            if (z) store_first(at(z, z_dtype, m * ld_z + c), z_dtype, sum, n);
            out = mul(sum, load_first(scale + c, DType::f32, n));
            if (second.data) out = add(out, sub(below, other));
        } else {
            if (second.data) product = add(product, load_tile(second, m, c, n));
            if (keep) product = where_kept(product, keep_bits(keep + m * kKeepWords, c));
            out = add(product, below);
        }
        return bias ? add(out, load_first(bias + c, DType::f32, n)) : out;
    }
    void put(V16 product, int64_t m, int64_t c) const {
        const int64_t n = columns - c;
        store_first(at(y, dtype, m * ld_y + c), dtype, finish(product, m, c, n), n);
    }
};

// Where `squares` puts its products. A tile is summed by itself, as in the products above.
struct Squares {
    Tile w;
    bool down;  // one sum a column instead of one a row and lane
    int64_t columns;
    float* sums;

    void put(V16 product, int64_t m, int64_t c) const {
        const V16 v = add(product, load_tile(w, m, c, columns - c));
        float* target = sums + (down ? c : m * kLanes);
        store(target, fma(v, v, load(target)));
    }
};

// Calls run(sink) on one tile and adds its sums onto the totals.
template <typename Sink, typename Run>
inline void sum_squares(int64_t rows, int64_t columns, Tile w, float* row_sums, float* column_sums, Run run) {
    static_assert(kColumns <= kRows * kLanes);
    alignas(64) float sums[kRows * kLanes] = {};
    run(Sink{{w, column_sums != nullptr, columns, sums}});
    for (int64_t m = 0; row_sums && m < rows; ++m) row_sums[m] += sum(load(sums + m * kLanes));
    for (int64_t c = 0; column_sums && c < columns; ++c) column_sums[c] += sums[c];
}

template <int Rows, typename Sink>
inline void expand_rows(const float* q, int64_t m, int64_t c, int64_t ranks, const float* panel, const Sink& sink) {
    V16 sums[Rows];
    for (int i = 0; i < Rows; ++i) sums[i] = zero();
    for (int64_t r = 0; r < ranks; ++r) {
        const V16 p = load(panel + r * kLanes);
        for (int i = 0; i < Rows; ++i) sums[i] = fma(splat(q[(m + i) * ranks + r]), p, sums[i]);
    }
    for (int i = 0; i < Rows; ++i) sink.put(sums[i], m + i, c);
}

template <typename Sink>
inline void expand_tile(const void* q, int64_t rows, int64_t columns, int64_t ranks, const void* panel,
                        int64_t panel_stride, const Sink& sink) {
    const float* left_q = static_cast<const float*>(q);
    const auto panel_at = [&](int64_t c) { return static_cast<const float*>(panel) + c / kLanes * panel_stride; };
    // A few rows at a time along all columns: whole lines of y are written one after the other.
    for (int64_t m = 0; m < rows; m += kFloatRows)
        with_count<kFloatRows>(rows - m, [&]<int Rows>() {
            for (int64_t c = 0; c < columns; c += kLanes) expand_rows<Rows>(left_q, m, c, ranks, panel_at(c), sink);
        });
}

// Put where neither DoRA's scale nor a second product is: with the dtypes known, a few instructions are left.
template <DType From, DType To>
struct ShortPut : Tail {
    int64_t columns;

    void put(V16 product, int64_t m, int64_t c) const {
        const int64_t n = columns - c;
        if (keep) product = where_kept(product, keep_bits(keep + m * kKeepWords, c));
        if (n < kLanes) return put_first(product, m, c, n);
        if (from.data) product = add(product, load_as<From>(at(from.data, From, m * from.ld + c)));
        if (bias) product = add(product, load(bias + c));
        store_any(at(y, To, m * ld_y + c), To, product);
    }
    void put_first(V16 product, int64_t m, int64_t c, int64_t n) const {
        if (from.data) product = add(product, load_tile(from, m, c, n));
        if (bias) product = add(product, load_first(bias + c, DType::f32, n));
        store_first(at(y, To, m * ld_y + c), To, product, n);
    }
};

void expand_float(const void* q, bool, int64_t rows, int64_t columns, int64_t ranks, const void* panel,
                  int64_t panel_stride, const Tail& tail) {
    const auto run = [&](const auto& sink) { expand_tile(q, rows, columns, ranks, panel, panel_stride, sink); };
    const DType from = tail.from.data ? tail.from.dtype : DType::f32;
    if (tail.scale || tail.second.data || (from != DType::f32 && from != tail.dtype)) return run(Put{tail, columns});
    if (tail.dtype == DType::f32) return run(ShortPut<DType::f32, DType::f32>{tail, columns});
    if (tail.dtype == DType::bf16 && from == DType::f32) return run(ShortPut<DType::f32, DType::bf16>{tail, columns});
    if (tail.dtype == DType::bf16) return run(ShortPut<DType::bf16, DType::bf16>{tail, columns});
    if (from == DType::f32) return run(ShortPut<DType::f32, DType::f16>{tail, columns});
    run(ShortPut<DType::f16, DType::f16>{tail, columns});
}

void squares_float(const void* q, bool, int64_t rows, int64_t columns, int64_t ranks, const void* panel,
                   int64_t panel_stride, Tile w, float* row_sums, float* column_sums) {
    struct Sink : Squares {};
    sum_squares<Sink>(rows, columns, w, row_sums, column_sums,
                      [&](const Sink& sink) { expand_tile(q, rows, columns, ranks, panel, panel_stride, sink); });
}

// ---- DoRA's operands and the gradient of its scale ----------------------------------------------------------------

void scale_float(Tile in, int64_t rows, int64_t columns, const uint64_t* keep, const float* scale, float factor,
                 void* out, int64_t ld_out) {
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t c = 0; c < columns; c += kLanes) {
            const int64_t n = columns - c;
            V16 v = mul(load_tile(in, m, c, n), splat(factor));
            if (scale) v = mul(v, load_first(scale + c, DType::f32, n));
            if (keep) v = where_kept(v, keep_bits(keep + m * kKeepWords, c));
            store_first(at(out, in.dtype, m * ld_out + c), in.dtype, v, n);
        }
}

void column_dots_float(Tile a, Tile b, int64_t rows, int64_t columns, float* sums) {
    for (int64_t c = 0; c < columns; c += kLanes) {
        const int64_t n = columns - c;
        V16 sum = zero();
        for (int64_t m = 0; m < rows; ++m) sum = fma(load_tile(a, m, c, n), load_tile(b, m, c, n), sum);
        store_first(sums + c, DType::f32, add(sum, load_first(sums + c, DType::f32, n)), n);
    }
}

// ---- 4-bit weights ----------------------------------------------------------------------------------------------

inline float block_scale(const FourBit& w, int64_t block) {
    constexpr int64_t kNestedBlock = 256;
    if (w.absmax) return w.absmax[block];
    return w.code2[w.q[block]] * w.absmax2[block / kNestedBlock] + *w.offset;  // two roundings, see build.py
}
// Calls run(first, count, scale, elements before it) for the parts of [first, first + count) that share a block.
template <typename Run>
inline void each_block(const FourBit& w, int64_t first, int64_t count, Run run) {
    for (int64_t done = 0; done < count;) {
        const int64_t at = first + done, block = at >> w.block_bits;
        const int64_t n = smaller(count - done, ((block + 1) << w.block_bits) - at);
        run(at, n, block_scale(w, block), done);
        done += n;
    }
}

// What the codes of a block stand for, rounded. In float32 one table serves all blocks, and what is looked up is scaled;
// a narrower one is scaled and rounded itself, once a block.
template <DType Rounding>
struct BlockCodes {
    explicit BlockCodes(const FourBit& w) : table(load(w.code)), codes(table) {}

    void begin(V16 of_block) {
        scale = of_block;
        if constexpr (Rounding != DType::f32) {
            alignas(64) char rounded[64];
            store_any(rounded, Rounding, mul(table, scale));
            codes = Codes(load_as<Rounding>(rounded));
        }
    }
    void look_up(const uint8_t* bytes, V16 (&v)[2]) const {
        codes.look_up(bytes, v);
        if constexpr (Rounding == DType::f32)
            for (V16& some : v) some = mul(some, scale);
    }

    V16 table, scale;
    Codes codes;
};

template <DType Rounding>
void decode_as(const FourBit& w, int64_t first, int64_t count, void* out, DType dtype) {
    constexpr int64_t kStep = 2 * kLanes;
    BlockCodes<Rounding> block(w);
    each_block(w, first, count, [&](int64_t begin, int64_t n, float scale, int64_t done) {
        block.begin(splat(scale));
        for (int64_t i = 0; i < n; i += kStep) {
            const int64_t here = smaller(kStep, n - i), from = begin + i;
            const uint8_t* bytes = w.packed + from / 2;
            uint8_t moved[kStep / 2] = {};
            if (from % 2 || here < kStep) {  // into whole bytes
                for (int64_t j = 0; j < here; ++j)
                    moved[j / 2] |= (w.packed[(from + j) / 2] >> ((from + j) % 2 ? 0 : 4) & 15) << (j % 2 ? 0 : 4);
                bytes = moved;
            }
            V16 v[2];
            block.look_up(bytes, v);
            store_first(at(out, dtype, done + i), dtype, v[0], here);
            if (here > kLanes) store_first(at(out, dtype, done + i + kLanes), dtype, v[1], here - kLanes);
        }
    });
}

void decode(const FourBit& w, int64_t first, int64_t count, DType rounding, void* out, DType dtype) {
    const auto run = rounding == DType::bf16  ? decode_as<DType::bf16>
                     : rounding == DType::f16 ? decode_as<DType::f16>
                                              : decode_as<DType::f32>;
    run(w, first, count, out, dtype);
}

// ---- few tokens: dot products with the rows of W ----------------------------------------------------------------

// Tokens x kChains sums at once: chains enough to hide an addition's latency, as far as registers reach.
template <int Tokens>
constexpr int kChains = 2 * Tokens <= kDotSums ? 2 : 1;

// sums[t] += x[t] ∘ w, lane by lane; x is zero-padded to a multiple of 16.
template <DType D, int Tokens>
inline void dot_row(const float* x, int64_t ld_x, const void* w, int64_t columns, V16 (&sums)[Tokens]) {
    constexpr int Chains = kChains<Tokens>;
    V16 chains[Chains][Tokens];
    for (int i = 0; i < Chains; ++i)
        for (int t = 0; t < Tokens; ++t) chains[i][t] = zero();
    int64_t c = 0;
    for (; c + Chains * kLanes <= columns; c += Chains * kLanes)
        for (int i = 0; i < Chains; ++i) {
            const V16 v = load_as<D>(at(w, D, c + i * kLanes));
            for (int t = 0; t < Tokens; ++t) chains[i][t] = fma(v, load(x + t * ld_x + c + i * kLanes), chains[i][t]);
        }
    for (int i = 0; i < Chains; ++i)
        for (int t = 0; t < Tokens; ++t) sums[t] = add(sums[t], chains[i][t]);
    for (; c < columns; c += kLanes) {
        const V16 v = load_first(at(w, D, c), D, columns - c);
        for (int t = 0; t < Tokens; ++t) sums[t] = fma(v, load(x + t * ld_x + c), sums[t]);
    }
}

// Runs row(sums, first token, n) for each row n of W and up to Most tokens at a time, and adds the low-rank part.
template <int Most, typename Row>
void dot_rows(Row row, int64_t tokens, const float* q, const Matrix& b, const float* bias, void* y, DType y_dtype,
              int64_t ld_y, int64_t begin, int64_t end) {
    const auto some = [&]<int Tokens>(int64_t n, int64_t t0) {
        V16 sums[Tokens];
        for (int t = 0; t < Tokens; ++t) sums[t] = zero();
        row(sums, t0, n);
        for (int64_t r = 0; q && r < b.columns; r += kLanes) {
            const V16 up = load_first(at(b.data, b.dtype, n * b.row_stride + r), b.dtype, b.columns - r);
            for (int t = 0; t < Tokens; ++t)
                sums[t] = fma(up, load_first(q + (t0 + t) * b.columns + r, DType::f32, b.columns - r), sums[t]);
        }
        for (int t = 0; t < Tokens; ++t)
            store_first(at(y, y_dtype, (t0 + t) * ld_y + n), y_dtype, splat(sum(sums[t]) + (bias ? bias[n] : 0.0f)), 1);
    };
    for (int64_t n = begin; n < end; ++n)
        for (int64_t t = 0; t < tokens; t += Most)
            with_count<Most>(tokens - t, [&]<int Tokens>() { some.template operator()<Tokens>(n, t); });
}

template <DType D>
void dot_as(const void* x, int64_t ld_x, int64_t tokens, const Matrix& w, const float* q, const Matrix& b,
            const float* bias, void* y, DType y_dtype, int64_t ld_y, int64_t begin, int64_t end) {
    const auto row = [&]<int Tokens>(V16(&sums)[Tokens], int64_t t, int64_t n) {
        dot_row<D>(static_cast<const float*>(x) + t * ld_x, ld_x, at(w.data, w.dtype, n * w.row_stride), w.columns,
                   sums);
    };
    dot_rows < kDotSums<4 ? kDotSums : 4>(row, tokens, q, b, bias, y, y_dtype, ld_y, begin, end);
}

void dot_float(const void* x, int64_t ld_x, int64_t tokens, const Matrix& w, const float* q, const Matrix& b,
               const float* bias, void* y, DType y_dtype, int64_t ld_y, int64_t begin, int64_t end) {
    const auto run = w.dtype == DType::bf16  ? dot_as<DType::bf16>
                     : w.dtype == DType::f16 ? dot_as<DType::f16>
                                             : dot_as<DType::f32>;
    run(x, ld_x, tokens, w, q, b, bias, y, y_dtype, ld_y, begin, end);
}

// Runs run(group, scale) for the groups of 64 elements that begin at `first`, each within a block: the scales of many
// are worked out ahead, where no vector instruction waits for them.
template <typename Run>
inline void each_group(const FourBit& w, int64_t first, int64_t groups, Run run) {
    constexpr int64_t kAhead = 64;
    float worked_out[kAhead];
    const bool there = w.absmax && w.block_bits == 6;
    for (int64_t g = 0; g < groups; g += kAhead) {
        const int64_t count = smaller(kAhead, groups - g);
        const float* scales = there ? w.absmax + first / 64 + g : worked_out;
        for (int64_t i = 0; !there && i < count; ++i)
            worked_out[i] = block_scale(w, (first + (g + i) * 64) >> w.block_bits);
        for (int64_t i = 0; i < count; ++i) run(g + i, splat(scales[i]));
    }
}

// The row of a 4-bit weight that begins at `first` against x [Tokens, 64 groups].
template <DType Rounding, int Tokens>
inline void dot_four_bit_row(const float* x, int64_t ld_x, const FourBit& w, int64_t first, int64_t groups,
                             V16 (&sums)[Tokens]) {
    BlockCodes<Rounding> block(w);
    const uint8_t* packed = w.packed + first / 2;
    V16 more[Tokens];
    for (int t = 0; t < Tokens; ++t) more[t] = zero();
    each_group(w, first, groups, [&](int64_t g, V16 scale) {
        block.begin(scale);
        for (int64_t i = 0; i < 2; ++i) {
            V16 v[2];
            block.look_up(packed + g * 32 + i * kLanes, v);
            const float* x_part = x + g * 64 + i * 2 * kLanes;
            for (int t = 0; t < Tokens; ++t) {
                sums[t] = fma(v[0], load(x_part + t * ld_x), sums[t]);
                const V16 x1 = load(x_part + t * ld_x + kLanes);
                if constexpr (kChains<Tokens> == 2)
                    more[t] = fma(v[1], x1, more[t]);
                else
                    sums[t] = fma(v[1], x1, sums[t]);
            }
        }
    });
    for (int t = 0; t < Tokens; ++t) sums[t] = add(sums[t], more[t]);
}

template <DType Rounding>
void dot_four_bit_as(const float* x, int64_t tokens, int64_t columns, const FourBit& w, const float* q, const Matrix& b,
                     const float* bias, void* y, DType y_dtype, int64_t ld_y, int64_t begin, int64_t end) {
    const auto row = [&]<int Tokens>(V16(&sums)[Tokens], int64_t t, int64_t n) {
        dot_four_bit_row<Rounding>(x + t * columns, columns, w, n * columns, columns / 64, sums);
    };
    dot_rows<kDotSums < 8 ? kDotSums : 8>(row, tokens, q, b, bias, y, y_dtype, ld_y, begin, end);
}

void dot_four_bit_float(const void* x, DType rounding, int64_t tokens, int64_t columns, const FourBit& w,
                        const float* q, const Matrix& b, const float* bias, void* y, DType y_dtype, int64_t ld_y,
                        int64_t begin, int64_t end) {
    const auto run = rounding == DType::bf16  ? dot_four_bit_as<DType::bf16>
                     : rounding == DType::f16 ? dot_four_bit_as<DType::f16>
                                              : dot_four_bit_as<DType::f32>;
    run(static_cast<const float*>(x), tokens, columns, w, q, b, bias, y, y_dtype, ld_y, begin, end);
}

}  // namespace
