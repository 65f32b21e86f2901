#include "weight.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <bit>

#include "layout.h"

namespace fastpeft {

using at::Tensor;

cpu::FourBit Weight::packed() const {
    const auto floats = [&](size_t i) { return quant[i].const_data_ptr<float>(); };
    cpu::FourBit view{.bytes = data.const_data_ptr<uint8_t>(),
                      .block_bits = std::countr_zero(static_cast<uint64_t>(blocksize)),
                      .table = floats(0)};
    if (quant.size() == 2) {
        view.absmax = floats(1);
        return view;
    }
    view.q = quant[1].const_data_ptr<uint8_t>();
    view.code2 = floats(2);
    view.absmax2 = floats(3);
    view.offset = *floats(4);
    return view;
}

Tensor Weight::columns(bool transposed, int64_t first, int64_t count, at::ScalarType dtype) const {
    if (!four_bit()) return (transposed ? data.t() : data).narrow(1, first, count).to(at::kFloat);
    const cpu::FourBit w = packed();
    const cpu::Kernels& kernels = cpu::kernels();
    // Transposed, the columns are whole rows of W.
    const int64_t rows = transposed ? count : N, length = transposed ? K : count;
    const Tensor out = at::empty({rows, length}, at::dtype(dtype));
    char* begin_of_out = static_cast<char*>(out.mutable_data_ptr());
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            kernels.decode(w, transposed ? (first + i) * K : i * K + first, length,
                           begin_of_out + i * length * out.element_size(), dtype_of(out));
    });
    const Tensor wide = out.to(at::kFloat);
    return transposed ? wide.t() : wide;
}

}  // namespace fastpeft
