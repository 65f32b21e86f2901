// Sixteen floats in one AVX-512 register.
#include <immintrin.h>

#include <cstdint>

#include "order64.h"

namespace {

using V16 = __m512;

// How many accumulators the 32 registers hold, and how many words of dropout's mask are made at once.
constexpr int kFloatRows = 8, kFloatRanks = 16, kProductRows = 6, kProductBlocks = 4, kDotSums = 16, kWordsAtOnce = 4;

inline V16 zero() { return _mm512_setzero_ps(); }
inline V16 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V16 v) { _mm512_storeu_ps(p, v); }
inline V16 splat(float s) { return _mm512_set1_ps(s); }
inline V16 fma(V16 a, V16 b, V16 c) { return _mm512_fmadd_ps(a, b, c); }
inline V16 add(V16 a, V16 b) { return _mm512_add_ps(a, b); }
inline V16 mul(V16 a, V16 b) { return _mm512_mul_ps(a, b); }
inline V16 where_kept(V16 v, uint16_t bits) { return _mm512_maskz_mov_ps(bits, v); }
inline float sum(V16 v) { return _mm512_reduce_add_ps(v); }
inline V16 widen_bf16(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
inline __m256i round_bf16(V16 v) {
#ifdef __AVX512BF16__
    const __m256bh rounded = _mm512_cvtneps_pbh(v);
    return reinterpret_cast<const __m256i&>(rounded);
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
#endif
}
inline V16 load_bf16(const uint16_t* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store_bf16(uint16_t* p, V16 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_bf16(v)); }
inline V16 bf16_rounded(V16 v) { return widen_bf16(round_bf16(v)); }
inline V16 load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_f16(uint16_t* p, V16 v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void transpose(V16 (&v)[16]) {
    V16 t[16];
    for (int i = 0; i < 16; i += 2) {  // pairs of rows: 32-bit elements
        t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)  // fours: 64-bit elements; v[i + j] holds columns j, j + 4, j + 8, j + 12
        for (int j = 0; j < 2; ++j) {
            v[i + 2 * j] =
                _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + j]), _mm512_castps_pd(t[i + j + 2])));
            v[i + 2 * j + 1] =
                _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + j]), _mm512_castps_pd(t[i + j + 2])));
        }
    for (int j = 0; j < 4; ++j) {  // eights and sixteens: 128-bit elements
        const V16 low = _mm512_shuffle_f32x4(v[j], v[j + 4], 0x88),
                  low_odd = _mm512_shuffle_f32x4(v[j], v[j + 4], 0xdd);
        const V16 high = _mm512_shuffle_f32x4(v[j + 8], v[j + 12], 0x88),
                  high_odd = _mm512_shuffle_f32x4(v[j + 8], v[j + 12], 0xdd);
        t[j] = _mm512_shuffle_f32x4(low, high, 0x88);
        t[j + 8] = _mm512_shuffle_f32x4(low, high, 0xdd);
        t[j + 4] = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
        t[j + 12] = _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd);
    }
    for (int i = 0; i < 16; ++i) v[i] = t[i];
}

struct Codes {
    explicit Codes(V16 table) : table(table) {}
    void look_up(const uint8_t* codes, V16 (&v)[2]) const {
        const __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
        for (int i = 0; i < 2; ++i) {
            int32_t first, last;
            __builtin_memcpy(&first, codes + 8 * i, 4);
            __builtin_memcpy(&last, codes + 8 * i + 4, 4);
            const __m512i words = _mm512_mask_set1_epi32(_mm512_set1_epi32(first), 0xff00, last);
            v[i] = _mm512_permutexvar_ps(_mm512_srlv_epi32(words, shifts), table);  // it looks at the low four bits
        }
    }
    // The eight words of 32 bytes stand in both halves of a vector; each shift brings a code of every word down, one of
    // the lower two bytes in the one half and one of the upper two in the other.
    [[gnu::always_inline]] void look_up_64(const uint8_t* codes, V16 (&v)[4]) const {
        const __m512i words = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
        const __m512i upper = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 16, 16, 16, 16, 16, 16, 16, 16);
        for (int i = 0; i < 4; ++i)
            v[i] = _mm512_permutexvar_ps(_mm512_srlv_epi32(words, _mm512_add_epi32(upper, _mm512_set1_epi32(4 * i))),
                                         table);
    }
    static constexpr auto kOrder = fastpeft::cpu::order_of_64([](int i) {
        const int word = i % 8, code = i / 16 + i % 16 / 8 * 4;  // counted from the lowest bits of a word
        return 8 * word + code / 2 * 2 + (code % 2 ? 0 : 1);
    });
    V16 table;
};
using Bf16Codes = Codes;

// Philox's counters, one in the lower half of each 64-bit lane.
using U64 = __m512i;
constexpr int kCounters = 8;

inline U64 splat64(uint64_t s) { return _mm512_set1_epi64(static_cast<int64_t>(s)); }
inline U64 counters(uint32_t first) {
    return _mm512_add_epi64(splat64(first), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
}
inline U64 product(U64 a, U64 b) { return _mm512_mul_epu32(a, b); }
inline U64 mix(U64 product, U64 c, U64 key) {
    constexpr int kXor3 = 0x96;
    return _mm512_ternarylogic_epi64(_mm512_srli_epi64(product, 32), c, key, kXor3);
}
inline uint64_t kept(U64 c0, U64 c1, U64 c2, U64 c3, uint32_t threshold) {
    const auto at_least = [limit = _mm512_set1_epi16(static_cast<int16_t>(threshold))](U64 low, U64 high) {
        constexpr __mmask16 kUpper = 0xaaaa;
        return _mm512_cmpge_epu16_mask(_mm512_mask_mov_epi32(low, kUpper, _mm512_slli_epi64(high, 32)), limit);
    };
    const uint64_t low = at_least(c0, c1), high = at_least(c2, c3);  // four bits a counter each
    return _pdep_u64(low, 0x0f0f0f0f0f0f0f0f) | _pdep_u64(high, 0xf0f0f0f0f0f0f0f0);
}

}  // namespace
