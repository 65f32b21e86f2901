// W [N, K] of a call: a dense tensor, or 4 bits an element that are decoded tile by tile.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "cpu/kernels.h"

namespace fastpeft {

struct Weight {
    at::Tensor data;                // [N, K], any strides; or uint8, flat
    std::vector<at::Tensor> quant;  // empty; or code [16], absmax; or code, absmax in uint8, code2, absmax2, offset
    int64_t blocksize;
    int64_t N, K;

    bool four_bit() const { return !quant.empty(); }
    cpu::FourBit packed() const;

    // Columns [first, first + count) of W, or of Wᵀ, in float32: [N, count] or [K, count]. 4-bit elements are rounded
    // to `dtype` before, as dequantizing to it would.
    at::Tensor columns(bool transposed, int64_t first, int64_t count, at::ScalarType dtype) const;
};

}  // namespace fastpeft
