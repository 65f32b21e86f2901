#include "dropped.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>

#include "skinny.h"

namespace fastpeft::cpu {

Dropped::Dropped(const Kernels& kernels, uint64_t seed, uint32_t threshold, int64_t rows, int64_t columns,
                 int64_t block, const float* x, int64_t ld_x)
    : blocks_(ceil_div(columns, block)), parts_(ceil_div(rows, kRows)) {
    std::atomic<bool> finite{true};
    const int64_t tiles = ceil_div(columns, kColumns);
    at::parallel_for(0, static_cast<int64_t>(parts_.size()), 1, [&](int64_t begin, int64_t end) {
        std::vector<uint64_t> words(kRows * kKeepWords * tiles);
        for (int64_t p = begin; p < end; ++p) {
            const int64_t first = p * kRows, count = std::min(kRows, rows - first);
            for (int64_t t = 0; t < tiles; ++t)
                kernels.keep(seed, threshold, first, t * kColumns, count, std::min(kColumns, columns - t * kColumns),
                             words.data() + t * kRows * kKeepWords);
            Part& part = parts_[p];
            part.starts.push_back(0);
            for (int64_t m = 0; m < count; ++m) {
                int64_t at_block = 0;
                const auto close_blocks = [&](int64_t upto) {
                    for (; at_block < upto; ++at_block)
                        part.starts.push_back(static_cast<int32_t>(part.columns.size()));
                };
                for (int64_t c = 0; c < columns; c += 64) {
                    const int64_t tile = c / kColumns, word = c % kColumns / 64;
                    uint64_t dropped = ~words[(tile * kRows + m) * kKeepWords + word];
                    if (columns - c < 64) dropped &= (uint64_t{1} << (columns - c)) - 1;
                    for (; dropped; dropped &= dropped - 1) {
                        const int64_t column = c + std::countr_zero(dropped);
                        close_blocks(column / block);
                        part.columns.push_back(static_cast<uint8_t>(column - at_block * block));
                        if (x) part.values.push_back(x[(first + m) * ld_x + column]);
                    }
                }
                close_blocks(blocks_);
            }
            if (!std::all_of(part.values.begin(), part.values.end(), [](float v) { return std::isfinite(v); }))
                finite = false;
        }
    });
    finite_ = finite;
}

SparseBlock Dropped::block(int64_t row, int64_t j) const {
    const Part& part = parts_[row / kRows];
    return {part.starts.data() + j, blocks_, part.columns.data(), part.values.data()};
}

}  // namespace fastpeft::cpu
