// Packing, the mask, staging, and the products with an adapter's rank; what DoRA adds to them.
#include <cmath>
#include <cstring>
#include <iterator>

#include "../../csrc/philox.h"
#include "check.h"

namespace check {
namespace {

DType format(bool pairs) { return pairs ? DType::bf16 : DType::f32; }

// The mask of one tile.
Array<uint64_t> mask(const Kernels& k, int64_t rows, int64_t columns) {
    Array<uint64_t> words(rows * kKeepWords);
    k.keep(static_cast<uint64_t>(below(1 << 30)), 1 << 15, below(1000), 8 * below(100), rows, columns, words.data());
    return words;
}
bool is_kept(const Array<uint64_t>& words, int64_t row, int64_t column) {
    return words[row * kKeepWords + column / 64] >> column % 64 & 1;
}

// All of S as a panel.
Elements packed(const Kernels& k, const Source& s, bool pairs) {
    const Matrix m = s.matrix();
    Elements panel(format(pairs), padded(m.rows) * padded(m.columns));
    k.pack(m, pairs, panel.at(), 0, padded(m.rows) / kLanes * (padded(m.columns) / kLanes));
    return panel;
}

// A tile as `stage` makes it, and what it holds.
struct Staged {
    Staged(const Kernels& k, DType dtype, int64_t rows, int64_t columns, bool masked, Special special)
        : source(dtype, rows, columns, special),
          words(mask(k, rows, columns)),
          masked(masked),
          tile(format(k.pairs(dtype)), kRows * kColumns) {
        k.stage(source.elements.at(), dtype, source.ld, rows, columns, masked ? words.data() : nullptr, tile.at());
    }
    float operator()(int64_t m, int64_t c) const { return masked && !is_kept(words, m, c) ? 0.0f : source(m, c); }

    Rows source;
    Array<uint64_t> words;
    bool masked;
    Elements tile;
};

// q [rows, ranks] · S [ranks, columns], operands and result, which has zeros beyond the columns, or q's NaN.
struct LowRank {
    LowRank(const Kernels& k, DType dtype, int64_t rows, int64_t columns, int64_t ranks, Special special)
        : pairs(k.pairs(dtype)),
          columns(columns),
          ranks(ranks),
          left(format(pairs), kRows * ranks),
          panel(format(pairs), 0),
          products(rows * padded(columns)) {
        const Rows q(DType::f32, rows, ranks, special);
        const Source s(dtype, ranks - 2, columns, below(2), special);
        k.left(q.elements.floats(), q.ld, rows, ranks, pairs, left.at());
        panel = packed(k, s, pairs);
        for (int64_t m = 0; m < rows; ++m)
            for (int64_t c = 0; c < padded(columns); ++c)
                for (int64_t r = 0; r < ranks; ++r)
                    products[m * padded(columns) + c].add(rounded(q(m, r), format(pairs)), s.or_zero(r, c));
    }
    Sum product(int64_t m, int64_t c) const { return products[m * padded(columns) + c]; }
    int64_t stride() const { return ranks * kLanes; }

