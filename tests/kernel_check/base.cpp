// The base product in float32, its panels, and its products with the elements that dropout drops.
#include <algorithm>
#include <numeric>

#include "check.h"

namespace check {
namespace {

// A panel [blocks][stride / 16][16] of float32 of a matrix of so many rows: what is beyond them is NaN.
struct Panel {
    Panel(int64_t rows, int64_t blocks, int64_t stride, Special special)
        : stride(stride), elements(DType::f32, (blocks - 1) * stride + rows * kLanes) {
        for (int64_t b = 0; b < blocks; ++b)
            for (int64_t i = 0; i < rows * kLanes; ++i) elements.set(b * stride + i, number(special));
    }
    float operator()(int64_t row, int64_t column) const {
        return elements[column / kLanes * stride + row * kLanes + column % kLanes];
    }

    int64_t stride;
    Elements elements;
};

// Rows [row, row + rows) and a stripe of columns of a matrix that ends within them, or does not.
template <typename Run>
void each_stripe(const char* what, const std::vector<DType>& dtypes, Run run) {
    for (const DType dtype : dtypes)
        for (const bool transposed : {false, true})
            for (const int64_t rows : {2, 16, 18, 64, 256})
                for (const int64_t missing_rows : {0, 1, 17})
                    for (const int64_t columns : {1, 7, 16, 63, 64, 200}) {
                        constexpr int64_t kRow = 5, kColumn = 64;
                        now(what, rows, "x", columns, "missing", missing_rows, name(dtype), "transposed", transposed);
                        const int64_t there = std::max<int64_t>(1, kRow + rows - missing_rows);
                        run(Source(dtype, there, kColumn + columns, transposed, Special::few), kRow, rows, kColumn);
                    }
}

void check_pack_stripes(const Kernels& k) {
    each_stripe("pack_stripe_float", {std::begin(kDTypes), std::end(kDTypes)},
                [&](const Source& s, int64_t row, int64_t rows, int64_t column) {
                    const int64_t ld = rows * kLanes + 16;
                    const Elements out(DType::f32, 3 * ld + rows * kLanes);
                    k.pack_stripe_float(s.matrix(), row, rows, column, out.floats(), ld);
                    for (int64_t i = 0; i < rows; ++i)
                        for (int64_t c = 0; c < kStripe; ++c)
                            expect_same(i, c, s.or_zero(row + i, column + c),
                                        out[c / kLanes * ld + i * kLanes + c % kLanes]);
                    for (int64_t b = 0; b < 3; ++b)
                        expect(out.is_untouched(b * ld + rows * kLanes, ld - rows * kLanes), "wrote between blocks");
                });
    expect((k.pack_stripe != nullptr) == k.pairs(DType::bf16), "pack_stripe is there without pairs, or the reverse");
    if (!k.pack_stripe) return;
    each_stripe("pack_stripe", {DType::bf16}, [&](const Source& s, int64_t row, int64_t rows, int64_t column) {
        const Elements out(DType::bf16, rows * kStripe);
        k.pack_stripe(s.matrix(), row, rows, column, out.at());
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t c = 0; c < kStripe; ++c)
                expect_same(i, c, s.or_zero(row + i, column + c), out[(i / 2 * kStripe + c) * 2 + i % 2]);
    });
}

void check_product_of(const Kernels& k, int64_t rows, int64_t depth, int64_t blocks, bool onto, Special special) {
    now("product", rows, "x", depth, "blocks", blocks, "onto", onto);
    const Rows x(DType::f32, rows, depth, special), before(DType::f32, rows, blocks * kLanes, special);
    const Panel panel(depth, blocks, depth * kLanes + 32, special);
    const Rows out = onto ? before.copy() : Rows(DType::f32, rows, blocks * kLanes);
    k.product(x.elements.floats(), x.ld, rows, depth, panel.elements.floats(), panel.stride, blocks, onto,
              out.elements.floats(), out.ld);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < out.columns; ++j) {
            Sum exact;
            if (onto) exact.add(before(i, j));
            for (int64_t d = 0; d < depth; ++d) exact.add(x(i, d), panel(d, j));
            expect_sum(i, j, exact, depth + 2, out(i, j));
        }
    expect_gaps(out);
}

void check_product(const Kernels& k) {
    for (int64_t rows = 1; rows <= 20; ++rows)
        for (const int64_t depth : {1, 17, 256})
            for (const int64_t blocks : {1, 2, 3, 4})
                check_product_of(k, rows, depth, blocks, (rows + blocks) % 2, none_or_few());
    check_product_of(k, 205, 33, 4, true, Special::few);
}

