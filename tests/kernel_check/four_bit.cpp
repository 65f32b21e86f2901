// 4-bit weights, and dot products of a few tokens with the rows of W, dense or of 4 bits.
#include <algorithm>
#include <cmath>

#include "check.h"

namespace check {
namespace {

// A 4-bit weight of random codes and scales.
struct Packed {
    Packed(int64_t elements, int block_bits, bool nested, Special special)
        : codes((elements + 1) / 2),
          code(DType::f32, 16, special),
          blocks((elements + (int64_t{1} << block_bits) - 1) >> block_bits),
          block_bits(block_bits),
          nested(nested),
          absmax(DType::f32, blocks, special),
          q(blocks),
          code2(DType::f32, 256, Special::none),
          absmax2(DType::f32, (blocks + 255) / 256, special),
          offset(DType::f32, 1, Special::none) {
        for (int64_t i = 0; i < (elements + 1) / 2; ++i) codes[i] = static_cast<uint8_t>(below(256));
        for (int64_t i = 0; i < blocks; ++i) q[i] = static_cast<uint8_t>(below(256));
    }
    FourBit weight() const {
        if (!nested)
            return {codes.data(), code.floats(), absmax.floats(), nullptr, nullptr, nullptr, nullptr, block_bits};
        return {codes.data(),   code.floats(),    nullptr,         q.data(),
                code2.floats(), absmax2.floats(), offset.floats(), block_bits};
    }
    float operator()(int64_t i, DType rounding) const {
        const int64_t block = i >> block_bits;
        const float nested_scale = code2[q[block]] * absmax2[block / 256] + offset[0];
        const float value = code[codes[i / 2] >> (i % 2 ? 0 : 4) & 15];
        return rounded(value * (nested ? nested_scale : absmax[block]), rounding);
    }

    Array<uint8_t> codes;
    Elements code;
    int64_t blocks;
    int block_bits;
    bool nested;
    Elements absmax;
    Array<uint8_t> q;
    Elements code2, absmax2, offset;
};

// Rows of `count` elements, from `first` on and then every ld elements.
struct Part {
    int64_t first, ld, rows, count;
    int64_t end() const { return first + (rows - 1) * ld + count; }
};

void check_decode_of(const Kernels& k, const Packed& w, const Part& part, DType rounding, DType dtype) {
    now("decode", part.rows, "x", part.count, "from", part.first, "every", part.ld, "block bits", w.block_bits,
        "nested", w.nested, name(rounding), "as", name(dtype));
    const Rows out(dtype, part.rows, part.count);
    k.decode(w.weight(), part.first, part.ld, part.rows, part.count, rounding, out.elements.at(), dtype, out.ld);
    for (int64_t i = 0; i < part.rows; ++i)
        for (int64_t j = 0; j < part.count; ++j)
            expect_same(i, j, w(part.first + i * part.ld + j, rounding), out(i, j), rounding == DType::bf16);
    expect_gaps(out);
}

void check_decode(const Kernels& k) {
    constexpr DType kFormats[][2] = {{DType::f32, DType::f32},
                                     {DType::bf16, DType::bf16},
                                     {DType::f16, DType::f16},
                                     {DType::bf16, DType::f32},
                                     {DType::f16, DType::f32}};
    for (const int block_bits : {5, 6, 12})
        for (const bool nested : {false, true})
            for (const int64_t first : {0, 1, 63, 64, 65, 4064})
                for (const int64_t ld : {320, 321})
                    for (const int64_t count : {1, 7, 31, 32, 64, 100, 256})
                        for (const auto& [rounding, dtype] : kFormats) {
                            const Part part{first, ld, 1 + below(3), count};
                            const Packed w(part.end(), block_bits, nested, none_or_few());
                            check_decode_of(k, w, part, rounding, dtype);
                        }
    const Packed large(70000, 6, true, Special::none);  // more blocks than one of the nested statistics has
    check_decode_of(k, large, {65000, 0, 1, 5000}, DType::f32, DType::f32);
}

// What follows a dot product: y = x Wᵀ + q Bᵀ + bias, of the rows [kBegin, kEnd) of W.
constexpr int64_t kBegin = 1, kEnd = 4;

struct LowRankTail {
    LowRankTail(int64_t tokens, int64_t ranks, Special special)
        : ranks(ranks),
          q(DType::f32, tokens * ranks, special),
          b(kDTypes[below(3)], kEnd, ranks, special),
          bias(DType::f32, kEnd, special),
          has_bias(below(2)),
          y(kDTypes[below(3)], tokens, kEnd) {}
    const float* q_data() const { return ranks ? q.floats() : nullptr; }
    Matrix b_matrix() const { return {b.elements.at(), b.elements.dtype(), kEnd, ranks, b.ld, 1}; }
    const float* bias_data() const { return has_bias ? bias.floats() : nullptr; }
    void expect_right(int64_t t, int64_t n, Sum exact, int64_t roundings) const {
        for (int64_t r = 0; r < ranks; ++r) exact.add(q[t * ranks + r], b(n, r));
        if (has_bias) exact.add(bias[n]);
        expect_sum(t, n, exact, roundings + ranks + 2, y(t, n), y.elements.dtype());
    }
    void expect_the_rest_untouched() const {
        for (int64_t t = 0; t < y.rows; ++t) expect(y.elements.is_untouched(t * y.ld, kBegin), "wrote other rows");
        expect_gaps(y);
    }

