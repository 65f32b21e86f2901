// 4-bit weights decoded over V16, and dot products of a few tokens with the rows of W, dense or of 4 bits.
#include "float_kernels.inl"

namespace {

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

// What the codes of a block stand for, rounded. In float32 one table serves all blocks, and what is looked up is
// scaled; a narrower one is scaled and rounded itself, once a block.
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

template <DType Rounding, DType To>
inline void decode_row(BlockCodes<Rounding>& block, const FourBit& w, int64_t first, int64_t count, void* out) {
    constexpr int64_t kStep = 2 * kLanes;
    each_block(w, first, count, [&](int64_t begin, int64_t n, float scale, int64_t done) {
        block.begin(splat(scale));
        for (int64_t i = 0; i < n; i += kStep) {
            const int64_t here = smaller(kStep, n - i), from = begin + i;
            void* to = at(out, To, done + i);
            V16 v[2];
            if (from % 2 == 0 && here == kStep) {
                block.look_up(w.packed + from / 2, v);
                store_any(to, To, v[0]);
                store_any(at(to, To, kLanes), To, v[1]);
                continue;
            }
            uint8_t whole[kStep / 2] = {};  // codes that begin or end within a byte
            for (int64_t j = 0; j < here; ++j)
                whole[j / 2] |= (w.packed[(from + j) / 2] >> ((from + j) % 2 ? 0 : 4) & 15) << (j % 2 ? 0 : 4);
            block.look_up(whole, v);
            store_first(to, To, v[0], here);
            if (here > kLanes) store_first(at(to, To, kLanes), To, v[1], here - kLanes);
        }
    });
}

template <DType Rounding, DType To>
void decode_as(const FourBit& w, int64_t first, int64_t ld_w, int64_t rows, int64_t count, void* out, int64_t ld_out) {
    BlockCodes<Rounding> block(w);
    for (int64_t i = 0; i < rows; ++i)
        decode_row<Rounding, To>(block, w, first + i * ld_w, count, at(out, To, i * ld_out));
}

void decode(const FourBit& w, int64_t first, int64_t ld_w, int64_t rows, int64_t count, DType rounding, void* out,
            DType dtype, int64_t ld_out) {
    const bool wide = dtype == DType::f32;
    const auto run = rounding == DType::f32 ? decode_as<DType::f32, DType::f32>
                     : rounding == DType::bf16
                         ? (wide ? decode_as<DType::bf16, DType::f32> : decode_as<DType::bf16, DType::bf16>)
                         : (wide ? decode_as<DType::f16, DType::f32> : decode_as<DType::f16, DType::f16>);
    run(w, first, ld_w, rows, count, out, ld_out);
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
        const int64_t begin = first / 64 + g;
        const float* scales = there ? w.absmax + begin : worked_out;
        if (w.block_bits == 6)  // a loop without shifts
            for (int64_t i = 0; !there && i < count; ++i) worked_out[i] = block_scale(w, begin + i);
        else
            for (int64_t i = 0; i < count; ++i) worked_out[i] = block_scale(w, (begin + i) >> (w.block_bits - 6));
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
    dot_rows < kDotSums<8 ? kDotSums : 8>(row, tokens, q, b, bias, y, y_dtype, ld_y, begin, end);
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
