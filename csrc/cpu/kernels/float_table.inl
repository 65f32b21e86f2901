// Fills in the table of kernels.h for an instruction set that computes every dtype in float32.
#include "dot_kernels.inl"
#include "keep.inl"
#include "product_kernels.inl"

namespace {

bool no_pairs(DType) { return false; }

constexpr Kernels float_table(const char* name, fastpeft::cpu::Preferences prefers = {}) {
    return Kernels{
        .name = name,
        .prefers = prefers,
        .pairs = no_pairs,
        .pack = pack_float,
        .left = left_float,
        .left_outer = left_float,  // the same: rows of q
        .keep = keep,
        .stage = stage_float,
        .multiply = multiply_float,
        .outer = outer_float,
        .expand = expand_float,
        .squares = squares_float,
        .scale = scale_float,
        .column_dots = column_dots_float,
        .product = product,
        .product_dropped = product_dropped,
        .product_sampled = product_sampled,
        .decode = decode,
        .pack_stripe_float = pack_stripe_float,
        .dot = dot_float,
        .float_order = &Codes::kOrder,
        .dot_four_bit = dot_four_bit_float,
    };
}

}  // namespace