    int64_t ranks;
    Elements q;
    Rows b;
    Elements bias;
    bool has_bias;
    Rows y;
};

void check_dot(const Kernels& k) {
    for (const DType dtype : kDTypes)
        for (int64_t tokens = 1; tokens <= 8; ++tokens)
            for (const int64_t columns : {1, 7, 63, 100, 255, 256, 640})
                for (const int64_t ranks : {0, 1, 16, 19}) {
                    now("dot", tokens, "tokens", columns, "columns", ranks, "ranks", name(dtype));
                    const Special special = none_or_few();
                    const bool pairs = k.pairs(dtype);
                    const int64_t width = pairs ? columns : padded(columns);
                    const Rows x(pairs ? DType::bf16 : DType::f32, tokens, width, special);
                    for (int64_t t = 0; t < tokens; ++t)
                        for (int64_t c = columns; c < width; ++c) x.elements.floats()[t * x.ld + c] = 0.0f;
                    const Rows w(dtype, kEnd, columns, special);
                    const LowRankTail tail(tokens, ranks, special);
                    k.dot(x.elements.at(), x.ld, tokens, {w.elements.at(), dtype, kEnd, columns, w.ld, 1},
                          tail.q_data(), tail.b_matrix(), tail.bias_data(), tail.y.elements.at(),
                          tail.y.elements.dtype(), tail.y.ld, kBegin, kEnd);
                    for (int64_t t = 0; t < tokens; ++t)
                        for (int64_t n = kBegin; n < kEnd; ++n) {
                            Sum exact;
                            for (int64_t c = 0; c < columns; ++c) exact.add(x(t, c), w(n, c));
                            tail.expect_right(t, n, exact, columns + 2);
                        }
                    tail.expect_the_rest_untouched();
                }
}

void check_dot_four_bit_of(const Kernels& k, DType dtype, int64_t tokens, int64_t columns, const Packed& w,
                           Special special) {
    const bool pairs = k.pairs(dtype);
    const Elements x(pairs ? DType::bf16 : DType::f32, tokens * columns, special);
    const Order64& order = pairs ? kEvenThenOdd : *k.float_order;
    const auto x_at = [&](int64_t t, int64_t c) {
        const auto* place = std::find(std::begin(order.at), std::end(order.at), c % 64);
        return x[(c / 64 * tokens + t) * 64 + (place - order.at)];
    };
    const LowRankTail tail(tokens, 5, special);
    k.dot_four_bit(x.at(), dtype, tokens, columns, w.weight(), tail.q_data(), tail.b_matrix(), tail.bias_data(),
                   tail.y.elements.at(), tail.y.elements.dtype(), tail.y.ld, kBegin, kEnd);
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t n = kBegin; n < kEnd; ++n) {
            Sum exact;
            for (int64_t c = 0; c < columns; ++c) exact.add(x_at(t, c), w(n * columns + c, dtype));
            tail.expect_right(t, n, exact, columns + 2);
        }
    tail.expect_the_rest_untouched();
}

void check_dot_four_bit(const Kernels& k) {
    for (const DType dtype : kDTypes)
        for (const int block_bits : {6, 12})
            for (const bool nested : {false, true})
                for (int64_t tokens = 1; tokens <= 8; ++tokens)
                    for (const int64_t columns : {64, 192, 4160}) {
                        if (columns > 1000 && tokens != 8) continue;  // one of more groups than are prepared at once
                        now("dot_four_bit", tokens, "tokens", columns, "columns, block bits", block_bits, "nested",
                            nested, name(dtype));
                        const Special special = none_or_few();
                        const Packed w(kEnd * columns, block_bits, nested, special);
                        check_dot_four_bit_of(k, dtype, tokens, columns, w, special);
                    }
}

}  // namespace

void check_dots(const Kernels& k) {
    for (const auto check_one : {check_decode, check_dot, check_dot_four_bit}) check_one(k);
}

}  // namespace check
