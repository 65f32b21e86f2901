// Thirty-two bfloat16 in one AVX-512 register, by themselves or as sixteen pairs.
#include <immintrin.h>

#include <cstdint>

namespace {

using V32 = __m512i;

// Accumulators of products of pairs: rows times two blocks of sixteen columns; ranks times two vectors of columns.
constexpr int kPairRows = 8, kPairRanks = 8;

inline V32 load_halves(const uint16_t* p) { return _mm512_loadu_si512(p); }
inline void store_halves(uint16_t* p, V32 v) { _mm512_storeu_si512(p, v); }
inline uint32_t first_bits(int64_t n) { return n >= 32 ? ~0u : n > 0 ? (1u << n) - 1 : 0u; }
// n of them, zeros behind them.
inline V32 load_first_halves(const uint16_t* p, int64_t n) { return _mm512_maskz_loadu_epi16(first_bits(n), p); }
inline V16 load_first_bf16(const uint16_t* p, int64_t n) {  // n of sixteen
    const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(first_bits(n)), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline V32 where_kept(V32 v, uint32_t bits) { return _mm512_maskz_mov_epi16(bits, v); }
inline V32 splat_pair(const uint16_t* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
}
inline V16 as_floats(V32 v) { return _mm512_castsi512_ps(v); }
inline V32 as_halves(V16 v) { return _mm512_castps_si512(v); }

// The sums of sixteen pairs of products, added to `sum`.
inline V16 dot_pairs(V16 sum, V32 a, V32 b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh&>(a), reinterpret_cast<__m512bh&>(b));
}

// Rounded, one vector behind the other, or element by element side by side.
inline V32 round_both(V16 first, V16 last) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(last, first);
    return reinterpret_cast<const __m512i&>(rounded);
}
inline V32 round_pairs(V16 even, V16 odd) {
    const __m512i rounded = round_both(even, odd);
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(rounded));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(rounded, 1));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
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
    V32 low(V32 even, V32 odd) const { return _mm512_permutex2var_epi16(even, low_, odd); }
    V32 high(V32 even, V32 odd) const { return _mm512_permutex2var_epi16(even, high_, odd); }

    V32 low_, high_;
};

// 64 elements of one block of a 4-bit weight in bfloat16, the even ones and the odd ones. The table times the scale is
// rounded as each decoded element would be, and stands twice in a vector: the permutation looks at the low five bits of
// an index.
struct PairCodes {
    PairCodes(const uint8_t* bytes, V16 scaled_table) {
        const V32 table = round_both(scaled_table, scaled_table);
        const __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
        even = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table);
        odd = _mm512_permutexvar_epi16(codes, table);
    }
    V32 even, odd;
};

}  // namespace
