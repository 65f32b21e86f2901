// Sixteen floats in four NEON registers.
#include <arm_neon.h>

#include <cstdint>

#include "order64.h"

namespace {

struct V16 {
    float32x4_t a, b, c, d;
};

// How many accumulators the 32 registers hold, and how many words of dropout's mask are made at once.
constexpr int kFloatRows = 4, kFloatRanks = 4, kProductRows = 5, kProductBlocks = 1, kDotSums = 4, kWordsAtOnce = 2;

template <typename F, typename... Vectors>
inline V16 each(F f, Vectors... v) {
    return {f(v.a...), f(v.b...), f(v.c...), f(v.d...)};
}

inline V16 load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
inline void store(float* p, V16 v) {
    vst1q_f32(p, v.a);
    vst1q_f32(p + 4, v.b);
    vst1q_f32(p + 8, v.c);
    vst1q_f32(p + 12, v.d);
}
inline V16 splat(float s) {
    const float32x4_t four = vdupq_n_f32(s);
    return {four, four, four, four};
}
inline V16 zero() { return splat(0.0f); }
inline V16 fma(V16 a, V16 b, V16 c) {
    return each([](float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }, a, b, c);
}
inline V16 add(V16 a, V16 b) {
    return each([](float32x4_t a, float32x4_t b) { return vaddq_f32(a, b); }, a, b);
}
inline V16 mul(V16 a, V16 b) {
    return each([](float32x4_t a, float32x4_t b) { return vmulq_f32(a, b); }, a, b);
}
inline float32x4_t where_kept(float32x4_t v, uint16x8_t bits, uint32x4_t bit) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), vtstq_u32(vreinterpretq_u32_u16(bits), bit)));
}
inline V16 where_kept(V16 v, uint16_t bits) {
    const uint16x8_t all = vdupq_n_u16(bits);
    const uint32x4_t bit = {1, 2, 4, 8};
    return {where_kept(v.a, all, bit), where_kept(v.b, all, vshlq_n_u32(bit, 4)),
            where_kept(v.c, all, vshlq_n_u32(bit, 8)), where_kept(v.d, all, vshlq_n_u32(bit, 12))};
}
inline float sum(V16 v) {
    const float32x4_t four = vaddq_f32(vaddq_f32(v.a, v.c), vaddq_f32(v.b, v.d));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
inline float32x4_t widen_bf16(uint16x4_t bits) { return vreinterpretq_f32_u32(vshll_n_u16(bits, 16)); }
inline V16 load_bf16(const uint16_t* p) {
    return {widen_bf16(vld1_u16(p)), widen_bf16(vld1_u16(p + 4)), widen_bf16(vld1_u16(p + 8)),
            widen_bf16(vld1_u16(p + 12))};
}
inline uint16x4_t round_bf16(float32x4_t v) {  // to nearest even
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
    return vreinterpret_u16_bf16(vcvt_bf16_f32(v));
#else
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, vdupq_n_u32(0x7fc00000)), 16);
#endif
}
inline void store_bf16(uint16_t* p, V16 v) {
    vst1q_u16(p, vcombine_u16(round_bf16(v.a), round_bf16(v.b)));
    vst1q_u16(p + 8, vcombine_u16(round_bf16(v.c), round_bf16(v.d)));
}
inline V16 bf16_rounded(V16 v) {
    return {widen_bf16(round_bf16(v.a)), widen_bf16(round_bf16(v.b)), widen_bf16(round_bf16(v.c)),
            widen_bf16(round_bf16(v.d))};
}
inline float32x4_t widen_f16(uint16x4_t bits) { return vcvt_f32_f16(vreinterpret_f16_u16(bits)); }
inline V16 load_f16(const uint16_t* p) {
    return {widen_f16(vld1_u16(p)), widen_f16(vld1_u16(p + 4)), widen_f16(vld1_u16(p + 8)),
            widen_f16(vld1_u16(p + 12))};
}
inline uint16x4_t round_f16(float32x4_t v) { return vreinterpret_u16_f16(vcvt_f16_f32(v)); }
inline void store_f16(uint16_t* p, V16 v) {
    vst1q_u16(p, vcombine_u16(round_f16(v.a), round_f16(v.b)));
    vst1q_u16(p + 8, vcombine_u16(round_f16(v.c), round_f16(v.d)));
}
inline void transpose(float32x4_t& a, float32x4_t& b, float32x4_t& c, float32x4_t& d) {
    const auto pairs = [](float32x4_t v) { return vreinterpretq_f64_f32(v); };
    const float64x2_t even_ab = pairs(vtrn1q_f32(a, b)), odd_ab = pairs(vtrn2q_f32(a, b));
    const float64x2_t even_cd = pairs(vtrn1q_f32(c, d)), odd_cd = pairs(vtrn2q_f32(c, d));
    a = vreinterpretq_f32_f64(vtrn1q_f64(even_ab, even_cd));
    b = vreinterpretq_f32_f64(vtrn1q_f64(odd_ab, odd_cd));
    c = vreinterpretq_f32_f64(vtrn2q_f64(even_ab, even_cd));
    d = vreinterpretq_f32_f64(vtrn2q_f64(odd_ab, odd_cd));
}
inline void transpose(V16 (&v)[16]) {
    for (V16* rows = v; rows < v + 16; rows += 4) {  // each 4 x 4 block
        transpose(rows[0].a, rows[1].a, rows[2].a, rows[3].a);
        transpose(rows[0].b, rows[1].b, rows[2].b, rows[3].b);
        transpose(rows[0].c, rows[1].c, rows[2].c, rows[3].c);
        transpose(rows[0].d, rows[1].d, rows[2].d, rows[3].d);
    }
    const auto swap = [](float32x4_t& upper, float32x4_t& lower) {
        const float32x4_t kept = upper;
        upper = lower;
        lower = kept;
    };
    for (int i = 0; i < 4; ++i) {  // the blocks among themselves
        swap(v[i].b, v[4 + i].a);
        swap(v[i].c, v[8 + i].a);
        swap(v[i].d, v[12 + i].a);
        swap(v[4 + i].c, v[8 + i].b);
        swap(v[4 + i].d, v[12 + i].b);
        swap(v[8 + i].d, v[12 + i].c);
    }
}

