// Philox-4x32-10 as fastpeft/dropout.py defines it, one counter at a time.
#include <cstdint>

namespace {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53, kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9, kPhiloxKeyStep1 = 0xBB67AE85;
constexpr int kPhiloxRounds = 10;

// Keep bits of the eight columns 8 * group … 8 * group + 7 of a row, the first column in the lowest bit.
inline uint8_t philox_keep(uint64_t seed, uint32_t threshold, uint32_t row, uint32_t group) {
    uint32_t c[4] = {group, row, 0, 0};
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
        const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c[0];
        const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c[2];
        c[0] = static_cast<uint32_t>(product1 >> 32) ^ c[1] ^ key0;
        c[1] = static_cast<uint32_t>(product1);
        c[2] = static_cast<uint32_t>(product0 >> 32) ^ c[3] ^ key1;
        c[3] = static_cast<uint32_t>(product0);
        key0 += kPhiloxKeyStep0;
        key1 += kPhiloxKeyStep1;
    }
    uint8_t bits = 0;
    for (int word = 0; word < 4; ++word) {
        bits |= static_cast<uint8_t>((c[word] & 0xffff) >= threshold) << (2 * word);
        bits |= static_cast<uint8_t>((c[word] >> 16) >= threshold) << (2 * word + 1);
    }
    return bits;
}

}  // namespace
