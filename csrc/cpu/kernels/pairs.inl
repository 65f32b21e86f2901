// Kernels of bfloat16 pairs over the V32 of an instruction set, whatever multiplies the pairs: packing, staging, 4-bit
// weights, dot products, the tail of `expand`. Included after V16 and V32.
#include "dot_kernels.inl"
#include "keep.inl"
#include "product_kernels.inl"

namespace {

constexpr int64_t kHalves = 2 * kLanes;  // elements of a V32

bool bf16_pairs(DType dtype) { return dtype == DType::bf16; }

// ---- packing ----------------------------------------------------------------------------------------------------

void pack(const Matrix& s, bool pairs, void* panel, int64_t begin, int64_t end) {
    if (!pairs) return pack_float(s, pairs, panel, begin, end);
    pack_blocks(s, begin, end, [&](const V16(&v)[16], int64_t offset) {
        for (int64_t i = 0; i < kLanes; i += 2)
            store_halves(static_cast<uint16_t*>(panel) + offset + i * kLanes, round_pairs(v[i], v[i + 1]));
    });
}

// Neighbouring rows lie side by side already: 16 pairs of 16 columns are a transposition of 32-bit elements.
void pack_stripe_columns(const Matrix& s, int64_t row, int64_t rows, int64_t column, uint16_t* out) {
    const int64_t stop = smaller(row + rows, s.rows);
    for (int64_t c = 0; c < kStripe; c += kLanes)
        for (int64_t k = 0; k < rows; k += kHalves) {  // along the rows of W: sixteen streams to prefetch
            V16 v[16];
            for (int64_t i = 0; i < kLanes; ++i) {
                const uint16_t* p = static_cast<const uint16_t*>(s.data) + (column + c + i) * s.column_stride + row + k;
                v[i] = column + c + i < s.columns ? as_floats(load_first_halves(p, stop - row - k)) : zero();
            }
            transpose(v);
            const int64_t pairs = smaller(kLanes, (rows - k + 1) / 2);
            for (int64_t i = 0; i < pairs; ++i) store_halves(out + ((k / 2 + i) * kStripe + c) * 2, as_halves(v[i]));
        }
}

void pack_stripe_rows(const Matrix& s, int64_t row, int64_t rows, int64_t column, uint16_t* out) {
    const Interleave interleave;
    for (int64_t k = 0; k < rows; k += 2)
        for (int64_t c = 0; c < kStripe; c += kHalves) {
            const uint16_t* p = static_cast<const uint16_t*>(s.data) + (row + k) * s.row_stride + column + c;
            const int64_t here = s.columns - column - c;
            __builtin_prefetch(p + 32 * s.row_stride, 0, 2);
            __builtin_prefetch(p + 33 * s.row_stride, 0, 2);
            const V32 even = load_first_halves(p, row + k < s.rows ? here : 0);
            const V32 odd = load_first_halves(p + s.row_stride, row + k + 1 < s.rows ? here : 0);
            uint16_t* pair = out + (k * kStripe / 2 + c) * 2;
            store_halves(pair, interleave.low(even, odd));
            store_halves(pair + kHalves, interleave.high(even, odd));
        }
}

void pack_stripe(const Matrix& s, int64_t row, int64_t rows, int64_t column, void* out) {
    const auto pack_as = s.row_stride == 1 ? pack_stripe_columns : pack_stripe_rows;
    pack_as(s, row, rows, column, static_cast<uint16_t*>(out));
}

void left(const float* q, int64_t ld_q, int64_t rows, int64_t ranks, bool pairs, void* out) {
    if (!pairs) return left_float(q, ld_q, rows, ranks, pairs, out);
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t r = 0; r < ranks; r += kLanes)
            store_bf16(static_cast<uint16_t*>(out) + m * ranks + r, load(q + m * ld_q + r));
}

// ---- 4-bit weights ----------------------------------------------------------------------------------------------

