// Sixteen floats in two AVX2 registers.
#include <immintrin.h>

#include <cstdint>

#include "order64.h"

namespace {

struct V16 {
    __m256 low, high;
};

// How many accumulators the 16 registers hold, and how many words of dropout's mask are made at once.
constexpr int kFloatRows = 4, kFloatRanks = 4, kProductRows = 6, kProductBlocks = 1, kDotSums = 4, kWordsAtOnce = 1;

inline V16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline V16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, V16 v) {
    _mm256_storeu_ps(p, v.low);
    _mm256_storeu_ps(p + 8, v.high);
}
inline V16 splat(float s) { return {_mm256_set1_ps(s), _mm256_set1_ps(s)}; }
inline V16 fma(V16 a, V16 b, V16 c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline V16 add(V16 a, V16 b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline V16 mul(V16 a, V16 b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline __m256 where_kept(__m256 v, int bits) {
    const __m256i select = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), select), select);
    return _mm256_and_ps(v, _mm256_castsi256_ps(set));
}
inline V16 where_kept(V16 v, uint16_t bits) { return {where_kept(v.low, bits & 0xff), where_kept(v.high, bits >> 8)}; }
inline float sum(V16 v) {
    const __m256 eight = _mm256_add_ps(v.low, v.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline __m256 widen_bf16(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline V16 load_bf16(const uint16_t* p) {
    return {widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline __m256i round_bf16(__m256 v) {  // to nearest even, the result in the low half of each 32 bits
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}
inline void store_bf16(uint16_t* p, V16 v) {
    const __m256i packed = _mm256_packus_epi32(round_bf16(v.low), round_bf16(v.high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
inline V16 bf16_rounded(V16 v) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(round_bf16(v.low), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(round_bf16(v.high), 16))};
}
inline V16 load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline void store_f16(uint16_t* p, V16 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.low, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(v.high, _MM_FROUND_TO_NEAREST_INT));
}
inline void transpose(__m256 (&v)[8]) {
    __m256 t[8];
    for (int i = 0; i < 8; i += 4) {  // within halves of 128 bits: pairs of rows, then fours
        const __m256 low = _mm256_unpacklo_ps(v[i], v[i + 1]), high = _mm256_unpackhi_ps(v[i], v[i + 1]);
        const __m256 low2 = _mm256_unpacklo_ps(v[i + 2], v[i + 3]), high2 = _mm256_unpackhi_ps(v[i + 2], v[i + 3]);
        t[i] = _mm256_shuffle_ps(low, low2, 0x44);
        t[i + 1] = _mm256_shuffle_ps(low, low2, 0xee);
        t[i + 2] = _mm256_shuffle_ps(high, high2, 0x44);
        t[i + 3] = _mm256_shuffle_ps(high, high2, 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    }
}
inline void transpose(V16 (&v)[16]) {
    __m256 upper[8], lower[8];
    const auto corner = [&](int row, bool high, __m256(&block)[8]) {
        for (int i = 0; i < 8; ++i) block[i] = high ? v[row + i].high : v[row + i].low;
        transpose(block);
    };
    corner(0, true, upper);
    corner(8, false, lower);
    for (int i = 0; i < 8; ++i) {
        v[i].high = lower[i];
        v[i + 8].low = upper[i];
    }
    corner(0, false, upper);
    corner(8, true, lower);
    for (int i = 0; i < 8; ++i) {
        v[i].low = upper[i];
        v[i + 8].high = lower[i];
    }
}
// The table's bytes, those of the same place in a float side by side: four shuffles of bytes look 32 codes up, or two
// where the values are bfloat16's, whose floats begin with two bytes of zeros.
template <int Places>
struct CodesOf {
    explicit CodesOf(V16 table) {
        const __m256i by_place = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                                  0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const __m256i low = _mm256_shuffle_epi8(_mm256_castps_si256(table.low), by_place);
        const __m256i high = _mm256_shuffle_epi8(_mm256_castps_si256(table.high), by_place);
        const __m128i a = _mm256_castsi256_si128(low), b = _mm256_extracti128_si256(low, 1);
        const __m128i c = _mm256_castsi256_si128(high), d = _mm256_extracti128_si256(high, 1);
        const __m128i ab2 = _mm_unpackhi_epi32(a, b), cd2 = _mm_unpackhi_epi32(c, d);
        place[Places - 2] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(ab2, cd2));
        place[Places - 1] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(ab2, cd2));
        if constexpr (Places == 4) {
            const __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);
            place[0] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(ab, cd));
            place[1] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(ab, cd));
        }
    }
    void look_up(const uint8_t* codes, V16 (&v)[2]) const {
        // Codes in the order that lets the interleaving below, which stays within 128 bits, end in the right one.
        const __m256i order = _mm256_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13,  //
                                               2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15);
        const __m256i bytes = _mm256_shuffle_epi8(
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))), order);
        const __m256i index = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi16(0x000f)),
                                              _mm256_and_si256(bytes, _mm256_set1_epi16(0x0f00)));
        values(index, v);
    }
    [[gnu::always_inline]] void look_up_64(const uint8_t* codes, V16 (&v)[4]) const {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
        const __m256i low = _mm256_set1_epi8(0x0f);
        V16 even[2], odd[2];
        values(_mm256_and_si256(_mm256_srli_epi16(bytes, 4), low), even);
        values(_mm256_and_si256(bytes, low), odd);
        for (int i = 0; i < 2; ++i) {
            v[i] = even[i];
            v[2 + i] = odd[i];
        }
    }
    static constexpr auto kOrder = fastpeft::cpu::order_of_64([](int i) {
        const int lane = i % 32;  // interleaving stays within 128 bits
        return 2 * (lane / 8 * 4 + lane % 4 + (lane % 8 < 4 ? 0 : 16)) + i / 32;
    });

    // Of 32 codes a byte each; of each 128 bits the first four, the second four and so on.
    [[gnu::always_inline]] void values(__m256i index, V16 (&v)[2]) const {
        const __m256i b2 = _mm256_shuffle_epi8(place[Places - 2], index);
        const __m256i b3 = _mm256_shuffle_epi8(place[Places - 1], index);
        __m256i low = _mm256_setzero_si256(), high = low;
        if constexpr (Places == 4) {
            const __m256i b0 = _mm256_shuffle_epi8(place[0], index), b1 = _mm256_shuffle_epi8(place[1], index);
            low = _mm256_unpacklo_epi8(b0, b1);
            high = _mm256_unpackhi_epi8(b0, b1);
        }
        const __m256i low2 = _mm256_unpacklo_epi8(b2, b3), high2 = _mm256_unpackhi_epi8(b2, b3);
        v[0] = {_mm256_castsi256_ps(_mm256_unpacklo_epi16(low, low2)),
                _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, low2))};
        v[1] = {_mm256_castsi256_ps(_mm256_unpacklo_epi16(high, high2)),
                _mm256_castsi256_ps(_mm256_unpackhi_epi16(high, high2))};
    }
    __m256i place[Places];
};
using Codes = CodesOf<4>;
using Bf16Codes = CodesOf<2>;