// The table's bytes, those of the same place in a float side by side: four look-ups of bytes find sixteen codes.
struct Codes {
    explicit Codes(V16 table) {
        const uint8x16_t a = vreinterpretq_u8_f32(table.a), b = vreinterpretq_u8_f32(table.b);
        const uint8x16_t c = vreinterpretq_u8_f32(table.c), d = vreinterpretq_u8_f32(table.d);
        const uint8x16_t even = vuzp1q_u8(a, b), even2 = vuzp1q_u8(c, d);
        const uint8x16_t odd = vuzp2q_u8(a, b), odd2 = vuzp2q_u8(c, d);
        place[0] = vuzp1q_u8(even, even2);
        place[1] = vuzp1q_u8(odd, odd2);
        place[2] = vuzp2q_u8(even, even2);
        place[3] = vuzp2q_u8(odd, odd2);
    }
    void look_up(const uint8_t* codes, V16 (&v)[2]) const {
        const uint8x16_t bytes = vld1q_u8(codes);
        const uint8x16_t even = vshrq_n_u8(bytes, 4), odd = vandq_u8(bytes, vdupq_n_u8(15));
        v[0] = values(vzip1q_u8(even, odd));
        v[1] = values(vzip2q_u8(even, odd));
    }
    [[gnu::always_inline]] void look_up_64(const uint8_t* codes,
                                           V16 (&v)[4]) const {  // evens before odds saves the interleaving of codes
        for (int i = 0; i < 2; ++i) {
            const uint8x16_t bytes = vld1q_u8(codes + 16 * i);
            v[i] = values(vshrq_n_u8(bytes, 4));
            v[2 + i] = values(vandq_u8(bytes, vdupq_n_u8(15)));
        }
    }
    static constexpr auto kOrder = fastpeft::cpu::kEvenThenOdd;
    V16 values(uint8x16_t index) const {
        const uint8x16_t b0 = vqtbl1q_u8(place[0], index), b1 = vqtbl1q_u8(place[1], index);
        const uint8x16_t b2 = vqtbl1q_u8(place[2], index), b3 = vqtbl1q_u8(place[3], index);
        const auto halves = [](uint8x16_t interleaved) { return vreinterpretq_u16_u8(interleaved); };
        const uint16x8_t low = halves(vzip1q_u8(b0, b1)), high = halves(vzip1q_u8(b2, b3));
        const uint16x8_t low2 = halves(vzip2q_u8(b0, b1)), high2 = halves(vzip2q_u8(b2, b3));
        return {vreinterpretq_f32_u16(vzip1q_u16(low, high)), vreinterpretq_f32_u16(vzip2q_u16(low, high)),
                vreinterpretq_f32_u16(vzip1q_u16(low2, high2)), vreinterpretq_f32_u16(vzip2q_u16(low2, high2))};
    }
    uint8x16_t place[4];
};
using Bf16Codes = Codes;

// Philox's counters: the lower halves of four 64-bit numbers in one register, the upper ones in another.
struct U64 {
    uint32x4_t low, high;
};
constexpr int kCounters = 4;

inline U64 splat64(uint64_t s) {
    return {vdupq_n_u32(static_cast<uint32_t>(s)), vdupq_n_u32(static_cast<uint32_t>(s >> 32))};
}
inline U64 counters(uint32_t first) {
    const uint32x4_t steps = {0, 1, 2, 3};
    return {vaddq_u32(vdupq_n_u32(first), steps), vdupq_n_u32(0)};
}
inline U64 product(U64 a, U64 b) {
    const uint32x4_t first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a.low), vget_low_u32(b.low)));
    const uint32x4_t last = vreinterpretq_u32_u64(vmull_high_u32(a.low, b.low));
    return {vuzp1q_u32(first, last), vuzp2q_u32(first, last)};
}
inline U64 mix(U64 product, U64 c, U64 key) {
    return {veorq_u32(product.high, veorq_u32(c.low, key.low)), vdupq_n_u32(0)};
}
inline uint64_t kept(U64 c0, U64 c1, U64 c2, U64 c3, uint32_t threshold) {
    const uint16x8_t limit = vdupq_n_u16(static_cast<uint16_t>(threshold));
    const auto at_least = [&](U64 word, uint32_t bit) {  // the bit of a word's lower half; the next one of its upper
        const uint16x8_t bits = vreinterpretq_u16_u32(vdupq_n_u32(bit | bit << 17));
        return vandq_u16(vcgeq_u16(vreinterpretq_u16_u32(word.low), limit), bits);
    };
    const uint16x8_t halves = vorrq_u16(vorrq_u16(at_least(c0, 1), at_least(c1, 1 << 2)),
                                        vorrq_u16(at_least(c2, 1 << 4), at_least(c3, 1 << 6)));
    const uint8x8_t bytes = vmovn_u16(vpaddq_u16(halves, halves));  // one a counter, twice
    return vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
}

}  // namespace
