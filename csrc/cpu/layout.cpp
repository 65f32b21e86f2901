#include "layout.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

namespace fastpeft::cpu {

using at::Tensor;

namespace {
constexpr int64_t kPackGrain = 16;     // blocks of a panel's rows a thread should pack, at least
constexpr int64_t kColumnGrain = 512;  // columns of a gradient a thread should copy, at least
}  // namespace

Tensor floats(at::IntArrayRef shape) { return at::empty(shape, at::dtype(at::kFloat)); }

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// One line more than whole vectors, so that rows do not share a cache set, unless each line is written once anyway.
int64_t gradient_stride(int64_t tokens, int64_t columns) { return padded(columns) + (tokens > kRows ? kLanes : 0); }

uint64_t seed_of(const Adapters& adapters, size_t i) {
    const Tensor& seed = *adapters.seed;
    return static_cast<uint64_t>(seed.const_data_ptr<int64_t>()[static_cast<int64_t>(i) * seed.stride(0)]);
}

Tensor panel(const Kernels& kernels, const Tensor& s, bool pairs) {
    const int64_t elements = panel_elements(s.size(0), s.size(1));
    if (!pairs && s.scalar_type() == at::kFloat && s.numel() == elements && s.size(1) == kLanes && s.is_contiguous())
        return s;  // it is one already: sixteen columns wide, whole blocks long
    Tensor packed = at::empty({elements}, at::dtype(pairs ? at::kBFloat16 : at::kFloat));
    // One stride must be 1: the packing loads sixteen neighbours at a time.
    const Tensor rows = s.stride(0) == 1 || s.stride(1) == 1 ? s : s.contiguous();
    pack(kernels, matrix(rows), pairs, packed.mutable_data_ptr());
    return packed;
}

Tensor panels(const Kernels& kernels, const Tensor& stack, bool pairs, const std::vector<bool>& wanted) {
    const Tensor rows = stack.stride(1) == 1 || stack.stride(2) == 1 ? stack : stack.contiguous();
    const int64_t elements = panel_elements(rows.size(1), rows.size(2)), blocks = elements / (kLanes * kLanes);
    const Tensor packed = at::empty({rows.size(0), elements}, at::dtype(pairs ? at::kBFloat16 : at::kFloat));
    char* data = static_cast<char*>(packed.mutable_data_ptr());
    at::parallel_for(0, rows.size(0), 1, [&](int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e)
            if (wanted[e]) kernels.pack(matrix(rows, e), pairs, data + e * elements * packed.element_size(), 0, blocks);
    });
    return packed;
}

Layout::Layout(const Adapters& adapters, bool apart) : adapters_(adapters), first_rank(adapters.A.size()) {
    const auto own_group = [&](size_t i) { return adapters.dora() || adapters.thresholds[i]; };
    int64_t shared = 0;
    for (size_t i = 0; i < adapters.A.size(); ++i)
        if (!own_group(i)) {
            first_rank[i] = shared;
            shared += apart ? padded(rank(i)) : rank(i);
        }
    ranks = padded(shared);
    if (shared) groups.push_back({.first_rank = 0, .ranks = ranks});
    for (size_t i = 0; i < adapters.A.size(); ++i)
        if (own_group(i)) {
            first_rank[i] = ranks;
            groups.push_back({.first_rank = ranks, .ranks = padded(rank(i))});
            if (adapters.thresholds[i]) {
                groups.back().seed = seed_of(adapters, i);
                groups.back().threshold = static_cast<uint32_t>(adapters.thresholds[i]);
            }
            ranks += padded(rank(i));
        }
}

// Calls f(an adapter's columns in a row of q, where they lie in the dense layout, how many, its scaling).
template <typename F>
void Layout::each_run(const Tensor& q, F f) const {
    constexpr int64_t kGrainElements = 1 << 14;
    const int64_t total = adapters_.ranks();
    float* data = q.mutable_data_ptr<float>();
    at::parallel_for(0, q.size(0), std::max<int64_t>(1, kGrainElements / ranks), [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m) {
            int64_t offset = 0;
            for (size_t i = 0; i < first_rank.size(); offset += rank(i), ++i)
                f(data + m * ranks + first_rank[i], m * total + offset, rank(i),
                  static_cast<float>(adapters_.scaling[i]));
        }
    });
}

Tensor Layout::stacked(const std::vector<Tensor>& parts, bool transposed) const {
    const auto turned = [&](const Tensor& part) { return transposed ? part.transpose(-2, -1) : part; };
    if (parts.size() == 1) return turned(parts[0]);
    std::vector<int64_t> shape = turned(parts[0]).sizes().vec();
    shape.end()[-2] = ranks;
    at::ScalarType widest = parts[0].scalar_type();
    for (const Tensor& part : parts) widest = at::promote_types(widest, part.scalar_type());
    Tensor stack = at::zeros(shape, at::dtype(widest));
    for (size_t i = 0; i < parts.size(); ++i) stack.narrow(-2, first_rank[i], rank(i)).copy_(turned(parts[i]));
    return stack;
}