// In bfloat16 64 elements at a time, where a part starts at a whole byte.
void decode_pairs(const FourBit& w, int64_t first, int64_t ld_w, int64_t rows, int64_t count, DType rounding, void* out,
                  DType dtype, int64_t ld_out) {
    const bool whole_groups = w.block_bits >= 6 && first % 64 == 0 && ld_w % 64 == 0 && count % 64 == 0;
    if (dtype != DType::bf16 || !whole_groups) return decode(w, first, ld_w, rows, count, rounding, out, dtype, ld_out);
    const Interleave interleave;
    const V16 table = load(w.code);
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t begin = (first + i * ld_w) / 64, groups = count / 64;
        uint16_t* to = static_cast<uint16_t*>(out) + i * ld_out;
        Scales scales(w, begin + groups);
        each_group(scales, begin, groups, [&](int64_t g, V16 scale) {
            const PairCodes codes(w.packed + (begin + g) * 32, mul(table, scale));
            store_halves(to + g * 64, interleave.low(codes.even, codes.odd));
            store_halves(to + g * 64 + kHalves, interleave.high(codes.even, codes.odd));
        });
    }
}

// ---- staging ---------------------------------------------------------------------------------------------------

// A tile of bfloat16, zero-padded to 32 columns and to two rows.
void stage_pairs(const uint16_t* src, int64_t ld, int64_t rows, int64_t columns, const uint64_t* keep, uint16_t* tile) {
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t c = 0; c < columns; c += kHalves) {
            const uint16_t* p = src + m * ld + c;
            // The next tile of these rows: a row is too short a stream for the processor to foresee it.
            __builtin_prefetch(p + kColumns, 0, 2);
            V32 v = load_first_halves(p, columns - c);
            if (keep) v = where_kept(v, static_cast<uint32_t>(keep[m * kKeepWords + c / 64] >> (c % 64)));
            store_halves(tile + m * kColumns + c, v);
        }
    if (rows % 2)
        for (int64_t c = 0; c < columns; c += kHalves) store_halves(tile + rows * kColumns + c, as_halves(zero()));
}

void stage(const void* src, DType dtype, int64_t ld, int64_t rows, int64_t columns, const uint64_t* keep, void* tile) {
    if (!bf16_pairs(dtype)) return stage_float(src, dtype, ld, rows, columns, keep, tile);
    stage_pairs(static_cast<const uint16_t*>(src), ld, rows, columns, keep, static_cast<uint16_t*>(tile));
}

// ---- few tokens -------------------------------------------------------------------------------------------------

constexpr int kMostTokens = kDotSums / 2;  // at once: two sums each

template <int Tokens>
inline void dot_pair_row(const uint16_t* x, int64_t ld_x, const uint16_t* w, int64_t columns, V16 (&sums)[Tokens]) {
    V16 odd[Tokens];
    for (int t = 0; t < Tokens; ++t) odd[t] = zero();
    int64_t c = 0;
    for (; c + 2 * kHalves <= columns; c += 2 * kHalves) {
        const V32 w0 = load_halves(w + c), w1 = load_halves(w + c + kHalves);
        for (int t = 0; t < Tokens; ++t) {
            sums[t] = dot_pairs(sums[t], w0, load_halves(x + t * ld_x + c));
            odd[t] = dot_pairs(odd[t], w1, load_halves(x + t * ld_x + c + kHalves));
        }
    }
    for (; c < columns; c += kHalves) {
        const V32 w0 = load_first_halves(w + c, columns - c);
        for (int t = 0; t < Tokens; ++t)
            sums[t] = dot_pairs(sums[t], w0, load_first_halves(x + t * ld_x + c, columns - c));
    }
    for (int t = 0; t < Tokens; ++t) sums[t] = add(sums[t], odd[t]);
}

void dot(const void* x, int64_t ld_x, int64_t tokens, const Matrix& w, const float* q, const Matrix& b,
         const float* bias, void* y, DType y_dtype, int64_t ld_y, int64_t begin, int64_t end) {
    if (!bf16_pairs(w.dtype)) return dot_float(x, ld_x, tokens, w, q, b, bias, y, y_dtype, ld_y, begin, end);
    const auto row = [&]<int Tokens>(V16(&sums)[Tokens], int64_t t, int64_t n) {
        const auto* w_row = static_cast<const uint16_t*>(w.data) + n * w.row_stride;
        dot_pair_row(static_cast<const uint16_t*>(x) + t * ld_x, ld_x, w_row, w.columns, sums);
    };
    constexpr int kMost = kMostTokens < 4 ? kMostTokens : 4;
    dot_rows<kMost>(row, tokens, {q, b, bias, y, y_dtype, ld_y}, begin, end);
}

