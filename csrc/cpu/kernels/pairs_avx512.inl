// What the bfloat16-pair kernels of AVX-512 and of AMX share: masks, staging, the tail of `expand`.
#include <immintrin.h>

#include "dot_kernels.inl"
#include "keep.inl"
#include "product_kernels.inl"

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

// In bfloat16 64 elements at a time, where a part starts at a whole byte.
void decode_pairs(const FourBit& w, int64_t first, int64_t ld_w, int64_t rows, int64_t count, DType rounding, void* out,
                  DType dtype, int64_t ld_out) {
    const bool whole_groups = w.block_bits >= 6 && first % 64 == 0 && ld_w % 64 == 0 && count % 64 == 0;
    if (dtype != DType::bf16 || !whole_groups) return decode(w, first, ld_w, rows, count, rounding, out, dtype, ld_out);
    const Interleave interleave;
    const V16 table = load(w.code);
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t begin = first + i * ld_w;
        uint16_t* to = static_cast<uint16_t*>(out) + i * ld_out;
        each_group(w, begin, count / 64, [&](int64_t g, V16 scale) {
            const PairCodes codes(w.packed + begin / 2 + g * 32, mul(table, scale));
            _mm512_storeu_si512(to + g * 64, interleave.low(codes.even, codes.odd));
            _mm512_storeu_si512(to + g * 64 + 32, interleave.high(codes.even, codes.odd));
        });
    }
}

// ---- staging ---------------------------------------------------------------------------------------------------

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

void dot_four_bit(const void* x, DType dtype, int64_t tokens, int64_t columns, const FourBit& w, const float* q,
                  const Matrix& b, const float* bias, void* y, DType y_dtype, int64_t ld_y, int64_t begin,
                  int64_t end) {
    if (dtype != DType::bf16)
        return dot_four_bit_float(x, dtype, tokens, columns, w, q, b, bias, y, y_dtype, ld_y, begin, end);
    const auto row = [&]<int Tokens>(V16(&sums)[Tokens], int64_t t, int64_t n) {
        dot_four_bit_row(static_cast<const uint16_t*>(x) + t * 64, tokens * 64, w, n * columns, columns / 64, sums);
    };
    dot_rows<8>(row, tokens, q, b, bias, y, y_dtype, ld_y, begin, end);
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