// Philox's counters, one in the lower half of each 64-bit lane.
using U64 = __m256i;
constexpr int kCounters = 4;

inline U64 splat64(uint64_t s) { return _mm256_set1_epi64x(static_cast<int64_t>(s)); }
inline U64 counters(uint32_t first) { return _mm256_add_epi64(splat64(first), _mm256_setr_epi64x(0, 1, 2, 3)); }
inline U64 product(U64 a, U64 b) { return _mm256_mul_epu32(a, b); }
inline U64 mix(U64 product, U64 c, U64 key) {
    return _mm256_xor_si256(_mm256_srli_epi64(product, 32), _mm256_xor_si256(c, key));
}
inline uint64_t kept(U64 c0, U64 c1, U64 c2, U64 c3, uint32_t threshold) {
    const auto at_least = [limit = _mm256_set1_epi16(static_cast<int16_t>(threshold))](U64 low, U64 high) {
        const __m256i words = _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xaa);
        return _mm256_cmpeq_epi16(_mm256_max_epu16(words, limit), words);
    };
    // Four bytes a counter and pair of words: those of a counter side by side.
    const __m256i bytes = _mm256_packs_epi16(at_least(c0, c1), at_least(c2, c3));
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_shuffle_epi32(bytes, 0xd8)));
}

}  // namespace
