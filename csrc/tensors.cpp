#include "tensors.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>
#include <cmath>

namespace fastpeft {

using at::Tensor;

DType dtype_of(at::ScalarType dtype) {
    switch (dtype) {
        case at::kFloat:
            return DType::f32;
        case at::kBFloat16:
            return DType::bf16;
        case at::kHalf:
            return DType::f16;
        default:
            TORCH_CHECK(false, "expected float32, bfloat16 or float16, got ", dtype);
    }
}

DType dtype_of(const Tensor& t) { return dtype_of(t.scalar_type()); }

Matrix matrix(const Tensor& t) {
    return {t.const_data_ptr(), dtype_of(t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

Matrix matrix(const Tensor& stack, int64_t i) {
    const auto* data = static_cast<const char*>(stack.const_data_ptr()) + i * stack.stride(0) * stack.element_size();
    return {data, dtype_of(stack), stack.size(1), stack.size(2), stack.stride(1), stack.stride(2)};
}

FourBit four_bit(const Weight& weight) {
    const auto floats = [&](size_t i) { return weight.quant[i].const_data_ptr<float>(); };
    FourBit view{.packed = weight.data.const_data_ptr<uint8_t>(),
                 .code = floats(0),
                 .block_bits = std::countr_zero(static_cast<uint64_t>(weight.blocksize))};
    if (weight.quant.size() == 2) {
        view.absmax = floats(1);
        return view;
    }
    view.q = weight.quant[1].const_data_ptr<uint8_t>();
    view.code2 = floats(2);
    view.absmax2 = floats(3);
    view.offset = floats(4);
    return view;
}

Tensor flat_rows(const Tensor& t) {
    const Tensor rows = t.dim() == 2 ? t : t.reshape({-1, t.size(-1)});
    return rows.stride(1) == 1 && (rows.size(1) != 1 || rows.stride(0) == 1) ? rows : rows.contiguous();
}

Tensor with_leading_shape_of(const Tensor& like, const Tensor& rows) {
    if (like.dim() == 2) return rows;
    std::vector<int64_t> shape(like.sizes().begin(), like.sizes().end());
    shape.back() = rows.size(1);
    return rows.view(shape);
}

int64_t dropout_threshold(double p) {
    return std::clamp<int64_t>(static_cast<int64_t>(std::nearbyint(p * 65536)), p > 0, 65535);
}

double dropout_scale(int64_t threshold) { return 65536.0 / static_cast<double>(65536 - threshold); }

}  // namespace fastpeft
