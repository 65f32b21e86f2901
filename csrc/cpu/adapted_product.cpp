#include "adapted_product.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <deque>

#include "../tensors.h"

namespace fastpeft::cpu {

using at::Tensor;

namespace {

// All products in the same float32 sums as the low-rank part, rounded once.
void in_one_accumulator(const Kernels& kernels, Sweep& sweep, const Tensor& y, const std::vector<Factors>& products,
                        bool transposed, const Apart& apart) {
    const bool pairs = std::all_of(products.begin(), products.end(), [&](const Factors& product) {
        return multiplies_pairs(kernels, sweep.dtype, product.x[0].size(1));
    });
    std::deque<FourBit> packed;
    std::vector<Tensor> kept;  // what the terms point to
    std::vector<Term> terms;
    for (const auto& [x, weight] : products) {
        Term& term = terms.emplace_back();
        term.s.transposed = transposed;
        if (weight.four_bit()) {
            term.s.packed = &packed.emplace_back(four_bit(weight));
            term.s.s = {nullptr, sweep.dtype, x[0].size(1), y.size(1), 0, 0};
        } else {
            const Tensor dense = transposed ? weight.data.t() : weight.data;
            kept.push_back(dense.stride(0) == 1 || dense.stride(1) == 1 ? dense : dense.contiguous());
            term.s.s = matrix(kept.back());
        }
        for (const Tensor& part : x) {
            kept.push_back(operand_rows(part, pairs));
            term.x.push_back(operand_of(kept.back()));
        }
    }
    base_products(kernels, {{sweep, terms}}, pairs, apart);
    sweep.output = nullptr;
    if (sweep.product || sweep.gradient) run(kernels, sweep);
}

// y (+)= x W; W [K, N]
void vendor_product(const Tensor& y, const Tensor& x, const Tensor& weight, bool add) {
    Tensor out = y;
    if (add)
        out.addmm_(x, weight);
    else
        at::mm_out(out, x, weight);
}

}  // namespace

Sweep sweep_over(const Tensor& wide, const Layout& layout) {
    return {.dtype = dtype_of(wide),
            .rows = wide.size(0),
            .columns = wide.size(1),
            .ranks = layout.ranks,
            .groups = layout.groups};
}

Tensor operand_rows(const Tensor& x, bool pairs) {
    const Tensor wide = pairs ? x : x.to(at::kFloat);
    return wide.stride(0) >= wide.size(1) && (!pairs || reaches_rows(wide.stride(0))) ? wide : wide.contiguous();
}

Operand operand_of(const Tensor& rows, int64_t first) {
    const int64_t ld = rows.size(0) > 1 ? rows.stride(0) : rows.size(1);
    return {static_cast<const char*>(rows.const_data_ptr()) + first * ld * rows.element_size(), ld};
}

void adapted_product(const Kernels& kernels, Sweep& sweep, const Tensor& y, const std::vector<Factors>& products,
                     bool transposed, Plan plan, const Apart& apart) {
    sweep.output = y.mutable_data_ptr();
    sweep.ld_output = y.stride(0);
    if (products[0].weight.absent()) {
        run(kernels, sweep);
        return;
    }
    if (plan == Plan::one_accumulator) {
        in_one_accumulator(kernels, sweep, y, products, transposed, apart);
        return;
    }
    const bool scales = std::any_of(sweep.groups.begin(), sweep.groups.end(), [](const auto& g) { return g.scale; });
    TORCH_CHECK(plan != Plan::low_rank_first || !scales, "Plan.low_rank_first cannot scale the base product: DoRA");
    std::vector<Tensor> seconds;
    sweep.add = plan != Plan::low_rank_first;
    if (!sweep.add) run(kernels, sweep);
    for (const auto& [x, weight] : products) {
        TORCH_CHECK(!weight.four_bit(), "a 4-bit weight has no product of the vendor's: Plan.one_accumulator");
        const Tensor dense = transposed ? weight.data.t() : weight.data;
        for (size_t i = 1; i < x.size(); ++i) {
            seconds.push_back(at::empty({y.size(0), y.size(1)}, y.options()));
            vendor_product(seconds.back(), x[i], dense, false);
            sweep.seconds.push_back(seconds.back().const_data_ptr());
        }
        vendor_product(y, x[0], dense, !sweep.add || &weight != &products[0].weight);
    }
    if (sweep.add) run(kernels, sweep);
}

}  // namespace fastpeft::cpu
