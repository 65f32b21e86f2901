// Fills in the table of kernels.h for an instruction set that has bfloat16-pair kernels: PAIR(name) is the pair kernel
// of that name.
namespace {

void multiply(const void* tile, bool pairs, int64_t rows, int64_t columns, const void* panel, int64_t panel_stride,
              int64_t blocks, float* out, int64_t ld_out) {
    if (!pairs) return multiply_float(tile, pairs, rows, columns, panel, panel_stride, blocks, out, ld_out);
    PAIR(multiply)(tile, rows, columns, panel, panel_stride, blocks, out, ld_out);
}

void left_outer(const float* q, int64_t ld_q, int64_t rows, int64_t ranks, bool pairs, void* out) {
    if (!pairs) return left_float(q, ld_q, rows, ranks, pairs, out);
    PAIR(left_outer)(q, ld_q, rows, ranks, static_cast<uint16_t*>(out));
}

void outer(const void* tile, bool pairs, int64_t rows, int64_t columns, const void* q, int64_t blocks, float* out,
           int64_t ld_out) {
    if (!pairs) return outer_float(tile, pairs, rows, columns, q, blocks, out, ld_out);
    PAIR(outer)(tile, rows, columns, q, blocks, out, ld_out);
}

void expand(const void* q, bool pairs, int64_t rows, int64_t columns, int64_t ranks, const void* panel,
            int64_t panel_stride, const Tail& tail) {
    if (!pairs) return expand_float(q, pairs, rows, columns, ranks, panel, panel_stride, tail);
    PAIR(expand)(q, rows, columns, ranks, panel, panel_stride, PairPut{{tail, columns}});
}

void squares(const void* q, bool pairs, int64_t rows, int64_t columns, int64_t ranks, const void* panel,
             int64_t panel_stride, Tile w, float* row_sums, float* column_sums) {
    if (!pairs) return squares_float(q, pairs, rows, columns, ranks, panel, panel_stride, w, row_sums, column_sums);
    if (row_sums) return PAIR(square_rows)(q, rows, columns, ranks, panel, panel_stride, w, row_sums);
    sum_squares<PairSquares>(rows, columns, w, nullptr, column_sums, [&](const PairSquares& sink) {
        PAIR(expand)(q, rows, columns, ranks, panel, panel_stride, sink);
    });
}

constexpr Kernels pair_table(const char* name, fastpeft::cpu::Preferences prefers) {
    return Kernels{
        .name = name,
        .prefers = prefers,
        .pairs = bf16_pairs,
        .pack = pack,
        .left = left,
        .left_outer = left_outer,
        .keep = keep,
        .stage = stage,
        .multiply = multiply,
        .outer = outer,
        .expand = expand,
        .squares = squares,
        .scale = scale_float,
        .column_dots = column_dots_float,
        .product = product,
        .product_dropped = product_dropped,
        .product_sampled = product_sampled,
        .decode = decode_pairs,
        .pack_stripe_float = pack_stripe_float,
        .pack_stripe = pack_stripe,
        .dot = dot,
        .float_order = &Codes::kOrder,
        .dot_four_bit = dot_four_bit,
    };
}

}  // namespace
