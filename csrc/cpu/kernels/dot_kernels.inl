// 4-bit weights decoded over V16, and dot products of a few tokens with the rows of W, dense or of 4 bits.
#include <type_traits>

#include "float_kernels.inl"

namespace {

// ---- 4-bit weights ----------------------------------------------------------------------------------------------

constexpr int64_t kNestedBlock = 256;

inline float block_scale(const FourBit& w, int64_t block) {
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
template <DType Rounding, typename Table>
struct BlockCodesOf {
    explicit BlockCodesOf(const FourBit& w) : table(load(w.code)), codes(table) {}

    void begin(V16 of_block) {
        scale = of_block;
        if constexpr (Rounding == DType::bf16) {
            codes = Table(bf16_rounded(mul(table, scale)));
        } else if constexpr (Rounding == DType::f16) {
            alignas(64) char rounded[64];
            store_any(rounded, Rounding, mul(table, scale));
            codes = Table(load_as<Rounding>(rounded));
        }
    }
    void look_up(const uint8_t* bytes, V16 (&v)[2]) const {
        codes.look_up(bytes, v);
        if constexpr (Rounding == DType::f32)
            for (V16& some : v) some = mul(some, scale);
    }
    // In float32 not yet scaled.
    [[gnu::always_inline]] void look_up_64(const uint8_t* bytes, V16 (&v)[4]) const { codes.look_up_64(bytes, v); }

    V16 table, scale;
    Table codes;
};
template <DType Rounding>
using BlockCodes = BlockCodesOf<Rounding, std::conditional_t<Rounding == DType::bf16, Bf16Codes, Codes>>;

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

// Rows of W, ld_w elements apart, against one token: so many streams that memory is kept busy.
template <DType D, int Rows>
inline void dot_one_token(const float* x, const void* w, int64_t ld_w, int64_t columns, V16 (&sums)[Rows]) {
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) {
        const V16 v = load(x + c);
        for (int i = 0; i < Rows; ++i) sums[i] = fma(load_as<D>(at(w, D, i * ld_w + c)), v, sums[i]);
    }
    if (c < columns) {
        const V16 v = load(x + c);
        for (int i = 0; i < Rows; ++i) sums[i] = fma(load_first(at(w, D, i * ld_w + c), D, columns - c), v, sums[i]);
    }
}

// What follows the sum over row n of W for token t: the low-rank part, the bias, y.
struct DotTail {
    const float* q;
    const Matrix& b;
    const float* bias;
    void* y;
    DType y_dtype;
    int64_t ld_y;

    void put(V16 sums, int64_t t, int64_t n) const {
        for (int64_t r = 0; q && r < b.columns; r += kLanes) {
            const V16 up = load_first(at(b.data, b.dtype, n * b.row_stride + r), b.dtype, b.columns - r);
            sums = fma(up, load_first(q + t * b.columns + r, DType::f32, b.columns - r), sums);
        }
        const float value = sum(sums) + (bias ? bias[n] : 0.0f);
        if (y_dtype == DType::f32)
            static_cast<float*>(y)[t * ld_y + n] = value;
        else
            store_first(at(y, y_dtype, t * ld_y + n), y_dtype, splat(value), 1);
    }
};

// Runs row(sums, first token, n) for each row n of W and up to Most tokens at a time, and the tail.
template <int Most, typename Row>
void dot_rows(Row row, int64_t tokens, const DotTail& tail, int64_t begin, int64_t end) {
    const auto some = [&]<int Tokens>(int64_t n, int64_t t0) {
        V16 sums[Tokens];
        for (int t = 0; t < Tokens; ++t) sums[t] = zero();
        row(sums, t0, n);
        for (int t = 0; t < Tokens; ++t) tail.put(sums[t], t0 + t, n);
    };
    for (int64_t n = begin; n < end; ++n)
        for (int64_t t = 0; t < tokens; t += Most)
            with_count<Most>(tokens - t, [&]<int Tokens>() { some.template operator()<Tokens>(n, t); });
}

template <DType D>
void dot_as(const void* x, int64_t ld_x, int64_t tokens, const Matrix& w, const DotTail& tail, int64_t begin,
            int64_t end) {
    constexpr int kMost = kDotSums < 4 ? kDotSums : 4;
    if (tokens == 1)
        for (; begin + kMost <= end; begin += kMost) {
            V16 sums[kMost];
            for (int i = 0; i < kMost; ++i) sums[i] = zero();
            dot_one_token<D>(static_cast<const float*>(x), at(w.data, D, begin * w.row_stride), w.row_stride, w.columns,
                             sums);
            for (int i = 0; i < kMost; ++i) tail.put(sums[i], 0, begin + i);
        }
    const auto row = [&]<int Tokens>(V16(&sums)[Tokens], int64_t t, int64_t n) {
        dot_row<D>(static_cast<const float*>(x) + t * ld_x, ld_x, at(w.data, w.dtype, n * w.row_stride), w.columns,
                   sums);
    };
    dot_rows<kMost>(row, tokens, tail, begin, end);
}

void dot_float(const void* x, int64_t ld_x, int64_t tokens, const Matrix& w, const float* q, const Matrix& b,
               const float* bias, void* y, DType y_dtype, int64_t ld_y, int64_t begin, int64_t end) {
    const auto run = w.dtype == DType::bf16  ? dot_as<DType::bf16>
                     : w.dtype == DType::f16 ? dot_as<DType::f16>
                                             : dot_as<DType::f32>;
    run(x, ld_x, tokens, w, {q, b, bias, y, y_dtype, ld_y}, begin, end);
}

// The scales of groups of 64 elements, each within a block, of the groups before `last`. Those of nested statistics are
// worked out for many groups ahead, some rows of W at a time, so that no product waits for them.
class Scales {
  public:
    Scales(const FourBit& w, int64_t last) : w_(w), there_(w.absmax && w.block_bits == 6), last_(last) {}

