// What the bfloat16-pair kernels of AVX-512 and of AMX share: masks, staging, the tail of `expand`.
#include <immintrin.h>

#include "../../philox.h"
#include "float_kernels.inl"

namespace {

inline __m512 dot_pairs(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh&>(a), reinterpret_cast<__m512bh&>(b));
}
// 16 columns of two rows of a tile, side by side.
inline __m512i interleave(const uint16_t* even, const uint16_t* odd) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

bool bf16_pairs(DType dtype) { return dtype == DType::bf16; }

// ---- packing ----------------------------------------------------------------------------------------------------

inline void store_pair(uint16_t* p, V16 even, V16 odd) {  // bfloat16, element by element side by side
    const __m512bh rounded = _mm512_cvtne2ps_pbh(odd, even);
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(reinterpret_cast<const __m512i&>(rounded)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(reinterpret_cast<const __m512i&>(rounded), 1));
    _mm512_storeu_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

void pack(const Matrix& s, bool pairs, void* panel, int64_t begin, int64_t end) {
    if (!pairs) return pack_float(s, pairs, panel, begin, end);
    pack_blocks(s, begin, end, [&](const V16(&v)[16], int64_t offset) {
        for (int64_t i = 0; i < kLanes; i += 2)
            store_pair(static_cast<uint16_t*>(panel) + offset + i * kLanes, v[i], v[i + 1]);
    });
}

// 32 columns of two rows side by side: the pairs of the lower 16 columns, and of the higher 16.
struct Interleave {
    Interleave() {
        alignas(64) uint16_t order[2][32];
        for (uint16_t i = 0; i < 32; ++i) {
            order[0][i] = i / 2 + i % 2 * 32;
            order[1][i] = order[0][i] + 16;
        }
        low_ = _mm512_load_si512(order[0]);
        high_ = _mm512_load_si512(order[1]);
    }
    __m512i low(__m512i even, __m512i odd) const { return _mm512_permutex2var_epi16(even, low_, odd); }
    __m512i high(__m512i even, __m512i odd) const { return _mm512_permutex2var_epi16(even, high_, odd); }

    __m512i low_, high_;
};

inline uint32_t first_bits(int64_t n) { return n >= 32 ? ~0u : n > 0 ? (1u << n) - 1 : 0u; }

// Neighbouring rows lie side by side already: 16 pairs of 16 columns are a transposition of 32-bit elements.
void pack_stripe_columns(const Matrix& s, int64_t row, int64_t rows, int64_t column, uint16_t* out) {
    const int64_t stop = smaller(row + rows, s.rows);
    for (int64_t c = 0; c < kStripe; c += kLanes)
        for (int64_t k = 0; k < rows; k += 2 * kLanes) {  // along the rows of W: sixteen streams to prefetch
            const uint32_t here = first_bits(stop - row - k);
            V16 v[16];
            for (int64_t i = 0; i < kLanes; ++i) {
                const uint16_t* p = static_cast<const uint16_t*>(s.data) + (column + c + i) * s.column_stride + row + k;
                v[i] = column + c + i < s.columns ? _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(here, p)) : zero();
            }
            transpose(v);
            const int64_t pairs = smaller(kLanes, (rows - k + 1) / 2);
            for (int64_t i = 0; i < pairs; ++i) _mm512_storeu_ps(out + ((k / 2 + i) * kStripe + c) * 2, v[i]);
        }
}