    bool pairs;
    int64_t columns, ranks;
    Elements left, panel;
    std::vector<Sum> products;
};

// Calls run(rows, columns, ranks, dtype, special).
template <typename Run>
void each_shape(const char* what, Run run) {
    for (const int64_t rows : kRowCounts)
        for (const int64_t columns : kColumnCounts)
            for (const int64_t ranks : kRankCounts)
                for (const DType dtype : kDTypes) {
                    now(what, rows, "x", columns, "rank", ranks, name(dtype));
                    run(rows, columns, ranks, dtype, none_or_few());
                }
}

void check_pack(const Kernels& k) {
    for (const DType dtype : kDTypes)
        for (const bool pairs : {false, true})
            for (const bool transposed : {false, true})
                for (const int64_t rows : {1, 3, 16, 17, 48, 100})
                    for (const int64_t columns : {1, 7, 16, 63, 255}) {
                        if (pairs && !k.pairs(DType::bf16)) continue;
                        now("pack", rows, "x", columns, name(dtype), "pairs", pairs, "transposed", transposed);
                        const Source s(dtype, rows, columns, transposed, none_or_few());
                        const int64_t down = padded(rows), blocks = down / kLanes * (padded(columns) / kLanes);
                        const Elements panel(format(pairs), down * padded(columns));
                        k.pack(s.matrix(), pairs, panel.at(), 0, blocks / 2);
                        k.pack(s.matrix(), pairs, panel.at(), blocks / 2, blocks);
                        for (int64_t r = 0; r < down; ++r)
                            for (int64_t c = 0; c < padded(columns); ++c) {
                                const int64_t block = c / kLanes * down * kLanes, lane = c % kLanes;
                                const int64_t at = pairs ? r / 2 * 2 * kLanes + lane * 2 + r % 2 : r * kLanes + lane;
                                expect_same(r, c, rounded(s.or_zero(r, c), format(pairs)), panel[block + at], pairs);
                            }
                    }
}

void check_left(const Kernels& k) {
    for (const bool pairs : {false, true})
        for (const int64_t rows : kRowCounts)
            for (const int64_t ranks : kRankCounts) {
                if (pairs && !k.pairs(DType::bf16)) continue;
                now("left", rows, "x", ranks, "pairs", pairs);
                const Rows q(DType::f32, rows, ranks, Special::few);
                const Elements out(format(pairs), kRows * ranks);
                k.left(q.elements.floats(), q.ld, rows, ranks, pairs, out.at());
                for (int64_t m = 0; m < rows; ++m)
                    for (int64_t r = 0; r < ranks; ++r)
                        expect_same(m, r, rounded(q(m, r), format(pairs)), out[m * ranks + r], pairs);
            }
}

void check_keep(const Kernels& k) {
    for (const int64_t rows : kRowCounts)
        for (const int64_t columns : kColumnCounts)
            for (const uint32_t threshold : {1u, 3277u, 0x7fffu, 0x8000u, 0xffffu}) {
                now("keep", rows, "x", columns, "threshold", threshold);
                const uint64_t seed = static_cast<uint64_t>(below(int64_t{1} << 62)) << 2;
                const int64_t row = below(int64_t{1} << 31), column = 8 * below(10000);
                const Array<uint64_t> words(rows * kKeepWords);
                k.keep(seed, threshold, row, column, rows, columns, words.data());
                for (int64_t m = 0; m < rows; ++m)
                    for (int64_t c = 0; c < columns; ++c) {
                        const uint32_t bits = philox_keep(seed, threshold, static_cast<uint32_t>(row + m),
                                                          static_cast<uint32_t>(column / 8 + c / 8));
                        expect_same(m, c, static_cast<float>(bits >> c % 8 & 1), is_kept(words, m, c));
                    }
            }
}

void check_stage(const Kernels& k) {
    for (const DType dtype : kDTypes)
        for (const int64_t rows : kRowCounts)
            for (const int64_t columns : kColumnCounts)
                for (const bool masked : {false, true}) {
                    now("stage", rows, "x", columns, name(dtype), "masked", masked);
                    const Staged staged(k, dtype, rows, columns, masked, Special::many);
                    for (int64_t m = 0; m < rows; ++m)
                        for (int64_t c = 0; c < padded(columns); ++c)
                            expect_same(m, c, c < columns ? staged(m, c) : 0.0f, staged.tile[m * kColumns + c]);
                }
}

// Every number of 16 bits.
void check_conversion(const Kernels& k) {
    for (const DType dtype : {DType::bf16, DType::f16})
        for (int64_t first = 0; first < 1 << 16; first += kRows * kColumns) {
            now("stage", name(dtype), "bits from", first);
            const Elements in(dtype, kRows * kColumns), tile(format(k.pairs(dtype)), kRows * kColumns);
            for (int64_t i = 0; i < kRows * kColumns; ++i)
                static_cast<uint16_t*>(in.at())[i] = static_cast<uint16_t>(first + i);
            k.stage(in.at(), dtype, kColumns, kRows, kColumns, nullptr, tile.at());
            for (int64_t i = 0; i < kRows * kColumns; ++i) expect_same(i / kColumns, i % kColumns, in[i], tile[i]);
        }
}

void check_multiply(const Kernels& k) {
    each_shape("multiply", [&](int64_t rows, int64_t columns, int64_t ranks, DType dtype, Special special) {
        constexpr int64_t kBefore = 32;  // rows of the panel that belong to another tile
        const Staged tile(k, dtype, rows, columns, below(2), special);
        const Source s(dtype, kBefore + columns, ranks - 3, below(2), special);
        const Elements panel = packed(k, s, k.pairs(dtype));
        const Rows before(DType::f32, rows, ranks, special);
        const Rows out = before.copy();
        k.multiply(tile.tile.at(), k.pairs(dtype), rows, columns, panel.at(kBefore * kLanes),
                   padded(kBefore + columns) * kLanes, ranks / kLanes, out.elements.floats(), out.ld);
        for (int64_t m = 0; m < rows; ++m)
            for (int64_t r = 0; r < ranks; ++r) {
                Sum exact;
                exact.add(before(m, r));
                for (int64_t c = 0; c < columns; ++c) exact.add(tile(m, c), s.or_zero(kBefore + c, r));
                expect_sum(m, r, exact, columns + 2, out(m, r));
            }
        expect_gaps(out);
    });
}

void check_outer(const Kernels& k) {
    each_shape("outer", [&](int64_t rows, int64_t columns, int64_t ranks, DType dtype, Special special) {
        const bool pairs = k.pairs(dtype);
        const Staged tile(k, dtype, rows, columns, below(2), special);
        const Rows q(DType::f32, rows, ranks, special);
        const Elements left(format(pairs), kRows * ranks);
        k.left_outer(q.elements.floats(), q.ld, rows, ranks, pairs, left.at());
        const Rows before(DType::f32, ranks, padded(columns), special, kLanes);
        const Rows out = before.copy();
        k.outer(tile.tile.at(), pairs, rows, columns, left.at(), ranks / kLanes, out.elements.floats(), out.ld);
        for (int64_t r = 0; r < ranks; ++r)
            for (int64_t c = 0; c < columns; ++c) {
                Sum exact;
                exact.add(before(r, c));
                for (int64_t m = 0; m < rows; ++m) exact.add(rounded(q(m, r), format(pairs)), tile(m, c));
                expect_sum(r, c, exact, rows + 2, out(r, c));
            }
        expect_gaps(out);
    });
}

// What a Tail has, a letter each: k keep, s second, c scale, z, b bias, and f `from` in the dtype of y, F in float32 or
// y in y itself. What is summed with `from` is in its dtype.
constexpr const char* kTails[] = {"",     "F", "Fb", "kFb", "f",   "fb",  "yb", "ky",   "kb",    "ksyb",
                                  "ksFb", "s", "c",  "cz",  "cFz", "cyb", "cs", "csfz", "csybz", "csFbz"};

void check_tail(const Kernels& k, const LowRank& low_rank, int64_t rows, DType dtype, const char* parts) {
    const auto has = [&](char part) { return std::strchr(parts, part) != nullptr; };
    const int64_t columns = low_rank.columns;
    const Rows from(has('F') ? DType::f32 : dtype, rows, columns, Special::none);
    const Rows second(from.elements.dtype(), rows, columns, Special::none);
    const Elements bias(DType::f32, columns, Special::none), scale(DType::f32, columns, Special::none);
    const Array<uint64_t> words = mask(k, rows, columns);
    const Rows z(kDTypes[below(3)], rows, columns), y = has('y') ? from.copy() : Rows(dtype, rows, columns);
    Tail tail{.y = y.elements.at(), .dtype = dtype, .ld_y = y.ld};
    if (has('k')) tail.keep = words.data();
    if (has('f') || has('F')) tail.from = from.tile();
    if (has('y')) tail.from = y.tile();
    if (has('s')) tail.second = second.tile();
    if (has('b')) tail.bias = bias.floats();
    if (has('c')) tail.scale = scale.floats();
    if (has('z')) {
        tail.z = z.elements.at();
        tail.z_dtype = z.elements.dtype();
        tail.ld_z = z.ld;
    }
    k.expand(low_rank.left.at(), low_rank.pairs, rows, columns, low_rank.ranks, low_rank.panel.at(), low_rank.stride(),
             tail);
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t c = 0; c < columns; ++c) {
            const int64_t roundings = low_rank.ranks + 6;
            const double base = tail.from.data ? from(m, c) : 0.0, other = has('s') ? second(m, c) : 0.0;
            Sum sum = low_rank.product(m, c);
            if (has('s') || has('c')) sum.add(has('s') ? other : base);
            if (has('z')) expect_sum(m, c, sum, roundings, z(m, c), z.elements.dtype());
            if (has('k') && !is_kept(words, m, c)) sum = {};
            if (has('c')) {
                sum = sum.times(scale[c]);
                if (has('s')) sum.add(-other);
            }
            if (has('s') || !has('c')) sum.add(base);
            if (has('b')) sum.add(bias[c]);
            expect_sum(m, c, sum, roundings, y(m, c), dtype);
        }
    expect_gaps(y);
    expect_gaps(z);
}

void check_expand(const Kernels& k) {
    constexpr int kTailsEach = 4;  // of each shape
    each_shape("", [&](int64_t rows, int64_t columns, int64_t ranks, DType dtype, Special special) {
        const LowRank low_rank(k, dtype, rows, columns, ranks, special);
        for (const DType out : {dtype, DType::f32})
            for (int i = 0; i < kTailsEach; ++i) {
                const char* parts = kTails[below(std::size(kTails))];
                now("expand", rows, "x", columns, "rank", ranks, name(dtype), "y", name(out), "tail", parts);
                if (out == dtype || dtype == DType::bf16) check_tail(k, low_rank, rows, out, parts);
            }
    });
}

// Squares of W + q · S, along rows or down columns, and their sums in doubles.
void check_squares_of(const Kernels& k, int64_t rows, int64_t columns, int64_t ranks, DType dtype, Special special,
                      bool down) {
    const LowRank low_rank(k, dtype, rows, columns, ranks, special);
    const Rows w(dtype, rows, columns, special);
    const int64_t count = down ? columns : rows, length = down ? rows : padded(columns);
    const Rows before(DType::f32, 1, count, special);
    const Rows sums = before.copy();
    k.squares(low_rank.left.at(), low_rank.pairs, rows, columns, ranks, low_rank.panel.at(), low_rank.stride(),
              w.tile(), down ? nullptr : sums.elements.floats(), down ? sums.elements.floats() : nullptr);
    for (int64_t i = 0; i < count; ++i) {
        Sum exact;
        exact.add(before(0, i));
        for (int64_t j = 0; j < length; ++j) {
            const int64_t m = down ? j : i, c = down ? i : j;
            Sum v = low_rank.product(m, c);
            if (c < columns) v.add(w(m, c));
            exact.value += v.value * v.value;
            exact.size += v.size * v.size;
            exact.subnormal += (2 * v.size + v.subnormal) * v.subnormal;
        }
        expect_sum(i, 0, exact, length + 2 * (ranks + 2), sums(0, i));  // an error of v counts twice in its square
    }
}

void check_squares(const Kernels& k) {
    each_shape("squares", [&](int64_t rows, int64_t columns, int64_t ranks, DType dtype, Special special) {
        check_squares_of(k, rows, columns, ranks, dtype, special, below(2));
    });
    now("squares of long rows");
    check_squares_of(k, 11, 3 * kColumns + 5, 16, DType::bf16, Special::none, false);
}

void check_scale(const Kernels& k) {
    each_shape("scale", [&](int64_t rows, int64_t columns, int64_t, DType dtype, Special special) {
        const Rows in(dtype, rows, columns, special), out(dtype, rows, columns);
        const Elements scale(DType::f32, columns, special);
        const Array<uint64_t> words = mask(k, rows, columns);
        const bool masked = below(2), scaled = below(2);
        const float factor = number(Special::none);
        k.scale(in.tile(), rows, columns, masked ? words.data() : nullptr, scaled ? scale.floats() : nullptr, factor,
                out.elements.at(), out.ld);
        for (int64_t m = 0; m < rows; ++m)
            for (int64_t c = 0; c < columns; ++c) {
                const float v = in(m, c) * factor * (scaled ? scale[c] : 1.0f);
                const bool kept = !masked || is_kept(words, m, c);
                expect_same(m, c, kept ? rounded(v, dtype) : 0.0f, out(m, c), dtype == DType::bf16);
            }
        expect_gaps(out);
    });
}

void check_column_dots(const Kernels& k) {
    each_shape("column_dots", [&](int64_t rows, int64_t columns, int64_t, DType dtype, Special special) {
        const Rows a(dtype, rows, columns, special), b(kDTypes[below(3)], rows, columns, special);
        const Rows before(DType::f32, 1, columns, special);
        const Rows sums = before.copy();
        k.column_dots(a.tile(), b.tile(), rows, columns, sums.elements.floats());
        for (int64_t c = 0; c < columns; ++c) {
            Sum exact;
            exact.add(before(0, c));
            for (int64_t m = 0; m < rows; ++m) exact.add(a(m, c), b(m, c));
            expect_sum(0, c, exact, rows + 1, sums(0, c));
        }
    });
}

}  // namespace

void check_skinny(const Kernels& k) {
    for (const auto check_one : {check_pack, check_left, check_keep, check_stage, check_conversion, check_multiply,
                                 check_outer, check_expand, check_squares, check_scale, check_column_dots})
        check_one(k);
}

}  // namespace check
