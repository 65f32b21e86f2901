// Sixteen floats in one AVX-512 register.
#include <immintrin.h>

#include <cstdint>

namespace {

using V16 = __m512;

inline V16 zero() { return _mm512_setzero_ps(); }
inline V16 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V16 v) { _mm512_storeu_ps(p, v); }
inline V16 splat(float s) { return _mm512_set1_ps(s); }
inline V16 fma(V16 a, V16 b, V16 c) { return _mm512_fmadd_ps(a, b, c); }
inline V16 add(V16 a, V16 b) { return _mm512_add_ps(a, b); }
inline V16 mul(V16 a, V16 b) { return _mm512_mul_ps(a, b); }
inline V16 where_kept(V16 v, uint16_t bits) { return _mm512_maskz_mov_ps(bits, v); }
inline float sum(V16 v) { return _mm512_reduce_add_ps(v); }
inline V16 load_bf16(const uint16_t* p) {
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
inline void store_bf16(uint16_t* p, V16 v) {
    const __m256bh rounded = _mm512_cvtneps_pbh(v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<const __m256i&>(rounded));
}
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

}  // namespace