void pack_stripe_rows(const Matrix& s, int64_t row, int64_t rows, int64_t column, uint16_t* out) {
    const Interleave interleave;
    for (int64_t k = 0; k < rows; k += 2)
        for (int64_t c = 0; c < kStripe; c += 2 * kLanes) {
            const uint16_t* p = static_cast<const uint16_t*>(s.data) + (row + k) * s.row_stride + column + c;
            const uint32_t here = first_bits(s.columns - column - c);
            _mm_prefetch(reinterpret_cast<const char*>(p + 32 * s.row_stride), _MM_HINT_T1);
            _mm_prefetch(reinterpret_cast<const char*>(p + 33 * s.row_stride), _MM_HINT_T1);
            const __m512i even = _mm512_maskz_loadu_epi16(row + k < s.rows ? here : 0, p);
            const __m512i odd = _mm512_maskz_loadu_epi16(row + k + 1 < s.rows ? here : 0, p + s.row_stride);
            uint16_t* pair = out + (k * kStripe / 2 + c) * 2;
            _mm512_storeu_si512(pair, interleave.low(even, odd));
            _mm512_storeu_si512(pair + 2 * kLanes, interleave.high(even, odd));
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

// 64 elements of one block in bfloat16, the even ones and the odd ones. The table times the scale is rounded as each
// decoded element would be, and stands twice in a vector: the permutation looks at the low five bits of an index.
struct PairCodes {
    PairCodes(const uint8_t* bytes, V16 scaled_table) {
        const __m512bh twice = _mm512_cvtne2ps_pbh(scaled_table, scaled_table);
        const __m512i table = reinterpret_cast<const __m512i&>(twice);
        const __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
        even = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table);
        odd = _mm512_permutexvar_epi16(codes, table);
    }
    __m512i even, odd;
};

// 64 or 32 elements at a time, where a part starts at a whole byte.
void decode_vector(const FourBit& w, int64_t first, int64_t count, void* out, DType dtype) {
    if (dtype == DType::f16) return decode(w, first, count, out, dtype);
    alignas(64) uint16_t order[32];
    for (uint16_t i = 0; i < 32; ++i) order[i] = i / 2 + i % 2 * 16;
    const __m512i side_by_side = _mm512_load_si512(order);
    const Interleave interleave;
    const V16 table = load(w.code);
    each_block(w, first, count, [&](int64_t begin, int64_t n, float scale, int64_t done) {
        int64_t i = 0;
        const V16 scaled = mul(table, splat(scale));
        for (; dtype == DType::bf16 && begin % 2 == 0 && i + 64 <= n; i += 64) {
            const PairCodes codes(w.packed + (begin + i) / 2, scaled);
            _mm512_storeu_si512(at(out, dtype, done + i), interleave.low(codes.even, codes.odd));
            _mm512_storeu_si512(at(out, dtype, done + i + 32), interleave.high(codes.even, codes.odd));
        }
        for (; begin % 2 == 0 && i + 32 <= n; i += 32) {
            const auto* bytes = reinterpret_cast<const __m128i*>(w.packed + (begin + i) / 2);
            const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes));
            const V16 even = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), scaled);
            const V16 odd = _mm512_permutexvar_ps(codes, scaled);  // it looks at the low four bits alone
            void* target = at(out, dtype, done + i);
            if (dtype == DType::bf16) {
                const __m512bh rounded = _mm512_cvtne2ps_pbh(odd, even);
                _mm512_storeu_si512(target,
                                    _mm512_permutexvar_epi16(side_by_side, reinterpret_cast<const __m512i&>(rounded)));
            } else {
                const __m512i lower = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
                const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
                store(static_cast<float*>(target), _mm512_permutex2var_ps(even, lower, odd));
                store(static_cast<float*>(target) + kLanes, _mm512_permutex2var_ps(even, upper, odd));
            }
        }
        decode_part(w, begin + i, n - i, scale, at(out, dtype, done + i), dtype);
    });
}

// ---- dropout and staging ----------------------------------------------------------------------------------------

