// Sixteen floats in standard C++, for processors without a translation unit of their own.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "order64.h"

namespace {

struct V16 {
    float lane[16];
};

// What an instruction set's registers hold. Accumulators of the skinny products (rows; ranks), of the base product
// (rows times blocks of sixteen columns) and of dot products; words of dropout's mask that are made at once.
constexpr int kFloatRows = 4, kFloatRanks = 4, kProductRows = 4, kProductBlocks = 1, kDotSums = 4, kWordsAtOnce = 1;

inline V16 zero() { return V16{}; }
inline V16 load(const float* p) {
    V16 v;
    std::memcpy(v.lane, p, sizeof v.lane);
    return v;
}
inline void store(float* p, V16 v) { std::memcpy(p, v.lane, sizeof v.lane); }
inline V16 splat(float s) {
    V16 v;
    for (float& lane : v.lane) lane = s;
    return v;
}
inline V16 fma(V16 a, V16 b, V16 c) {
    for (int i = 0; i < 16; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
}
inline V16 add(V16 a, V16 b) {
    for (int i = 0; i < 16; ++i) a.lane[i] += b.lane[i];
    return a;
}
inline V16 mul(V16 a, V16 b) {
    for (int i = 0; i < 16; ++i) a.lane[i] *= b.lane[i];
    return a;
}
inline V16 where_kept(V16 v, uint16_t bits) {
    for (int i = 0; i < 16; ++i) v.lane[i] = (bits >> i) & 1 ? v.lane[i] : 0.0f;
    return v;
}
inline float sum(V16 v) {
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) v.lane[i] += v.lane[i + width];
    return v.lane[0];
}
inline V16 load_bf16(const uint16_t* p) {
    V16 v;
    for (int i = 0; i < 16; ++i) {
        const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
        std::memcpy(&v.lane[i], &bits, 4);
    }
    return v;
}
inline void store_bf16(uint16_t* p, V16 v) {
    for (int i = 0; i < 16; ++i) {
        uint32_t bits;
        std::memcpy(&bits, &v.lane[i], 4);
        const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        p[i] = static_cast<uint16_t>(std::isnan(v.lane[i]) ? 0x7fc0 : rounded);
    }
}
inline V16 bf16_rounded(V16 v) {
    uint16_t bits[16];
    store_bf16(bits, v);
    return load_bf16(bits);
}
// Float16 by float32's arithmetic: compilers have a type for it that is called differently, or none.
inline V16 load_f16(const uint16_t* p) {
    V16 v;
    for (int i = 0; i < 16; ++i) {
        const uint32_t magnitude = (p[i] & 0x7fffu) << 13, sign = (p[i] & 0x8000u) << 16;
        const bool finite = magnitude < 0x7c00u << 13;
        float scaled;  // the exponent's bias is 112 less
        std::memcpy(&scaled, &magnitude, 4);
        scaled *= 0x1p112f;
        uint32_t bits;
        std::memcpy(&bits, &scaled, 4);
        bits = (finite ? bits : magnitude | 0x7f800000) | sign;
        std::memcpy(&v.lane[i], &bits, 4);
    }
    return v;
}
inline void store_f16(uint16_t* p, V16 v) {
    for (int i = 0; i < 16; ++i) {
        constexpr float kSmallestNormal = 0x1p-14f, kBeyond = 65520.0f;
        const float magnitude = std::fabs(v.lane[i]);
        const float aligned = magnitude + 0.5f;  // rounds a subnormal number: its last bit is the sum's last
        uint32_t bits, sum_bits;
        std::memcpy(&bits, &magnitude, 4);
        std::memcpy(&sum_bits, &aligned, 4);
        const uint32_t normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
        const uint32_t half = std::isnan(magnitude)          ? 0x7e00
                              : magnitude >= kBeyond         ? 0x7c00
                              : magnitude >= kSmallestNormal ? normal
                                                             : sum_bits - (126u << 23);
        p[i] = static_cast<uint16_t>(half | (std::signbit(v.lane[i]) ? 0x8000 : 0));
    }
}
inline void transpose(V16 (&v)[16]) {
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < i; ++j) {
            const float t = v[i].lane[j];
            v[i].lane[j] = v[j].lane[i];
            v[j].lane[i] = t;
        }
}

// A table of sixteen values, looked up by 4-bit codes, the even ones in the upper halves of their bytes.
struct Codes {
    explicit Codes(V16 table) : table(table) {}
    void look_up(const uint8_t* codes, V16 (&v)[2]) const {  // sixteen bytes
        for (int i = 0; i < 32; ++i) v[i / 16].lane[i % 16] = table.lane[codes[i / 2] >> (i % 2 ? 0 : 4) & 15];
    }
    // The 64 codes of 32 bytes, in the order that kOrder has.
    [[gnu::always_inline]] void look_up_64(const uint8_t* codes, V16 (&v)[4]) const {
        for (int i = 0; i < 64; ++i) v[i / 16].lane[i % 16] = table.lane[codes[i / 2] >> (i % 2 ? 0 : 4) & 15];
    }
    static constexpr auto kOrder = fastpeft::cpu::order_of_64([](int i) { return i; });
    V16 table;
};
using Bf16Codes = Codes;  // for a table of values that are bfloat16's

// Philox's counters, kCounters of them, each in the lower half of 64 bits whose upper half is never read.
using U64 = uint64_t;
constexpr int kCounters = 1;

inline U64 splat64(uint64_t s) { return s; }
inline U64 counters(uint32_t first) { return first; }  // first, first + 1 … first + kCounters - 1
inline U64 product(U64 a, U64 b) { return (a & 0xffffffff) * (b & 0xffffffff); }
inline U64 mix(U64 product, U64 c, U64 key) { return product >> 32 ^ c ^ key; }
// One bit for each 16 of the four random words' bits, those of the first counter lowest: set where they are at least
// the threshold.
inline uint64_t kept(U64 c0, U64 c1, U64 c2, U64 c3, uint32_t threshold) {
    uint64_t bits = 0;
    int i = 0;
    for (const U64 word : {c0, c1, c2, c3})
        for (const int shift : {0, 16}) bits |= static_cast<uint64_t>((word >> shift & 0xffff) >= threshold) << i++;
    return bits;
}

}  // namespace
