// Fills in the table of kernels.h for an instruction set that computes every dtype in float32.
namespace {

bool no_pairs(DType) { return false; }

void keep_scalar(uint64_t seed, uint32_t threshold, int64_t row, int64_t column, int64_t rows, int64_t columns,
                 uint64_t* words) {
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t c = 0; c < columns; c += 64) {
            uint64_t word = 0;
            for (int64_t group = 0; group < 8; ++group)
                word |= static_cast<uint64_t>(fastpeft::philox_keep(seed, threshold, static_cast<uint32_t>(row + m),
                                                                    static_cast<uint32_t>((column + c) / 8 + group)))
                        << (8 * group);
            words[m * kKeepWords + c / 64] = word;
        }
}

constexpr Kernels float_table(const char* name) {
    return Kernels{
        .name = name,
        .pairs = no_pairs,
        .pack = pack_float,
        .left = left_float,
        .left_outer = left_float,  // the same: rows of q
        .keep = keep_scalar,
        .stage = stage_float,
        .multiply = multiply_float,
        .outer = outer_float,
        .expand = expand_float,
        .squares = squares_float,
        .scale = scale_float,
        .column_dots = column_dots_float,
        .decode = decode,
        .dot = dot_float,
    };
}

}  // namespace
