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
    // Sums are made of shorter ones, no longer than the vendors' chains: an error grows with the length of its chain.
    // For a few rows vendors take dot products in many chains.
    constexpr int64_t kFewRows = 16;
    const int64_t chain = rows < kFewRows ? 32 : 128;
    if (depth > chain) {
        for (int64_t k = 0; k < depth; k += chain)
            product(x + k, ld_x, rows, smaller(chain, depth - k), panel + k * kLanes, panel_stride, blocks,
                    onto || k > 0, out, ld_out);
        return;
    }
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

template <int Blocks>
inline void dropped_row(const SparseBlock& x, int32_t begin, int32_t end, const float* panel, int64_t panel_stride,
                        V16 (&sums)[Blocks]) {
    for (int b = 0; b < Blocks; ++b) sums[b] = zero();
    for (int32_t e = begin; e < end; ++e) {
        const V16 value = splat(x.values[e]);
        const float* p = panel + x.columns[e] * kLanes;
        for (int b = 0; b < Blocks; ++b) sums[b] = fma(value, load(p + b * panel_stride), sums[b]);
    }
}

void product_dropped(const SparseBlock& x, int64_t rows, const float* panel, int64_t panel_stride, int64_t blocks,
                     bool onto, const float* base, float factor, float* out, int64_t ld_out) {
    constexpr int kBlocks = kStripe / kLanes;
    with_count<kBlocks>(blocks, [&]<int Blocks>() {
        for (int64_t i = 0; i < rows; ++i) {
            V16 sums[Blocks];
            dropped_row<Blocks>(x, x.starts[i * x.stride], x.starts[i * x.stride + 1], panel, panel_stride, sums);
            for (int b = 0; b < Blocks; ++b) {
                const int64_t at = i * ld_out + b * kLanes;
                V16 v = sums[b];
                if (onto) v = add(v, load(out + at));
                if (base) v = mul(sub(load(base + at), v), splat(factor));
                store(out + at, v);
            }
        }
    });
}

// Columns elements of one row, of x and of the columns of Sᵀ.
template <int Columns>
inline void sampled_columns(const float* x, const uint8_t* columns, int64_t depth, const float* panel,
                            int64_t panel_stride, bool onto, float* out) {
    V16 sums[Columns];
    for (int i = 0; i < Columns; ++i) sums[i] = zero();
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes, panel += panel_stride) {
        const V16 v = load(x + k);
        for (int i = 0; i < Columns; ++i) sums[i] = fma(v, load(panel + columns[i] * kLanes), sums[i]);
    }
    if (k < depth) {
        const V16 v = load_first(x + k, DType::f32, depth - k);
        for (int i = 0; i < Columns; ++i) sums[i] = fma(v, load(panel + columns[i] * kLanes), sums[i]);
    }
    for (int i = 0; i < Columns; ++i) out[columns[i]] = sum(sums[i]) + (onto ? out[columns[i]] : 0.0f);
}

void product_sampled(const float* x, int64_t ld_x, const SparseBlock& wanted, int64_t rows, int64_t depth,
                     const float* panel, int64_t panel_stride, bool onto, float* out, int64_t ld_out) {
    constexpr int kColumnsAtOnce = 4;
    for (int64_t i = 0; i < rows; ++i) {
        const int32_t end = wanted.starts[i * wanted.stride + 1];
        for (int32_t e = wanted.starts[i * wanted.stride]; e < end; e += kColumnsAtOnce)
            with_count<kColumnsAtOnce>(end - e, [&]<int Columns>() {
                sampled_columns<Columns>(x + i * ld_x, wanted.columns + e, depth, panel, panel_stride, onto,
                                         out + i * ld_out);
            });
    }
}

}  // namespace