// Eight counters in 64-bit lanes whose upper halves are never read, so that a product needs no shuffle: 64 columns of
// a row. Chains of them, along a row or down the rows, run side by side to hide the multiplier's latency.
template <int Chains>
inline void keep_words(const __m512i* key0, const __m512i* key1, uint32_t row, uint32_t group, bool down,
                       __m512i threshold, uint64_t* words) {
    const __m512i multiplier0 = _mm512_set1_epi64(fastpeft::kPhiloxMultiplier0);
    const __m512i multiplier1 = _mm512_set1_epi64(fastpeft::kPhiloxMultiplier1);
    __m512i c0[Chains], c1[Chains], c2[Chains], c3[Chains];
    for (int i = 0; i < Chains; ++i) {
        c0[i] = _mm512_add_epi64(_mm512_set1_epi64(down ? group : group + 8 * i),
                                 _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
        c1[i] = _mm512_set1_epi64(down ? row + i : row);
        c2[i] = c3[i] = _mm512_setzero_si512();
    }
    constexpr int kXor3 = 0x96;
    for (int round = 0; round < fastpeft::kPhiloxRounds; ++round)
        for (int i = 0; i < Chains; ++i) {
            const __m512i product0 = _mm512_mul_epu32(c0[i], multiplier0),
                          product1 = _mm512_mul_epu32(c2[i], multiplier1);
            c0[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), c1[i], key0[round], kXor3);
            c2[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3[i], key1[round], kXor3);
            c1[i] = product1;
            c3[i] = product0;
        }
    constexpr __mmask16 kUpper = 0xaaaa;
    for (int i = 0; i < Chains; ++i) {
        const __m512i words01 = _mm512_mask_mov_epi32(c0[i], kUpper, _mm512_slli_epi64(c1[i], 32));
        const __m512i words23 = _mm512_mask_mov_epi32(c2[i], kUpper, _mm512_slli_epi64(c3[i], 32));
        const uint64_t low = _mm512_cmpge_epu16_mask(words01, threshold);   // four bits a counter: columns 0 … 3
        const uint64_t high = _mm512_cmpge_epu16_mask(words23, threshold);  // columns 4 … 7
        words[down ? i * kKeepWords : i] = _pdep_u64(low, 0x0f0f0f0f0f0f0f0f) | _pdep_u64(high, 0xf0f0f0f0f0f0f0f0);
    }
}

void keep_vector(uint64_t seed, uint32_t threshold, int64_t row, int64_t column, int64_t rows, int64_t columns,
                 uint64_t* words) {
    __m512i key0[fastpeft::kPhiloxRounds], key1[fastpeft::kPhiloxRounds];
    for (int round = 0; round < fastpeft::kPhiloxRounds; ++round) {
        key0[round] = _mm512_set1_epi64(static_cast<uint32_t>(seed) + round * fastpeft::kPhiloxKeyStep0);
        key1[round] = _mm512_set1_epi64(static_cast<uint32_t>(seed >> 32) + round * fastpeft::kPhiloxKeyStep1);
    }
    const __m512i limit = _mm512_set1_epi16(static_cast<int16_t>(threshold));
    const auto group = static_cast<uint32_t>(column / 8), first_row = static_cast<uint32_t>(row);
    constexpr int kChains = kKeepWords;
    int64_t m = 0;
    if (columns > kColumns - 64)
        for (; m < rows; ++m)
            keep_words<kChains>(key0, key1, first_row + m, group, false, limit, words + m * kKeepWords);
    for (; m + kChains <= rows; m += kChains)
        for (int64_t c = 0; c < columns; c += 64)
            keep_words<kChains>(key0, key1, first_row + m, group + c / 8, true, limit, words + m * kKeepWords + c / 64);
    for (; m < rows; ++m)
        for (int64_t c = 0; c < columns; c += 64)
            keep_words<1>(key0, key1, first_row + m, group + c / 8, true, limit, words + m * kKeepWords + c / 64);
}

// A tile of bfloat16, zero-padded to 32 columns and to two rows.
void stage_pairs(const uint16_t* src, int64_t ld, int64_t rows, int64_t columns, const uint64_t* keep, uint16_t* tile) {
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t c = 0; c < columns; c += 32) {
            uint32_t wanted = first_bits(columns - c);
            // The next tile of these rows: a row is too short a stream for the processor to foresee it.
            _mm_prefetch(reinterpret_cast<const char*>(src + m * ld + c + kColumns), _MM_HINT_T1);
            if (keep) wanted &= static_cast<uint32_t>(keep[m * kKeepWords + c / 64] >> (c % 64));
            _mm512_storeu_si512(tile + m * kColumns + c, _mm512_maskz_loadu_epi16(wanted, src + m * ld + c));
        }
    if (rows % 2)
        for (int64_t c = 0; c < columns; c += 32)
            _mm512_storeu_si512(tile + rows * kColumns + c, _mm512_setzero_si512());
}

