// The AMX tile intrinsics in C++, as Intel's Software Developer's Manual describes them (TDPBF16PS: float32 sums,
// pairs in order). Rows beyond the configured shape are not touched; a shape that does not fit stops the program.
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

struct EmulatedTiles {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config;
    unsigned char data[8][16][64];
};
thread_local EmulatedTiles emulated_tiles;

inline void emulated_loadconfig(const void* config) { std::memcpy(&emulated_tiles.config, config, 64); }
inline void emulated_release() { std::memset(&emulated_tiles.config, 0, 64); }
inline void emulated_zero(int t) { std::memset(emulated_tiles.data[t], 0, sizeof emulated_tiles.data[t]); }
inline void emulated_load(int t, const void* p, int64_t stride) {
    if (emulated_tiles.config.palette != 1) std::abort();
    emulated_zero(t);
    for (int i = 0; i < emulated_tiles.config.rows[t]; ++i)
        std::memcpy(emulated_tiles.data[t][i], static_cast<const char*>(p) + i * stride,
                    emulated_tiles.config.row_bytes[t]);
}
inline void emulated_store(int t, void* p, int64_t stride) {
    if (emulated_tiles.config.palette != 1) std::abort();
    for (int i = 0; i < emulated_tiles.config.rows[t]; ++i)
        std::memcpy(static_cast<char*>(p) + i * stride, emulated_tiles.data[t][i], emulated_tiles.config.row_bytes[t]);
}
inline float emulated_bf16(const unsigned char* p) {
    uint16_t half;
    std::memcpy(&half, p, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline void emulated_dpbf16ps(int c, int a, int b) {
    const auto& config = emulated_tiles.config;
    if (config.palette != 1 || config.row_bytes[a] != 4 * config.rows[b] || config.rows[c] != config.rows[a] ||
        config.row_bytes[c] != config.row_bytes[b])
        std::abort();
    for (int m = 0; m < config.rows[c]; ++m)
        for (int k = 0; k < config.row_bytes[a] / 4; ++k)
            for (int n = 0; n < config.row_bytes[c] / 4; ++n) {
                float sum;
                std::memcpy(&sum, &emulated_tiles.data[c][m][4 * n], 4);
                for (int half = 0; half < 2; ++half)
                    sum += emulated_bf16(&emulated_tiles.data[a][m][4 * k + 2 * half]) *
                           emulated_bf16(&emulated_tiles.data[b][k][4 * n + 2 * half]);
                std::memcpy(&emulated_tiles.data[c][m][4 * n], &sum, 4);
            }
}

}  // namespace

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#define _tile_loadd emulated_load
#define _tile_stored emulated_store
#define _tile_dpbf16ps emulated_dpbf16ps
