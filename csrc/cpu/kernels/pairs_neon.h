// Thirty-two bfloat16 in four NEON registers, by themselves or as sixteen pairs.
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace {

struct V32 {
    uint16x8_t a, b, c, d;
};

// Accumulators of products of pairs: rows times two blocks of sixteen columns; ranks times two vectors of columns.
constexpr int kPairRows = 2, kPairRanks = 2;

inline V32 load_halves(const uint16_t* p) {
    return {vld1q_u16(p), vld1q_u16(p + 8), vld1q_u16(p + 16), vld1q_u16(p + 24)};
}
inline void store_halves(uint16_t* p, V32 v) {
    vst1q_u16(p, v.a);
    vst1q_u16(p + 8, v.b);
    vst1q_u16(p + 16, v.c);
    vst1q_u16(p + 24, v.d);
}
inline V32 load_first_halves(const uint16_t* p, int64_t n) {  // n of them, zeros behind them
    if (n >= 32) return load_halves(p);
    uint16_t some[32] = {};
    if (n > 0) std::memcpy(some, p, n * 2);
    return load_halves(some);
}
inline V16 load_first_bf16(const uint16_t* p, int64_t n) {  // n of sixteen
    if (n >= 16) return load_bf16(p);
    uint16_t some[16] = {};
    if (n > 0) std::memcpy(some, p, n * 2);
    return load_bf16(some);
}
inline uint16x8_t where_kept(uint16x8_t v, uint32_t bits) {  // eight of the bits
    const uint16x8_t bit = {1, 2, 4, 8, 16, 32, 64, 128};
    return vandq_u16(v, vtstq_u16(vdupq_n_u16(static_cast<uint16_t>(bits)), bit));
}
inline V32 where_kept(V32 v, uint32_t bits) {
    return {where_kept(v.a, bits), where_kept(v.b, bits >> 8), where_kept(v.c, bits >> 16),
            where_kept(v.d, bits >> 24)};
}
inline V32 splat_pair(const uint16_t* p) {
    uint32_t pair;
    std::memcpy(&pair, p, 4);
    const uint16x8_t four = vreinterpretq_u16_u32(vdupq_n_u32(pair));
    return {four, four, four, four};
}
inline V16 as_floats(V32 v) {
    return {vreinterpretq_f32_u16(v.a), vreinterpretq_f32_u16(v.b), vreinterpretq_f32_u16(v.c),
            vreinterpretq_f32_u16(v.d)};
}
inline V32 as_halves(V16 v) {
    return {vreinterpretq_u16_f32(v.a), vreinterpretq_u16_f32(v.b), vreinterpretq_u16_f32(v.c),
            vreinterpretq_u16_f32(v.d)};
}

// The sums of sixteen pairs of products, added to `sum`.
inline float32x4_t dot_pairs(float32x4_t sum, uint16x8_t a, uint16x8_t b) {
    return vbfdotq_f32(sum, vreinterpretq_bf16_u16(a), vreinterpretq_bf16_u16(b));
}
inline V16 dot_pairs(V16 sum, V32 a, V32 b) {
    return {dot_pairs(sum.a, a.a, b.a), dot_pairs(sum.b, a.b, b.b), dot_pairs(sum.c, a.c, b.c),
            dot_pairs(sum.d, a.d, b.d)};
}

// 32 columns of two rows side by side: the pairs of the lower 16 columns, and of the higher 16.
struct Interleave {
    static V32 low(V32 even, V32 odd) {
        return {vzip1q_u16(even.a, odd.a), vzip2q_u16(even.a, odd.a), vzip1q_u16(even.b, odd.b),
                vzip2q_u16(even.b, odd.b)};
    }
    static V32 high(V32 even, V32 odd) {
        return {vzip1q_u16(even.c, odd.c), vzip2q_u16(even.c, odd.c), vzip1q_u16(even.d, odd.d),
                vzip2q_u16(even.d, odd.d)};
    }
};

// Rounded, one vector behind the other, or element by element side by side.
inline V32 round_both(V16 first, V16 last) {
    return {vcombine_u16(round_bf16(first.a), round_bf16(first.b)),
            vcombine_u16(round_bf16(first.c), round_bf16(first.d)),
            vcombine_u16(round_bf16(last.a), round_bf16(last.b)), vcombine_u16(round_bf16(last.c), round_bf16(last.d))};
}
inline V32 round_pairs(V16 even, V16 odd) { return Interleave::low(round_both(even, even), round_both(odd, odd)); }

// 64 elements of one block of a 4-bit weight in bfloat16, the even ones and the odd ones. The table times the scale is
// rounded as each decoded element would be; its lower bytes and its upper ones are looked up by themselves.
struct PairCodes {
    PairCodes(const uint8_t* bytes, V16 scaled_table) {
        const V32 table = round_both(scaled_table, scaled_table);
        const uint8x16_t first = vreinterpretq_u8_u16(table.a), last = vreinterpretq_u8_u16(table.b);
        const uint8x16_t lower = vuzp1q_u8(first, last), upper = vuzp2q_u8(first, last);
        const auto values = [&](uint8x16_t codes, uint8x16_t more) -> V32 {
            const uint8x16_t low = vqtbl1q_u8(lower, codes), high = vqtbl1q_u8(upper, codes);
            const uint8x16_t low2 = vqtbl1q_u8(lower, more), high2 = vqtbl1q_u8(upper, more);
            return {vreinterpretq_u16_u8(vzip1q_u8(low, high)), vreinterpretq_u16_u8(vzip2q_u8(low, high)),
                    vreinterpretq_u16_u8(vzip1q_u8(low2, high2)), vreinterpretq_u16_u8(vzip2q_u8(low2, high2))};
        };
        const uint8x16_t codes = vld1q_u8(bytes), more = vld1q_u8(bytes + 16), mask = vdupq_n_u8(15);
        even = values(vshrq_n_u8(codes, 4), vshrq_n_u8(more, 4));
        odd = values(vandq_u8(codes, mask), vandq_u8(more, mask));
    }
    V32 even, odd;
};

}  // namespace