void stage(const void* src, DType dtype, int64_t ld, int64_t rows, int64_t columns, const uint64_t* keep, void* tile) {
    if (!bf16_pairs(dtype)) return stage_float(src, dtype, ld, rows, columns, keep, tile);
    stage_pairs(static_cast<const uint16_t*>(src), ld, rows, columns, keep, static_cast<uint16_t*>(tile));
}

// ---- few tokens -------------------------------------------------------------------------------------------------

template <int Tokens>
inline void dot_pair_row(const uint16_t* x, int64_t ld_x, const uint16_t* w, int64_t columns, V16 (&sums)[Tokens]) {
    constexpr int64_t kStep = 32;
    V16 odd[Tokens];
    for (int t = 0; t < Tokens; ++t) odd[t] = zero();
    int64_t c = 0;
    for (; c + 2 * kStep <= columns; c += 2 * kStep) {
        const __m512i w0 = _mm512_loadu_si512(w + c), w1 = _mm512_loadu_si512(w + c + kStep);
        for (int t = 0; t < Tokens; ++t) {
            sums[t] = dot_pairs(sums[t], w0, _mm512_loadu_si512(x + t * ld_x + c));
            odd[t] = dot_pairs(odd[t], w1, _mm512_loadu_si512(x + t * ld_x + c + kStep));
        }
    }
    for (; c < columns; c += kStep) {
        const uint32_t here = first_bits(columns - c);
        const __m512i w0 = _mm512_maskz_loadu_epi16(here, w + c);
        for (int t = 0; t < Tokens; ++t)
            sums[t] = dot_pairs(sums[t], w0, _mm512_maskz_loadu_epi16(here, x + t * ld_x + c));
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
    dot_rows<4>(row, tokens, q, b, bias, y, y_dtype, ld_y, begin, end);
}

// Runs run(group, scale) for the groups of 64 elements that begin at `first`, each within a block: the scales of many
// are worked out ahead, where no vector instruction waits for them.
template <typename Run>
inline void each_group(const FourBit& w, int64_t first, int64_t groups, Run run) {
    constexpr int64_t kAhead = 64;
    float scales[kAhead];
    for (int64_t g = 0; g < groups; g += kAhead) {
        const int64_t count = smaller(kAhead, groups - g);
        for (int64_t i = 0; i < count; ++i) scales[i] = block_scale(w, (first + (g + i) * 64) >> w.block_bits);
        for (int64_t i = 0; i < count; ++i) run(g + i, splat(scales[i]));
    }
}

// The row of a 4-bit weight that begins at `first` against x [groups][ld_x / 64][32 even elements, 32 odd ones].
template <int Tokens>
inline void dot_four_bit_row(const uint16_t* x, int64_t ld_x, const FourBit& w, int64_t first, int64_t groups,
                             V16 (&sums)[Tokens]) {
    const V16 table = load(w.code);
    V16 odd[Tokens];
    for (int t = 0; t < Tokens; ++t) odd[t] = zero();
    each_group(w, first, groups, [&](int64_t g, V16 scale) {
        const PairCodes codes(w.packed + first / 2 + g * 32, mul(table, scale));
        for (int t = 0; t < Tokens; ++t) {
            const uint16_t* x_group = x + g * ld_x + t * 64;
            sums[t] = dot_pairs(sums[t], codes.even, _mm512_loadu_si512(x_group));
            odd[t] = dot_pairs(odd[t], codes.odd, _mm512_loadu_si512(x_group + 32));
        }
    });
    for (int t = 0; t < Tokens; ++t) sums[t] = add(sums[t], odd[t]);
}

template <int Tokens>
inline void dot_four_bit_row(const float* x, int64_t ld_x, const FourBit& w, int64_t first, int64_t groups,
                             V16 (&sums)[Tokens]) {
    const V16 table = load(w.code);
    V16 odd[Tokens];
    for (int t = 0; t < Tokens; ++t) odd[t] = zero();
    each_group(w, first, groups, [&](int64_t g, V16 scale) {
        const V16 scaled = mul(table, scale);
        const auto* bytes = reinterpret_cast<const __m128i*>(w.packed + first / 2 + g * 32);
        for (int64_t i = 0; i < 2; ++i) {
            const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(bytes + i));
            const V16 evens = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), scaled);
            const V16 odds = _mm512_permutexvar_ps(codes, scaled);
            for (int t = 0; t < Tokens; ++t) {
                const float* x_group = x + g * ld_x + t * 64 + i * kLanes;
                sums[t] = fma(evens, load(x_group), sums[t]);
                odd[t] = fma(odds, load(x_group + 32), odd[t]);
            }
        }
    });
    for (int t = 0; t < Tokens; ++t) sums[t] = add(sums[t], odd[t]);
}