// Lists of columns, some elements a row of each of three blocks, of which the one in the middle is handed on.
struct Sparse {
    Sparse(int64_t rows, int64_t columns) {
        for (int64_t list = 0; list < 3 * rows; ++list) {
            starts.push_back(static_cast<int32_t>(places.size()));
            std::vector<uint8_t> all(columns);
            std::iota(all.begin(), all.end(), uint8_t{0});
            for (int64_t left = below(columns + 1); left > 0; --left) {
                std::swap(all[left - 1], all[below(left)]);
                places.push_back(all[left - 1]);
            }
        }
        starts.push_back(static_cast<int32_t>(places.size()));
        columns_ = Array<uint8_t>(static_cast<int64_t>(places.size()));
        std::copy(places.begin(), places.end(), columns_.data());
        values = Elements(DType::f32, static_cast<int64_t>(places.size()), Special::none);
    }
    SparseBlock block(bool with_values) const {
        return {starts.data() + 1, 3, columns_.data(), with_values ? values.floats() : nullptr};
    }
    // Calls run(place, value) for the elements of a row.
    template <typename Run>
    void each(int64_t row, Run run) const {
        for (int32_t e = starts[3 * row + 1]; e < starts[3 * row + 2]; ++e) run(places[e], values[e]);
    }

    std::vector<int32_t> starts;
    std::vector<uint8_t> places;
    Array<uint8_t> columns_{0};
    Elements values{DType::f32, 0};
};

void check_product_dropped(const Kernels& k) {
    for (const int64_t rows : kRowCounts)
        for (const int64_t depth : {1, 17, 256})
            for (const int64_t blocks : {1, 2, 3, 4})
                for (const bool onto : {false, true})
                    for (const bool last : {false, true}) {
                        now("product_dropped", rows, "x", depth, "blocks", blocks, "onto", onto, "last", last);
                        const Special special = none_or_few();
                        const Sparse x(rows, depth);
                        const Panel panel(depth, blocks, depth * kLanes + 32, special);
                        const Rows before(DType::f32, rows, blocks * kLanes, special);
                        const Rows base(DType::f32, rows, blocks * kLanes, special);
                        const Rows out = onto ? before.copy() : Rows(DType::f32, rows, blocks * kLanes);
                        const float factor = number(Special::none);
                        k.product_dropped(x.block(true), rows, panel.elements.floats(), panel.stride, blocks, onto,
                                          last ? base.elements.floats() : nullptr, factor, out.elements.floats(),
                                          out.ld);
                        for (int64_t i = 0; i < rows; ++i)
                            for (int64_t j = 0; j < out.columns; ++j) {
                                Sum exact;
                                if (onto) exact.add(before(i, j));
                                x.each(i, [&](uint8_t d, float v) { exact.add(v, panel(d, j)); });
                                if (last) {
                                    exact.add(-base(i, j));
                                    exact = exact.times(-factor);
                                }
                                expect_sum(i, j, exact, depth + 4, out(i, j));
                            }
                        expect_gaps(out);
                    }
}

void check_product_sampled(const Kernels& k) {
    for (const int64_t rows : kRowCounts)
        for (const int64_t depth : {1, 17, 64, 255})
            for (const bool onto : {false, true}) {
                now("product_sampled", rows, "x", depth, "onto", onto);
                const Special special = none_or_few();
                const Rows x(DType::f32, rows, depth, special), before(DType::f32, rows, kStripe, special);
                const Sparse wanted(rows, kStripe);
                // S [64, depth]: sixteen of the contracted dimension side by side, zeros behind the last.
                const Panel s(kStripe, padded(depth) / kLanes, kStripe * kLanes + kLanes, special);
                for (int64_t c = 0; c < kStripe; ++c)
                    for (int64_t d = depth; d < padded(depth); ++d)
                        s.elements.floats()[d / kLanes * s.stride + c * kLanes + d % kLanes] = 0.0f;
                const Rows out = onto ? before.copy() : Rows(DType::f32, rows, kStripe);
                k.product_sampled(x.elements.floats(), x.ld, wanted.block(false), rows, depth, s.elements.floats(),
                                  s.stride, onto, out.elements.floats(), out.ld);
                for (int64_t i = 0; i < rows; ++i) {
                    std::vector<bool> is_wanted(kStripe);
                    wanted.each(i, [&](uint8_t c, float) {
                        is_wanted[c] = true;
                        Sum exact;
                        if (onto) exact.add(before(i, c));
                        for (int64_t d = 0; d < depth; ++d) exact.add(x(i, d), s(c, d));
                        expect_sum(i, c, exact, depth + 2, out(i, c));
                    });
                    for (int64_t c = 0; c < kStripe; ++c)
                        if (!is_wanted[c] && onto)
                            expect_same(i, c, before(i, c), out(i, c));
                        else if (!is_wanted[c])
                            expect(out.elements.is_untouched(i * out.ld + c, 1), "wrote too much");
                }
                expect_gaps(out);
            }
}

}  // namespace

void check_base_product(const Kernels& k) {
    for (const auto check_one : {check_pack_stripes, check_product, check_product_dropped, check_product_sampled})
        check_one(k);
}

}  // namespace check