// The row of a 4-bit weight that begins with the group `first` against x [groups][ld_x / 64][64].
template <int Tokens>
inline void dot_four_bit_row(const uint16_t* x, int64_t ld_x, const FourBit& w, Scales& scales, int64_t first,
                             int64_t groups, V16 (&sums)[Tokens]) {
    const V16 table = load(w.code);
    V16 odd[Tokens];
    for (int t = 0; t < Tokens; ++t) odd[t] = zero();
    each_group(scales, first, groups, [&](int64_t g, V16 scale) {
        const PairCodes codes(w.packed + (first + g) * 32, mul(table, scale));
        for (int t = 0; t < Tokens; ++t) {
            const uint16_t* x_group = x + g * ld_x + t * 64;
            sums[t] = dot_pairs(sums[t], codes.even, load_halves(x_group));
            odd[t] = dot_pairs(odd[t], codes.odd, load_halves(x_group + kHalves));
        }
    });
    for (int t = 0; t < Tokens; ++t) sums[t] = add(sums[t], odd[t]);
}

void dot_four_bit(const void* x, DType dtype, int64_t tokens, int64_t columns, const FourBit& w, const float* q,
                  const Matrix& b, const float* bias, void* y, DType y_dtype, int64_t ld_y, int64_t begin,
                  int64_t end) {
    if (dtype != DType::bf16)
        return dot_four_bit_float(x, dtype, tokens, columns, w, q, b, bias, y, y_dtype, ld_y, begin, end);
    const int64_t groups = columns / 64;
    Scales scales(w, end * groups);
    const auto row = [&]<int Tokens>(V16(&sums)[Tokens], int64_t t, int64_t n) {
        dot_four_bit_row(static_cast<const uint16_t*>(x) + t * 64, tokens * 64, w, scales, n * groups, groups, sums);
    };
    dot_rows<kMostTokens>(row, tokens, {q, b, bias, y, y_dtype, ld_y}, begin, end);
}

// ---- the tail of expand --------------------------------------------------------------------------------------

// Two vectors of columns; where all 32 are there, bfloat16 is stored at once, and LoRA takes a short way.
struct PairPut : Put {
    bool is_short(int64_t c) const {
        return dtype == DType::bf16 && c + kHalves <= columns && from.dtype == DType::f32 && from.data && !keep &&
               !scale && !second.data && !bias;
    }
    void put_short(V16 first, V16 last, int64_t m, int64_t c) const {
        const float* sums = static_cast<const float*>(from.data) + m * from.ld + c;
        store_both(add(first, load(sums)), add(last, load(sums + kLanes)), m, c);
    }
    void put_both(V16 first, V16 last, int64_t m, int64_t c) const {
        if (dtype != DType::bf16 || c + kHalves > columns) {
            put(first, m, c);
            if (c + kLanes < columns) put(last, m, c + kLanes);
            return;
        }
        store_both(finish(first, m, c, kLanes), finish(last, m, c + kLanes, kLanes), m, c);
    }
    void store_both(V16 first, V16 last, int64_t m, int64_t c) const {
        store_halves(static_cast<uint16_t*>(y) + m * ld_y + c, round_both(first, last));
    }
};

struct PairSquares : Squares {
    bool is_short(int64_t) const { return false; }
    void put_short(V16, V16, int64_t, int64_t) const {}
    void put_both(V16 first, V16 last, int64_t m, int64_t c) const {
        if (c + kHalves > columns) {
            put(first, m, c);
            if (c + kLanes < columns) put(last, m, c + kLanes);
            return;
        }
        const uint16_t* p = static_cast<const uint16_t*>(w.data) + m * w.ld + c;
        __builtin_prefetch(p + kColumns, 0, 2);
        first = add(first, load_bf16(p));
        last = add(last, load_bf16(p + kLanes));
        if (down) {
            store(sums + c, fma(first, first, load(sums + c)));
            store(sums + c + kLanes, fma(last, last, load(sums + c + kLanes)));
        } else {
            store(sums + m * kLanes, fma(first, first, fma(last, last, load(sums + m * kLanes))));
        }
    }
};

}  // namespace