template <typename Element>
void dot_four_bit_as(const void* x, int64_t tokens, int64_t columns, const FourBit& w, const float* q, const Matrix& b,
                     const float* bias, void* y, DType y_dtype, int64_t ld_y, int64_t begin, int64_t end) {
    const auto row = [&]<int Tokens>(V16(&sums)[Tokens], int64_t t, int64_t n) {
        dot_four_bit_row(static_cast<const Element*>(x) + t * 64, tokens * 64, w, n * columns, columns / 64, sums);
    };
    dot_rows<8>(row, tokens, q, b, bias, y, y_dtype, ld_y, begin, end);
}

void dot_four_bit(const void* x, DType dtype, int64_t tokens, int64_t columns, const FourBit& w, const float* q,
                  const Matrix& b, const float* bias, void* y, DType y_dtype, int64_t ld_y, int64_t begin,
                  int64_t end) {
    const auto run = dtype == DType::bf16 ? dot_four_bit_as<uint16_t> : dot_four_bit_as<float>;
    run(x, tokens, columns, w, q, b, bias, y, y_dtype, ld_y, begin, end);
}

// ---- the tail of expand --------------------------------------------------------------------------------------

// Two vectors of columns; where all 32 are there, bfloat16 is stored at once, and LoRA takes a short way.
struct PairPut : Put {
    void put_both(V16 first, V16 last, int64_t m, int64_t c) const {
        if (dtype != DType::bf16 || c + 2 * kLanes > columns) {
            put(first, m, c);
            if (c + kLanes < columns) put(last, m, c + kLanes);
            return;
        }
        if (from.dtype == DType::f32 && from.data && !keep && !scale && !second.data && !bias) {
            const float* sums = static_cast<const float*>(from.data) + m * from.ld + c;
            return store_both(add(first, load(sums)), add(last, load(sums + kLanes)), m, c);
        }
        store_both(finish(first, m, c, kLanes), finish(last, m, c + kLanes, kLanes), m, c);
    }
    void store_both(V16 first, V16 last, int64_t m, int64_t c) const {
        const __m512bh rounded = _mm512_cvtne2ps_pbh(last, first);
        _mm512_storeu_si512(static_cast<uint16_t*>(y) + m * ld_y + c, reinterpret_cast<const __m512i&>(rounded));
    }
};

struct PairSquares : Squares {
    void put_both(V16 first, V16 last, int64_t m, int64_t c) const {
        if (c + 2 * kLanes > columns) {
            put(first, m, c);
            if (c + kLanes < columns) put(last, m, c + kLanes);
            return;
        }
        const uint16_t* p = static_cast<const uint16_t*>(w.data) + m * w.ld + c;
        _mm_prefetch(reinterpret_cast<const char*>(p + kColumns), _MM_HINT_T1);
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