Tensor Layout::panel_of(const Kernels& kernels, const std::vector<Tensor>& parts, bool pairs, bool turned) const {
    constexpr int64_t kBlock = kLanes * kLanes;
    const int64_t columns = padded(parts[0].size(1)) / kLanes, rows = ranks / kLanes;  // in blocks
    const Tensor panel = at::empty({rows * columns * kBlock}, at::dtype(pairs ? at::kBFloat16 : at::kFloat));
    char* data = static_cast<char*>(panel.mutable_data_ptr());
    std::vector<Tensor> kept;
    for (const Tensor& part : parts)
        kept.push_back(part.stride(0) == 1 || part.stride(1) == 1 ? part : part.contiguous());
    at::parallel_for(0, columns, kPackGrain, [&](int64_t begin, int64_t end) {
        for (size_t i = 0; i < kept.size(); ++i) {
            const Matrix s = matrix(turned ? kept[i].t() : kept[i]);
            const int64_t first = first_rank[i] / kLanes, own = padded(rank(i)) / kLanes;
            const auto pack = [&](int64_t block, int64_t count, int64_t at) {
                kernels.pack(s, pairs, data + (at - block) * kBlock * panel.element_size(), block, block + count);
            };
            if (turned)
                for (int64_t r = 0; r < own; ++r) pack(r * columns + begin, end - begin, (first + r) * columns + begin);
            else
                for (int64_t c = begin; c < end; ++c) pack(c * own, own, c * rows + first);
        }
    });
    return panel;
}

Tensor Layout::dense_then_scale_(const Tensor& q) const {
    const Tensor u = floats({q.size(0), adapters_.ranks()});
    float* out = u.mutable_data_ptr<float>();
    each_run(q, [&](float* run, int64_t at, int64_t n, float scaling) {
        std::memcpy(out + at, run, n * sizeof(float));
        for (int64_t r = 0; r < n; ++r) run[r] *= scaling;
    });
    return u;
}

void Layout::scale_(const Tensor& q) const {
    each_run(q, [](float* run, int64_t, int64_t n, float scaling) {
        for (int64_t r = 0; r < n; ++r) run[r] *= scaling;
    });
}

Tensor Layout::padded_from(const Tensor& u) const {
    if (adapters_.ranks() == ranks && first_rank.size() == 1) return u.contiguous();
    const Tensor source = u.contiguous(), q = at::zeros({u.size(0), ranks}, at::dtype(at::kFloat));
    const float* in = source.const_data_ptr<float>();
    each_run(q, [&](float* run, int64_t at, int64_t n, float) { std::memcpy(run, in + at, n * sizeof(float)); });
    return q;
}

void Layout::select_(const Tensor& q) const {
    if (!adapters_.index) return;
    const Tensor index = adapters_.index->reshape({-1, 1});
    for (size_t i = 0; i < first_rank.size(); ++i)
        q.narrow(1, first_rank[i], rank(i)).masked_fill_(index.ne(static_cast<int64_t>(i)), 0);
}

Tensor Layout::columns_of(const Tensor& q, size_t i) const {
    return q.narrow(1, first_rank[i], padded(rank(i))).contiguous();
}

void Layout::put_columns(const Tensor& q, size_t i, const Tensor& columns) const {
    q.narrow(1, first_rank[i], padded(rank(i))).copy_(columns);
}

Tensor Layout::part_of(const Tensor& sums, size_t i, int64_t columns) const {
    return sums.narrow(-2, first_rank[i], rank(i)).narrow(-1, 0, columns);
}

Tensor Layout::rows_of(const Tensor& sums, size_t i, int64_t columns) const {
    const int64_t n = rank(i), ld = sums.size(1);
    if (sums.size(0) == n && ld == columns) return sums.to(adapters_.A[i].scalar_type());
    const Tensor grad = floats({n, columns});
    const float* in = sums.const_data_ptr<float>() + first_rank[i] * ld;
    float* out = grad.mutable_data_ptr<float>();
    at::parallel_for(0, columns, kColumnGrain, [&](int64_t begin, int64_t end) {
        for (int64_t r = 0; r < n; ++r)
            std::memcpy(out + r * columns + begin, in + r * ld + begin, (end - begin) * sizeof(float));
    });
    return grad.to(adapters_.A[i].scalar_type());
}

Tensor Layout::scaled_columns_of(const Tensor& sums, size_t i, int64_t columns, const Tensor& factor) const {
    const int64_t n = rank(i), ld = sums.size(1);
    const Tensor grad = floats({columns, n});
    const float* in = sums.const_data_ptr<float>() + first_rank[i] * ld;
    float* out = grad.mutable_data_ptr<float>();
    const auto scaling = static_cast<float>(adapters_.scaling[i]);
    const float* by_column = factor.defined() ? factor.const_data_ptr<float>() : nullptr;
    at::parallel_for(0, columns, kColumnGrain, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
            const float s = by_column ? scaling * by_column[c] : scaling;
            for (int64_t r = 0; r < n; ++r) out[c * n + r] = s * in[r * ld + c];
        }
    });
    return grad.to(adapters_.B[i].scalar_type());
}

}  // namespace fastpeft::cpu
