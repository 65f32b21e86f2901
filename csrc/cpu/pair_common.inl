// What the bfloat16-pair kernels of AVX-512 and of AMX share: masks, staging, the epilogue of `expand`.
#include <immintrin.h>

#include "float_kernels.inl"
#include "philox.h"

namespace {

// 16 columns of two rows of a tile, side by side.
inline __m512i interleave(const uint16_t* even, const uint16_t* odd) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

bool bf16_pairs(DType dtype) { return dtype == DType::bf16; }

// ---- dropout and staging ----------------------------------------------------------------------------------------

// Eight counters in 64-bit lanes whose upper halves are never read: a product needs no shuffle. 64 columns a call.
inline uint64_t keep_64(const uint32_t* key0, const uint32_t* key1, uint32_t row, uint32_t group, __m512i threshold) {
    const __m512i multiplier0 = _mm512_set1_epi64(kPhiloxMultiplier0), multiplier1 = _mm512_set1_epi64(kPhiloxMultiplier1);
    __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(group), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    __m512i c1 = _mm512_set1_epi64(row), c2 = _mm512_setzero_si512(), c3 = c2;
    constexpr int kXor3 = 0x96;
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const __m512i product0 = _mm512_mul_epu32(c0, multiplier0), product1 = _mm512_mul_epu32(c2, multiplier1);
        c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), c1, _mm512_set1_epi64(key0[round]), kXor3);
        c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3, _mm512_set1_epi64(key1[round]), kXor3);
        c1 = product1;
        c3 = product0;
    }
    constexpr __mmask16 kUpper = 0xaaaa;
    const __m512i words01 = _mm512_mask_mov_epi32(c0, kUpper, _mm512_slli_epi64(c1, 32));
    const __m512i words23 = _mm512_mask_mov_epi32(c2, kUpper, _mm512_slli_epi64(c3, 32));
    const uint64_t low = _mm512_cmpge_epu16_mask(words01, threshold);   // four bits a counter: columns 0 … 3
    const uint64_t high = _mm512_cmpge_epu16_mask(words23, threshold);  // columns 4 … 7
    return _pdep_u64(low, 0x0f0f0f0f0f0f0f0f) | _pdep_u64(high, 0xf0f0f0f0f0f0f0f0);
}

void keep_vector(uint64_t seed, uint32_t threshold, int64_t row, int64_t column, int64_t rows, int64_t columns,
                 uint64_t* words) {
    uint32_t key0[kPhiloxRounds], key1[kPhiloxRounds];
    for (int round = 0; round < kPhiloxRounds; ++round) {
        key0[round] = static_cast<uint32_t>(seed) + round * kPhiloxKeyStep0;
        key1[round] = static_cast<uint32_t>(seed >> 32) + round * kPhiloxKeyStep1;
    }
    const __m512i limit = _mm512_set1_epi16(static_cast<int16_t>(threshold));
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t c = 0; c < columns; c += 64)
            words[m * kKeepWords + c / 64] = keep_64(key0, key1, static_cast<uint32_t>(row + m),
                                                     static_cast<uint32_t>((column + c) / 8), limit);
}

// A tile of bfloat16, zero-padded to 32 columns and to two rows.
void stage_pairs(const uint16_t* src, int64_t ld, int64_t rows, int64_t columns, const uint64_t* keep,
                 uint16_t* tile) {
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t c = 0; c < columns; c += 32) {
            uint32_t wanted = columns - c >= 32 ? ~0u : (1u << (columns - c)) - 1;
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

// ---- the epilogue of expand --------------------------------------------------------------------------------------

// Stores row m of the output, columns c … c + 31 (the second sixteen only where there are more than sixteen).
inline void finish_pair(V16 first, V16 last, int64_t m, int64_t c, int64_t columns, const uint64_t* keep,
                        const float* base, const float* bias, void* y, DType dtype, int64_t ld_y) {
    char* out = at(y, dtype, m * ld_y + c);
    const int64_t n = columns - c;
    first = finish(first, m, c, n, keep, base, bias);
    if (n <= kLanes) return store_first(out, dtype, first, n);
    last = finish(last, m, c + kLanes, n - kLanes, keep, base, bias);
    if (dtype == DType::bf16 && n >= 2 * kLanes) {
        const __m512bh rounded = _mm512_cvtne2ps_pbh(last, first);
        _mm512_storeu_si512(out, reinterpret_cast<const __m512i&>(rounded));
    } else {
        store_any(out, dtype, first);
        store_first(at(out, dtype, kLanes), dtype, last, n - kLanes);
    }
}

}  // namespace
