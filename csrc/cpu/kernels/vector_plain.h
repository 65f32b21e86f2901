// Sixteen floats in standard C++, for processors without a translation unit of their own.
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct V16 {
    float lane[16];
};

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
inline V16 load_f16(const uint16_t* p) {
    V16 v;
    for (int i = 0; i < 16; ++i) {
        _Float16 half;
        std::memcpy(&half, p + i, 2);
        v.lane[i] = static_cast<float>(half);
    }
    return v;
}
inline void store_f16(uint16_t* p, V16 v) {
    for (int i = 0; i < 16; ++i) {
        const _Float16 half = static_cast<_Float16>(v.lane[i]);
        std::memcpy(p + i, &half, 2);
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

}  // namespace
