// Kernels in float32 arithmetic over V16, for every dtype, and the packing of both compute formats.
// Included by each translation unit after the V16 of its instruction set; everything has internal linkage.
#pragma once
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
using fastpeft::cpu::SparseBlock;
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
    constexpr int64_t kChain = 16;  // columns that are summed by themselves
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

// Columns [begin, end) of a tile.
template <typename Sink>
inline void expand_tile(const void* q, int64_t rows, int64_t begin, int64_t end, int64_t ranks, const void* panel,
                        int64_t panel_stride, const Sink& sink) {
    const float* left_q = static_cast<const float*>(q);
    const auto panel_at = [&](int64_t c) { return static_cast<const float*>(panel) + c / kLanes * panel_stride; };
    // A few rows at a time along all columns: whole lines of y are written one after the other.
    for (int64_t m = 0; m < rows; m += kFloatRows)
        with_count<kFloatRows>(rows - m, [&]<int Rows>() {
            for (int64_t c = begin; c < end; c += kLanes) expand_rows<Rows>(left_q, m, c, ranks, panel_at(c), sink);
        });
}

// The same for whole vectors where it is known what the tail is: a few instructions. From is the dtype of what is
// added, To that of y; Plain: neither a second product nor DoRA's scale.
template <DType From, DType To, bool Plain>
struct WholePut : Put {
    void put(V16 product, int64_t m, int64_t c) const {
        V16 out;
        if constexpr (Plain) {
            if (keep) product = where_kept(product, keep_bits(keep + m * kKeepWords, c));
            out = from.data ? add(product, load_as<From>(at(from.data, From, m * from.ld + c))) : product;
        } else {
            const V16 below = load_as<From>(at(from.data, From, m * from.ld + c));
            const V16 other = second.data ? load_as<From>(at(second.data, From, m * second.ld + c)) : below;
            const V16 sum = add(product, other);
            if (z) store_any(at(z, z_dtype, m * ld_z + c), z_dtype, sum);
            out = mul(sum, load(scale + c));
            if (second.data) out = add(out, sub(below, other));
        }
        if (bias) out = add(out, load(bias + c));
        store_any(at(y, To, m * ld_y + c), To, out);
    }
};

void expand_float(const void* q, bool, int64_t rows, int64_t columns, int64_t ranks, const void* panel,
                  int64_t panel_stride, const Tail& tail) {
    const auto run = [&](const auto& sink, int64_t begin, int64_t end) {
        if (begin < end) expand_tile(q, rows, begin, end, ranks, panel, panel_stride, sink);
    };
    const Put any{tail, columns};
    const auto run_as = [&]<DType From, DType To>() {
        const int64_t whole = columns / kLanes * kLanes;
        if (!tail.scale && !tail.second.data)
            run(WholePut<From, To, true>{any}, 0, whole);
        else if (tail.scale && tail.from.data && (!tail.second.data || tail.second.dtype == From))
            run(WholePut<From, To, false>{any}, 0, whole);
        else
            return run(any, 0, columns);
        run(any, whole, columns);
    };
    const DType from = tail.from.data ? tail.from.dtype : DType::f32, to = tail.dtype;
    if (from == DType::f32 && to == DType::f32) return run_as.template operator()<DType::f32, DType::f32>();
    if (from == DType::f32 && to == DType::bf16) return run_as.template operator()<DType::f32, DType::bf16>();
    if (from == DType::f32) return run_as.template operator()<DType::f32, DType::f16>();
    if (from == DType::bf16 && to == from) return run_as.template operator()<DType::bf16, DType::bf16>();
    if (from == DType::f16 && to == from) return run_as.template operator()<DType::f16, DType::f16>();
    run(any, 0, columns);
}

void squares_float(const void* q, bool, int64_t rows, int64_t columns, int64_t ranks, const void* panel,
                   int64_t panel_stride, Tile w, float* row_sums, float* column_sums) {
    struct Sink : Squares {};
    sum_squares<Sink>(rows, columns, w, row_sums, column_sums,
                      [&](const Sink& sink) { expand_tile(q, rows, 0, columns, ranks, panel, panel_stride, sink); });
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

}  // namespace
