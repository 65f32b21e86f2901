// The base product in float32 over V16: a stripe of W is packed, and multiplied with many rows of x.
#include "float_kernels.inl"

namespace {

// Along the rows of W (the columns of S) sixteen streams run, which the processor foresees; down its rows, a stripe
// wide, there is nothing to foresee, and lines further down are asked for.
void pack_stripe_float(const Matrix& s, int64_t row, int64_t rows, int64_t column, float* out, int64_t ld_out) {
    constexpr int64_t kAhead = 2 * kLanes;
    const bool down = s.column_stride == 1;
    const auto pack_block = [&](int64_t c, int64_t k) {
        V16 v[16];
        load_block(s, row + k, column + c, v);
        for (int64_t i = 0; i < smaller(kLanes, rows - k); ++i)
            store(out + c / kLanes * ld_out + (k + i) * kLanes, v[i]);
    };
    if (down)
        for (int64_t k = 0; k < rows; k += kLanes) {
            for (int64_t i = 0; i < kLanes; ++i)
                for (int64_t c = 0; c < kStripe; c += kLanes)
                    __builtin_prefetch(at(s.data, s.dtype, (row + k + kAhead + i) * s.row_stride + column + c), 0, 2);
            for (int64_t c = 0; c < kStripe; c += kLanes) pack_block(c, k);
        }
    else
        for (int64_t c = 0; c < kStripe; c += kLanes)
            for (int64_t k = 0; k < rows; k += kLanes) pack_block(c, k);
}

// The base product: Rows x Blocks accumulators stay in registers along the whole depth. The three loops over them are
// apart because the compiler keeps an array in registers only where each of its loops is one of constant bounds.
template <int Rows, int Blocks>
inline void product_rows(const float* x, int64_t ld_x, int64_t depth, const float* panel, int64_t panel_stride,
                         bool onto, float* out, int64_t ld_out) {
    V16 sums[Rows][Blocks];
    for (int i = 0; i < Rows; ++i)
        for (int b = 0; b < Blocks; ++b) sums[i][b] = zero();
    const auto step = [&](int64_t k) __attribute__((always_inline)) {
        V16 p[Blocks];
        for (int b = 0; b < Blocks; ++b) p[b] = load(panel + b * panel_stride + k * kLanes);
        for (int i = 0; i < Rows; ++i) {
            const V16 t = splat(x[i * ld_x + k]);
            for (int b = 0; b < Blocks; ++b) sums[i][b] = fma(t, p[b], sums[i][b]);
        }
    };
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
        for (int i = 0; i < Rows; ++i) __builtin_prefetch(x + (Rows + i) * ld_x + k);  // of the rows that come next
#pragma GCC unroll 8
        for (int j = 0; j < kLanes; ++j) step(k + j);
    }
    for (; k < depth; ++k) step(k);
    if (onto)
        for (int i = 0; i < Rows; ++i)
            for (int b = 0; b < Blocks; ++b) sums[i][b] = add(sums[i][b], load(out + i * ld_out + b * kLanes));
    for (int i = 0; i < Rows; ++i)
        for (int b = 0; b < Blocks; ++b) store(out + i * ld_out + b * kLanes, sums[i][b]);
}

void product(const float* x, int64_t ld_x, int64_t rows, int64_t depth, const float* panel, int64_t panel_stride,
             int64_t blocks, bool onto, float* out, int64_t ld_out) {
    constexpr int64_t kTogether =
        96 / kProductRows * kProductRows;  // rows of x that wait for the next panel in a cache
    for (int64_t first = 0; first < rows; first += kTogether) {
        const int64_t end = smaller(first + kTogether, rows);
        const auto some = [&]<int Blocks>(int64_t b) {
            const float* p = panel + b * panel_stride;
            for (int64_t m = first; m < end; m += kProductRows)
                with_count<kProductRows>(end - m, [&]<int Rows>() {
                    product_rows<Rows, Blocks>(x + m * ld_x, ld_x, depth, p, panel_stride, onto,
                                               out + m * ld_out + b * kLanes, ld_out);
                });
        };
        for (int64_t b = 0; b < blocks; b += kProductBlocks)
            with_count<kProductBlocks>(blocks - b, [&]<int Blocks>() { some.template operator()<Blocks>(b); });
    }
}

}  // namespace
