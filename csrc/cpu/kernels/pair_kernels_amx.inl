// Bfloat16-pair kernels with AMX: a tile register holds 16 rows of 64 bytes, TDPBF16PS multiplies 16 x 32 by 32 x 16.
// Included after the tile intrinsics, real or emulated, and AVX-512's V16 and V32.
#include "pairs.inl"

namespace {

constexpr int64_t kPairStep = 32;              // elements of the contracted dimension that one instruction takes
constexpr int64_t kTileStride = kColumns * 2;  // bytes
constexpr int64_t kPanelStride = kLanes * 4;   // bytes: sixteen pairs
static_assert(kRows == 2 * kLanes, "two tile registers hold the rows of a tile");

// Registers: 0, 1 sums; 2, 3 left operands [16, 32] and 4 the right one; 5, 6 and 7 the same with half the depth.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 32, 32, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 8};
};

struct TileScope {
    TileScope() {
        static const TileConfig config;
        _tile_loadconfig(&config);
    }
    ~TileScope() { _tile_release(); }
};

// sums (registers 0 and 1, 32 x 16) += left [32, depth] · right, depth a multiple of 16.
inline void accumulate(const uint16_t* left_rows, int64_t left_bytes, const uint16_t* right, int64_t depth, bool both) {
    int64_t k = 0;
    for (; k + kPairStep <= depth; k += kPairStep) {
        _tile_loadd(4, right + k * kLanes, kPanelStride);
        _tile_loadd(2, left_rows + k, left_bytes);
        _tile_dpbf16ps(0, 2, 4);
        if (!both) continue;
        _tile_loadd(3, left_rows + kLanes * left_bytes / 2 + k, left_bytes);
        _tile_dpbf16ps(1, 3, 4);
    }
    if (k == depth) return;
    _tile_loadd(7, right + k * kLanes, kPanelStride);
    _tile_loadd(5, left_rows + k, left_bytes);
    _tile_dpbf16ps(0, 5, 7);
    if (!both) return;
    _tile_loadd(6, left_rows + kLanes * left_bytes / 2 + k, left_bytes);
    _tile_dpbf16ps(1, 6, 7);
}

void multiply_amx(const void* tile, int64_t rows, int64_t columns, const void* panel, int64_t panel_stride,
                  int64_t blocks, float* out, int64_t ld_out) {
    const TileScope scope;
    const uint16_t* t = static_cast<const uint16_t*>(tile);
    const int64_t depth = (columns + kLanes - 1) / kLanes * kLanes;
    alignas(64) float sums[kRows][kLanes];
    for (int64_t b = 0; b < blocks; ++b) {
        _tile_zero(0);
        _tile_zero(1);
        accumulate(t, kTileStride, static_cast<const uint16_t*>(panel) + b * panel_stride, depth, rows > kLanes);
        _tile_stored(0, sums[0], kLanes * 4);
        _tile_stored(1, sums[kLanes], kLanes * 4);
        for (int64_t m = 0; m < rows; ++m) {
            float* o = out + m * ld_out + b * kLanes;
            store(o, add(load(o), load(sums[m])));
        }
    }
}

// [blocks][16][kRows]: qᵀ
void left_outer_amx(const float* q, int64_t ld_q, int64_t rows, int64_t ranks, uint16_t* out) {
    for (int64_t b = 0; b < ranks; b += kLanes)
        for (int64_t half = 0; half < kRows; half += kLanes) {
            V16 v[16];
            for (int64_t i = 0; i < kLanes; ++i) v[i] = half + i < rows ? load(q + (half + i) * ld_q + b) : zero();
            transpose(v);
            for (int64_t r = 0; r < kLanes; ++r) store_bf16(out + (b + r) * kRows + half, v[r]);
        }
}

// 16 columns of two rows of a tile, side by side.
inline __m512i interleave(const uint16_t* even, const uint16_t* odd) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

void outer_amx(const void* tile, int64_t rows, int64_t columns, const void* q, int64_t blocks, float* out,
               int64_t ld_out) {
    const TileScope scope;
    const uint16_t* t = static_cast<const uint16_t*>(tile);
    alignas(64) uint16_t pairs[kRows / 2][2 * kLanes];
    for (int64_t c = 0; c < columns; c += kLanes) {
        for (int64_t m = 0; m < kRows; m += 2)
            _mm512_store_si512(pairs[m / 2], m < rows ? interleave(t + m * kColumns + c, t + (m + 1) * kColumns + c)
                                                      : _mm512_setzero_si512());
        _tile_loadd(4, pairs, kPanelStride);
        for (int64_t b = 0; b < blocks; ++b) {
            float* o = out + b * kLanes * ld_out + c;
            _tile_loadd(0, o, ld_out * 4);
            _tile_loadd(2, static_cast<const uint16_t*>(q) + b * kLanes * kRows, kRows * 2);
            _tile_dpbf16ps(0, 2, 4);
            _tile_stored(0, o, ld_out * 4);
        }
    }
}

template <typename Sink>
void expand_amx(const void* q, int64_t rows, int64_t columns, int64_t ranks, const void* panel, int64_t panel_stride,
                const Sink& sink) {
    const TileScope scope;
    alignas(64) float sums[2][kRows][kLanes];
    for (int64_t c = 0; c < columns; c += 2 * kLanes) {
        for (int64_t half = 0; half < 2 && c + half * kLanes < columns; ++half) {
            _tile_zero(0);
            _tile_zero(1);
            accumulate(static_cast<const uint16_t*>(q), ranks * 2,
                       static_cast<const uint16_t*>(panel) + (c / kLanes + half) * panel_stride, ranks, rows > kLanes);
            _tile_stored(0, sums[half][0], kLanes * 4);
            _tile_stored(1, sums[half][kLanes], kLanes * 4);
        }
        const bool is_short = sink.is_short(c);
        for (int64_t m = 0; m < rows; ++m)
            is_short ? sink.put_short(load(sums[0][m]), load(sums[1][m]), m, c)
                     : sink.put_both(load(sums[0][m]), load(sums[1][m]), m, c);
    }
}

void square_rows_amx(const void* q, int64_t rows, int64_t columns, int64_t ranks, const void* panel,
                     int64_t panel_stride, Tile w, float* row_sums) {
    sum_squares<PairSquares>(rows, columns, w, row_sums, nullptr, [&](const PairSquares& sink) {
        expand_amx(q, rows, columns, ranks, panel, panel_stride, sink);
    });
}

}  // namespace
