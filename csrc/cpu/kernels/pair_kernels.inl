// Products of bfloat16 pairs with an instruction that adds two products to each float32 sum.
#include "pairs.inl"

namespace {

template <int Rows, int Blocks>
inline void multiply_pair_rows(const uint16_t* tile, int64_t columns, const uint16_t* panel, int64_t panel_stride,
                               float* out, int64_t ld_out) {
    V16 sums[Rows][Blocks];
    for (int i = 0; i < Rows; ++i)
        for (int b = 0; b < Blocks; ++b) sums[i][b] = zero();
    for (int64_t c = 0; c < columns; c += 2) {
        V32 p[Blocks];
        for (int b = 0; b < Blocks; ++b) p[b] = load_halves(panel + b * panel_stride + c * kLanes);
        for (int i = 0; i < Rows; ++i) {
            const V32 t = splat_pair(tile + i * kColumns + c);
            for (int b = 0; b < Blocks; ++b) sums[i][b] = dot_pairs(sums[i][b], t, p[b]);
        }
    }
    for (int i = 0; i < Rows; ++i)
        for (int b = 0; b < Blocks; ++b) {
            float* o = out + i * ld_out + b * kLanes;
            store(o, add(load(o), sums[i][b]));
        }
}

template <int Rows, int Blocks>
inline void multiply_pair_blocks(const uint16_t* tile, int64_t rows, int64_t columns, const uint16_t* panel,
                                 int64_t panel_stride, float* out, int64_t ld_out) {
    int64_t m = 0;
    for (; m + Rows <= rows; m += Rows)
        multiply_pair_rows<Rows, Blocks>(tile + m * kColumns, columns, panel, panel_stride, out + m * ld_out, ld_out);
    for (; m < rows; ++m)
        multiply_pair_rows<1, Blocks>(tile + m * kColumns, columns, panel, panel_stride, out + m * ld_out, ld_out);
}

void multiply_pairs(const void* tile, int64_t rows, int64_t columns, const void* panel, int64_t panel_stride,
                    int64_t blocks, float* out, int64_t ld_out) {
    const uint16_t* t = static_cast<const uint16_t*>(tile);
    const uint16_t* p = static_cast<const uint16_t*>(panel);
    int64_t b = 0;
    for (; b + 2 <= blocks; b += 2)
        multiply_pair_blocks<kPairRows, 2>(t, rows, columns, p + b * panel_stride, panel_stride, out + b * kLanes,
                                           ld_out);
    if (b < blocks)
        multiply_pair_blocks<2 * kPairRows, 1>(t, rows, columns, p + b * panel_stride, panel_stride, out + b * kLanes,
                                               ld_out);
}

// [blocks][kRows / 2][16][2]
void left_outer_pairs(const float* q, int64_t ld_q, int64_t rows, int64_t ranks, uint16_t* out) {
    for (int64_t b = 0; b < ranks; b += kLanes)
        for (int64_t m = 0; m < kRows; m += 2) {
            const V16 even = m < rows ? load(q + m * ld_q + b) : zero();
            const V16 odd = m + 1 < rows ? load(q + (m + 1) * ld_q + b) : zero();
            store_halves(out + b * kRows + m * kLanes, round_pairs(even, odd));
        }
}

// Two vectors of columns and a part of a block of ranks at once.
void outer_pairs(const void* tile, int64_t rows, int64_t columns, const void* q, int64_t blocks, float* out,
                 int64_t ld_out) {
    const uint16_t* t = static_cast<const uint16_t*>(tile);
    const Interleave interleave;
    for (int64_t c = 0; c < columns; c += kHalves)
        for (int64_t r0 = 0; r0 < blocks * kLanes; r0 += kPairRanks) {
            const uint16_t* left_q = static_cast<const uint16_t*>(q) + r0 / kLanes * kRows * kLanes + r0 % kLanes * 2;
            V16 sums[kPairRanks][2];
            for (int r = 0; r < kPairRanks; ++r) sums[r][0] = sums[r][1] = zero();
            for (int64_t m = 0; m < rows; m += 2) {
                const V32 even = load_halves(t + m * kColumns + c), odd = load_halves(t + (m + 1) * kColumns + c);
                const V32 low = interleave.low(even, odd), high = interleave.high(even, odd);
                for (int r = 0; r < kPairRanks; ++r) {
                    const V32 pair = splat_pair(left_q + m * kLanes + 2 * r);
                    sums[r][0] = dot_pairs(sums[r][0], pair, low);
                    sums[r][1] = dot_pairs(sums[r][1], pair, high);
                }
            }
            float* o = out + r0 * ld_out + c;
            for (int r = 0; r < kPairRanks; ++r, o += ld_out) {
                store(o, add(load(o), sums[r][0]));
                if (c + kLanes < columns) store(o + kLanes, add(load(o + kLanes), sums[r][1]));
            }
        }
}

// Two vectors of columns for Rows rows at once.
template <int Rows, typename Sink>
inline void expand_pair_rows(const uint16_t* q, int64_t m, int64_t c, int64_t ranks, const uint16_t* panel,
                             int64_t panel_stride, const Sink& sink) {
    const uint16_t* second = c + kLanes < sink.columns ? panel + panel_stride : panel;
    V16 sums[Rows][2];
    for (int i = 0; i < Rows; ++i) sums[i][0] = sums[i][1] = zero();
    for (int64_t r = 0; r < ranks; r += 2) {
        const V32 p0 = load_halves(panel + r * kLanes), p1 = load_halves(second + r * kLanes);
        for (int i = 0; i < Rows; ++i) {
            const V32 t = splat_pair(q + (m + i) * ranks + r);
            sums[i][0] = dot_pairs(sums[i][0], t, p0);
            sums[i][1] = dot_pairs(sums[i][1], t, p1);
        }
    }
    // Two loops, both unrolled, or the sums would not stay in registers.
    if (sink.is_short(c)) {
#pragma GCC unroll 8
        for (int i = 0; i < Rows; ++i) sink.put_short(sums[i][0], sums[i][1], m + i, c);
        return;
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) sink.put_both(sums[i][0], sums[i][1], m + i, c);
}

template <int Rows, typename Sink>
inline void expand_pair_columns(const uint16_t* q, int64_t m, int64_t ranks, const uint16_t* panel,
                                int64_t panel_stride, const Sink& sink) {
    for (int64_t c = 0; c < sink.columns; c += kHalves)
        expand_pair_rows<Rows>(q, m, c, ranks, panel + c / kLanes * panel_stride, panel_stride, sink);
}

// A few rows at a time along all columns: whole lines of y are written one after the other.
template <typename Sink>
void expand_pairs(const void* q, int64_t rows, int64_t columns, int64_t ranks, const void* panel, int64_t panel_stride,
                  const Sink& sink) {
    const uint16_t* left_q = static_cast<const uint16_t*>(q);
    const uint16_t* p = static_cast<const uint16_t*>(panel);
    int64_t m = 0;
    for (; m + kPairRows <= rows; m += kPairRows)
        expand_pair_columns<kPairRows>(left_q, m, ranks, p, panel_stride, sink);
    for (; m < rows; ++m) expand_pair_columns<1>(left_q, m, ranks, p, panel_stride, sink);
}

// Squares of W + q · panel summed along the columns of Rows rows. The sums of the product begin with W; 256 columns are
// summed by themselves.
template <int Rows>
inline void square_pair_rows(const uint16_t* q, int64_t columns, int64_t ranks, const uint16_t* panel,
                             int64_t panel_stride, const uint16_t* w, int64_t ld_w, float* row_sums) {
    constexpr int64_t kAhead = 1024;  // elements of a row: eight streams alone do not keep the memory busy
    V16 totals[Rows];
    for (int i = 0; i < Rows; ++i) totals[i] = zero();
    for (int64_t first = 0; first < columns; first += kColumns) {
        V16 squares[Rows];
        for (int i = 0; i < Rows; ++i) squares[i] = zero();
        for (int64_t c = first; c < smaller(first + kColumns, columns); c += kHalves) {
            const uint16_t* low = panel + c / kLanes * panel_stride;
            const uint16_t* high = c + kLanes < columns ? low + panel_stride : low;
            const int64_t here = columns - c;
            V16 sums[Rows][2];
            for (int i = 0; i < Rows; ++i) {
                const uint16_t* p = w + i * ld_w + c;
                __builtin_prefetch(p + kAhead, 0, 2);
                sums[i][0] = load_first_bf16(p, here);
                sums[i][1] = load_first_bf16(p + kLanes, here - kLanes);
            }
            for (int64_t r = 0; r < ranks; r += 2) {
                const V32 p0 = load_halves(low + r * kLanes), p1 = load_halves(high + r * kLanes);
                for (int i = 0; i < Rows; ++i) {
                    const V32 t = splat_pair(q + i * ranks + r);
                    sums[i][0] = dot_pairs(sums[i][0], t, p0);
                    sums[i][1] = dot_pairs(sums[i][1], t, p1);
                }
            }
            for (int i = 0; i < Rows; ++i) {
                squares[i] = fma(sums[i][0], sums[i][0], squares[i]);
                if (c + kLanes < columns) squares[i] = fma(sums[i][1], sums[i][1], squares[i]);
            }
        }
        for (int i = 0; i < Rows; ++i) totals[i] = add(totals[i], squares[i]);
    }
    for (int i = 0; i < Rows; ++i) row_sums[i] += sum(totals[i]);
}

void square_rows_pairs(const void* q, int64_t rows, int64_t columns, int64_t ranks, const void* panel,
                       int64_t panel_stride, Tile w, float* row_sums) {
    const auto* left_q = static_cast<const uint16_t*>(q);
    const auto* p = static_cast<const uint16_t*>(panel);
    const auto* tile = static_cast<const uint16_t*>(w.data);
    int64_t m = 0;
    for (; m + kPairRows <= rows; m += kPairRows)
        square_pair_rows<kPairRows>(left_q + m * ranks, columns, ranks, p, panel_stride, tile + m * w.ld, w.ld,
                                    row_sums + m);
    for (; m < rows; ++m)
        square_pair_rows<1>(left_q + m * ranks, columns, ranks, p, panel_stride, tile + m * w.ld, w.ld, row_sums + m);
}

}  // namespace