    static constexpr int64_t kAtOnce = 64;

    // Of `count` groups from `group` on, up to kAtOnce.
    const float* of(int64_t group, int64_t count) {
        if (there_) return w_.absmax + group;
        if (group < begin_ || group + count > end_) work_out(group);
        return ahead_ + (group - begin_);
    }

  private:
    [[gnu::noinline]] void work_out(int64_t group) {
        const int64_t count = smaller(kAhead, last_ - group);
        begin_ = group;
        end_ = group + count;
        if (w_.absmax || w_.block_bits != 6) {
            for (int64_t i = 0; i < count; ++i) ahead_[i] = block_scale(w_, (group + i) >> (w_.block_bits - 6));
            return;
        }
        for (int64_t i = 0; i < count; ++i) ahead_[i] = w_.code2[w_.q[group + i]];
        for (int64_t i = 0; i < count;) {
            const float factor = w_.absmax2[(group + i) / kNestedBlock], offset = *w_.offset;
            const int64_t end = smaller(count, i + kNestedBlock - (group + i) % kNestedBlock);
            for (; i < end; ++i) ahead_[i] = ahead_[i] * factor + offset;
        }
    }

    static constexpr int64_t kAhead = 512;

    const FourBit& w_;
    const bool there_;
    const int64_t last_;
    int64_t begin_ = 0, end_ = 0;
    float ahead_[kAhead];
};

// Runs run(i, scale) for the groups `first` + i up to `groups` of them.
template <typename Run>
inline void each_group(Scales& scales, int64_t first, int64_t groups, Run run) {
    for (int64_t g = 0; g < groups; g += Scales::kAtOnce) {
        const int64_t count = smaller(Scales::kAtOnce, groups - g);
        const float* some = scales.of(first + g, count);
        for (int64_t i = 0; i < count; ++i) run(g + i, splat(some[i]));
    }
}

// The row of a 4-bit weight that begins with the group `first` against x [groups][ld_x / 64][64].
template <DType Rounding, int Tokens>
inline void dot_four_bit_row(const float* x, int64_t ld_x, const FourBit& w, Scales& scales, int64_t first,
                             int64_t groups, V16 (&sums)[Tokens]) {
    BlockCodes<Rounding> block(w);
    const uint8_t* packed = w.packed + first * 32;
    V16 row[Tokens];
    for (int t = 0; t < Tokens; ++t) row[t] = zero();
    each_group(scales, first, groups, [&](int64_t g, V16 scale) {
        block.begin(scale);
        V16 v[4];
        block.look_up_64(packed + g * 32, v);
        for (int t = 0; t < Tokens; ++t) {
            const float* x_group = x + g * ld_x + t * 64;
            V16 part = mul(v[0], load(x_group));
            for (int i = 1; i < 4; ++i) part = fma(v[i], load(x_group + i * kLanes), part);
            if constexpr (Rounding == DType::f32)
                row[t] = fma(part, scale, row[t]);
            else
                row[t] = add(part, row[t]);
        }
    });
    for (int t = 0; t < Tokens; ++t) sums[t] = row[t];
}

template <DType Rounding>
void dot_four_bit_as(const float* x, int64_t tokens, int64_t columns, const FourBit& w, const DotTail& tail,
                     int64_t begin, int64_t end) {
    const int64_t groups = columns / 64;
    Scales scales(w, end * groups);
    const auto row = [&]<int Tokens>(V16(&sums)[Tokens], int64_t t, int64_t n) {
        dot_four_bit_row<Rounding>(x + t * 64, tokens * 64, w, scales, n * groups, groups, sums);
    };
    constexpr int kMost = kDotSums < 8 ? kDotSums : 8;
    dot_rows<kMost>(row, tokens, tail, begin, end);
}

void dot_four_bit_float(const void* x, DType rounding, int64_t tokens, int64_t columns, const FourBit& w,
                        const float* q, const Matrix& b, const float* bias, void* y, DType y_dtype, int64_t ld_y,
                        int64_t begin, int64_t end) {
    const auto run = rounding == DType::bf16  ? dot_four_bit_as<DType::bf16>
                     : rounding == DType::f16 ? dot_four_bit_as<DType::f16>
                                              : dot_four_bit_as<DType::f32>;
    run(static_cast<const float*>(x), tokens, columns, w, {q, b, bias, y, y_dtype, ld_y}, begin, end);
}

}  // namespace
