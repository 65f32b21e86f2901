// The elements of a matrix that dropout drops, listed: where they are few, products with them alone take less time than
// one with the whole matrix.
#pragma once
#include <cstddef>
#include <vector>

#include "kernels/kernels.h"

namespace fastpeft::cpu {

class Dropped {
  public:
    // Of a [rows, columns] matrix under the mask of (seed, threshold), in blocks of so many columns, at most 256; with
    // the values of x where that is not null, its rows ld_x elements apart.
    Dropped(const Kernels& kernels, uint64_t seed, uint32_t threshold, int64_t rows, int64_t columns, int64_t block,
            const float* x, int64_t ld_x);

    // Those of the rows from `row`, a multiple of kRows, in block `j`: for kRows rows at most.
    SparseBlock block(int64_t row, int64_t j) const;

    bool finite() const { return finite_; }  // whether all values are

  private:
    struct Part {  // of kRows rows
        std::vector<int32_t> starts;
        std::vector<uint8_t> columns;
        std::vector<float> values;
    };

    int64_t blocks_;
    std::vector<Part> parts_;
    bool finite_ = true;
};

}  // namespace fastpeft::cpu
