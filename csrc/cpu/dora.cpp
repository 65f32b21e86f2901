#include "dora.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "../tensors.h"
#include "kernels/kernels.h"

namespace fastpeft::cpu {

using at::Tensor;

Tensor scaled(const Tensor& in, const Bounds& bounds, const Tensor& scale, double factor, uint64_t seed,
              int64_t threshold) {
    struct Rows {
        int64_t begin, end, expert;
    };
    const Kernels& kernels = cpu::kernels();
    const int64_t columns = in.size(1), size = in.element_size();
    const Tensor out = at::empty({in.size(0), columns}, in.options());
    const char* from = static_cast<const char*>(in.const_data_ptr());
    char* to = static_cast<char*>(out.mutable_data_ptr());
    std::vector<Rows> tiles;
    for (size_t e = 0; e + 1 < bounds.size(); ++e)
        for (int64_t m = bounds[e]; m < bounds[e + 1]; m += kRows)
            tiles.push_back({m, std::min(m + kRows, bounds[e + 1]), static_cast<int64_t>(e)});
    at::parallel_for(0, static_cast<int64_t>(tiles.size()), 1, [&](int64_t begin, int64_t end) {
        uint64_t words[kRows * kKeepWords];
        for (int64_t i = begin; i < end; ++i) {
            const auto [m, m_end, e] = tiles[i];
            for (int64_t c = 0; c < columns; c += kColumns) {
                const int64_t count = std::min(kColumns, columns - c);
                if (threshold) kernels.keep(seed, static_cast<uint32_t>(threshold), m, c, m_end - m, count, words);
                kernels.scale({from + (m * in.stride(0) + c) * size, dtype_of(in), in.stride(0)}, m_end - m, count,
                              threshold ? words : nullptr,
                              scale.defined() ? scale.const_data_ptr<float>() + e * columns + c : nullptr,
                              static_cast<float>(factor), to + (m * columns + c) * size, columns);
            }
        }
    });
    return out;
}

Tensor column_dots(const Tensor& a, const Tensor& b, const Bounds& bounds) {
    constexpr int64_t kGrainColumns = 64;
    const Kernels& kernels = cpu::kernels();
    const int64_t columns = a.size(1);
    const auto experts = static_cast<int64_t>(bounds.size()) - 1;
    const Tensor sums = at::zeros({experts, columns}, at::dtype(at::kFloat));
    at::parallel_for(0, columns, kGrainColumns, [&](int64_t begin, int64_t end) {
        const auto tile = [&](const Tensor& t, int64_t m) {
            const char* data =
                static_cast<const char*>(t.const_data_ptr()) + (m * t.stride(0) + begin) * t.element_size();
            return Tile{data, dtype_of(t), t.stride(0)};
        };
        for (int64_t e = 0; e < experts; ++e)
            for (int64_t m = bounds[e]; m < bounds[e + 1]; m += kRows)
                kernels.column_dots(tile(a, m), tile(b, m), std::min(kRows, bounds[e + 1] - m), end - begin,
                                    sums.mutable_data_ptr<float>() + e * columns + begin);
    });
    return sums;
}

Chain::Chain(const Adapters& adapters) : later(adapters.A.size()), own(adapters.A.size()) {
    for (size_t i = adapters.c.size(); i-- > 0;) {
        later[i] = base;
        own[i] = base.defined() ? base * adapters.c[i] : adapters.c[i];
        if (!adapters.thresholds[i]) base = own[i];
    }
}

std::vector<Tensor> Chain::inputs(const Tensor& dy, const Bounds& bounds, const Adapters& adapters,
                                  std::vector<RankGroup>& groups) const {
    std::vector<Tensor> all{base.defined() ? scaled(dy, bounds, base, 1.0) : dy};
    for (size_t i = 0; i < adapters.c.size(); ++i)
        if (adapters.thresholds[i]) {
            groups[i].operand = all.size();
            all.push_back(scaled(dy, bounds, later[i].defined() ? own[i] - later[i] : own[i] - 1,
                                 dropout_scale(adapters.thresholds[i])));
        }
    return all;
}

std::vector<Tensor> scale_groups(std::vector<RankGroup>& groups, const Adapters& adapters, const Tensor& y,
                                 bool keep_z) {
    std::vector<Tensor> z;
    for (size_t i = 0; i < adapters.c.size(); ++i) {
        groups[i].scale = adapters.c[i].const_data_ptr<float>();
        if (!keep_z) continue;
        z.push_back(at::empty(y.sizes(), y.options().dtype(z_dtype(y.size(0), y.scalar_type()))));
        groups[i].z = z.back().mutable_data_ptr();
        groups[i].z_dtype = dtype_of(z.back());
    }
    return z;
}

}  // namespace fastpeft::cpu
