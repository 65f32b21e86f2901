// Dropout's mask over the U64 of an instruction set: the bits of ../../philox.h, many counters at once.
#include "../../philox.h"
#include "kernels.h"

namespace {

// Words of 64 columns: Words of them, side by side along a row, or one below the other down the rows. So many chains
// of counters at once hide the multiplier's latency.
template <int Words>
inline void keep_words(const U64* key0, const U64* key1, uint32_t row, uint32_t group, bool down, uint32_t threshold,
                       uint64_t* words) {
    constexpr int kParts = 8 / kCounters, kChains = Words * kParts;
    const U64 multiplier0 = splat64(fastpeft::kPhiloxMultiplier0), multiplier1 = splat64(fastpeft::kPhiloxMultiplier1);
    U64 c0[kChains], c1[kChains], c2[kChains], c3[kChains];
    for (int i = 0; i < kChains; ++i) {
        const int word = i / kParts, part = i % kParts;
        c0[i] = counters(group + part * kCounters + (down ? 0 : 8 * word));
        c1[i] = splat64(down ? row + word : row);
        c2[i] = c3[i] = splat64(0);
    }
    for (int round = 0; round < fastpeft::kPhiloxRounds; ++round)
        for (int i = 0; i < kChains; ++i) {
            const U64 product0 = product(c0[i], multiplier0), product1 = product(c2[i], multiplier1);
            c0[i] = mix(product1, c1[i], key0[round]);
            c2[i] = mix(product0, c3[i], key1[round]);
            c1[i] = product1;
            c3[i] = product0;
        }
    for (int word = 0; word < Words; ++word) {
        uint64_t bits = 0;
        for (int part = 0; part < kParts; ++part) {
            const int i = word * kParts + part;
            bits |= kept(c0[i], c1[i], c2[i], c3[i], threshold) << (part * kCounters * 8);
        }
        words[down ? word * fastpeft::cpu::kKeepWords : word] = bits;
    }
}

void keep(uint64_t seed, uint32_t threshold, int64_t row, int64_t column, int64_t rows, int64_t columns,
          uint64_t* words) {
    using fastpeft::cpu::kKeepWords;
    U64 key0[fastpeft::kPhiloxRounds], key1[fastpeft::kPhiloxRounds];
    for (int round = 0; round < fastpeft::kPhiloxRounds; ++round) {
        key0[round] = splat64(static_cast<uint32_t>(seed) + round * fastpeft::kPhiloxKeyStep0);
        key1[round] = splat64(static_cast<uint32_t>(seed >> 32) + round * fastpeft::kPhiloxKeyStep1);
    }
    const auto group = static_cast<uint32_t>(column / 8), first_row = static_cast<uint32_t>(row);
    int64_t m = 0;
    if (columns > fastpeft::cpu::kColumns - 64)
        for (; m < rows; ++m)
            for (int64_t word = 0; word < kKeepWords; word += kWordsAtOnce)
                keep_words<kWordsAtOnce>(key0, key1, first_row + m, group + 8 * word, false, threshold,
                                         words + m * kKeepWords + word);
    for (; m + kWordsAtOnce <= rows; m += kWordsAtOnce)
        for (int64_t c = 0; c < columns; c += 64)
            keep_words<kWordsAtOnce>(key0, key1, first_row + m, group + c / 8, true, threshold,
                                     words + m * kKeepWords + c / 64);
    for (; m < rows; ++m)
        for (int64_t c = 0; c < columns; c += 64)
            keep_words<1>(key0, key1, first_row + m, group + c / 8, true, threshold, words + m * kKeepWords + c / 64);
}

}  // namespace
