// Columns of W in float32, also of a 4-bit W: for products by stripes of W.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "layout.h"

namespace fastpeft::cpu {

using at::Tensor;

Tensor columns_of(const Weight& weight, bool transposed, int64_t first, int64_t count, at::ScalarType dtype) {
    if (!weight.four_bit()) {
        const Tensor& data = weight.data;
        return (transposed ? data.t() : data).narrow(1, first, count).to(at::kFloat);
    }
    const FourBit w = four_bit(weight);
    const Kernels& kernels = cpu::kernels();
    // Transposed, the columns are whole rows of W.
    const int64_t rows = transposed ? count : weight.N, length = transposed ? weight.K : count;
    const Tensor out = at::empty({rows, length}, at::dtype(dtype));
    char* begin_of_out = static_cast<char*>(out.mutable_data_ptr());
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            kernels.decode(w, transposed ? (first + i) * weight.K : i * weight.K + first, length,
                           begin_of_out + i * length * out.element_size(), dtype_of(out));
    });
    const Tensor wide = out.to(at::kFloat);
    return transposed ? wide.t() : wide;
}

}  // namespace fastpeft::cpu
