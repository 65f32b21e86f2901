#include "lora_linear.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "cpu/base_product.h"
#include "cpu/kernels.h"
#include "cpu/skinny.h"

namespace fastpeft {
namespace {

using at::Tensor;
using cpu::DType;
using cpu::kLanes;
using cpu::Matrix;
using cpu::RankGroup;
using cpu::Sweep;

DType dtype_of(const Tensor& t) {
    switch (t.scalar_type()) {
        case at::kFloat:
            return DType::f32;
        case at::kBFloat16:
            return DType::bf16;
        case at::kHalf:
            return DType::f16;
        default:
            TORCH_CHECK(false, "expected float32, bfloat16 or float16, got ", t.scalar_type());
    }
}

constexpr int64_t kColumnGrain = 512;  // columns of a gradient a thread should copy, at least

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Row stride of a [ranks, columns] sum: one line more than whole vectors, so that rows do not share a cache set.
int64_t gradient_stride(int64_t columns) { return padded(columns) + kLanes; }

Tensor flat_rows(const Tensor& t) {  // [..., C] as [M, C] with contiguous rows; a copy only where a view cannot be
    const Tensor rows = t.dim() == 2 ? t : t.reshape({-1, t.size(-1)});
    return rows.stride(1) == 1 || rows.size(1) == 1 ? rows : rows.contiguous();
}

Matrix matrix(const Tensor& t) {
    return {t.const_data_ptr(), dtype_of(t), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

Tensor floats(at::IntArrayRef shape) { return at::empty(shape, at::dtype(at::kFloat)); }

int64_t seed_of(const Adapters& adapters, size_t i) {
    return adapters.seed->const_data_ptr<int64_t>()[static_cast<int64_t>(i) * adapters.seed->stride(0)];
}

// Where each adapter's ranks lie: those without a mask side by side in the first group, each other in its own.
class Layout {
  public:
    explicit Layout(const Adapters& adapters) : adapters_(adapters), first_rank(adapters.A.size()) {
        int64_t unmasked = 0;
        for (size_t i = 0; i < adapters.A.size(); ++i)
            if (!adapters.thresholds[i]) {
                first_rank[i] = unmasked;
                unmasked += rank(i);
            }
        if (unmasked) groups.push_back({0, padded(unmasked), 0, 0});
        ranks = padded(unmasked);
        for (size_t i = 0; i < adapters.A.size(); ++i)
            if (adapters.thresholds[i]) {
                first_rank[i] = ranks;
                const auto seed = static_cast<uint64_t>(seed_of(adapters, i));
                groups.push_back({ranks, padded(rank(i)), seed, static_cast<uint32_t>(adapters.thresholds[i])});
                ranks += padded(rank(i));
            }
    }

    int64_t rank(size_t i) const { return adapters_.A[i].size(0); }

    // All adapters as one group: masks are on x and dx alone, not on y and dy.
    RankGroup unmasked() const { return {0, ranks, 0, 0}; }

    // All A (or Bᵀ) one below the other [ranks, columns], zeros in between; a view where there is one adapter.
    Tensor stacked(const std::vector<Tensor>& parts, bool transposed) const {
        if (parts.size() == 1) return transposed ? parts[0].t() : parts[0];
        const int64_t columns = parts[0].size(transposed ? 0 : 1);
        at::ScalarType widest = parts[0].scalar_type();
        for (const Tensor& part : parts) widest = at::promote_types(widest, part.scalar_type());
        Tensor stack = at::zeros({ranks, columns}, at::dtype(widest));
        for (size_t i = 0; i < parts.size(); ++i)
            stack.narrow(0, first_rank[i], rank(i)).copy_(transposed ? parts[i].t() : parts[i]);
        return stack;
    }

    // Between the padded layout q [M, ranks] of the kernels and the dense one u [M, Σ r] of the op; every adapter's
    // columns of q are multiplied with its scaling once u is taken from them.
    Tensor dense_then_scale_(const Tensor& q) const {
        const Tensor u = floats({q.size(0), dense_ranks()});
        float* out = u.mutable_data_ptr<float>();
        each_run(q, [&](float* run, int64_t at, int64_t n, float scaling) {
            std::memcpy(out + at, run, n * sizeof(float));
            for (int64_t r = 0; r < n; ++r) run[r] *= scaling;
        });
        return u;
    }
    void scale_(const Tensor& q) const {
        each_run(q, [](float* run, int64_t, int64_t n, float scaling) {
            for (int64_t r = 0; r < n; ++r) run[r] *= scaling;
        });
    }
    Tensor padded_from(const Tensor& u) const {
        if (dense_ranks() == ranks && first_rank.size() == 1) return u.contiguous();
        const Tensor source = u.contiguous(), q = at::zeros({u.size(0), ranks}, at::dtype(at::kFloat));
        const float* in = source.const_data_ptr<float>();
        each_run(q, [&](float* run, int64_t at, int64_t n, float) { std::memcpy(run, in + at, n * sizeof(float)); });
        return q;
    }

    // Clears the tokens that an adapter does not serve.
    void select_(const Tensor& q) const {
        if (!adapters_.index) return;
        const Tensor index = adapters_.index->reshape({-1, 1});
        for (size_t i = 0; i < first_rank.size(); ++i)
            q.narrow(1, first_rank[i], rank(i)).masked_fill_(index.ne(static_cast<int64_t>(i)), 0);
    }

    // One adapter's gradient from the sums [ranks, columns + …] of a sweep: dA [r, columns], or dB [columns, r] scaled.
    // The threads that summed the columns copy them: their caches hold them.
    Tensor rows_of(const Tensor& sums, size_t i, int64_t columns) const {
        const int64_t n = rank(i), ld = sums.size(1);
        const Tensor grad = floats({n, columns});
        const float* in = sums.const_data_ptr<float>() + first_rank[i] * ld;
        float* out = grad.mutable_data_ptr<float>();
        at::parallel_for(0, columns, kColumnGrain, [&](int64_t begin, int64_t end) {
            for (int64_t r = 0; r < n; ++r)
                std::memcpy(out + r * columns + begin, in + r * ld + begin, (end - begin) * sizeof(float));
        });
        return grad.to(adapters_.A[i].scalar_type());
    }
    Tensor scaled_columns_of(const Tensor& sums, size_t i, int64_t columns) const {
        const int64_t n = rank(i), ld = sums.size(1);
        const Tensor grad = floats({columns, n});
        const float* in = sums.const_data_ptr<float>() + first_rank[i] * ld;
        float* out = grad.mutable_data_ptr<float>();
        const auto scaling = static_cast<float>(adapters_.scaling[i]);
        at::parallel_for(0, columns, kColumnGrain, [&](int64_t begin, int64_t end) {
            for (int64_t c = begin; c < end; ++c)
                for (int64_t r = 0; r < n; ++r) out[c * n + r] = scaling * in[r * ld + c];
        });
        return grad.to(adapters_.B[i].scalar_type());
    }

    std::vector<RankGroup> groups;
    int64_t ranks = 0;

  private:
    int64_t dense_ranks() const {
        int64_t total = 0;
        for (size_t i = 0; i < first_rank.size(); ++i) total += rank(i);
        return total;
    }

    // Calls f(an adapter's columns in a row of q, where they lie in the dense layout, how many, its scaling).
    template <typename F>
    void each_run(const Tensor& q, F f) const {
        constexpr int64_t kGrainElements = 1 << 14;
        const int64_t total = dense_ranks();
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

    const Adapters& adapters_;
    std::vector<int64_t> first_rank;
};

Tensor panel(const cpu::Kernels& kernels, const Tensor& s, bool pairs) {
    const int64_t elements = cpu::panel_elements(s.size(0), s.size(1));
    Tensor packed = at::empty({elements}, at::dtype(pairs ? at::kBFloat16 : at::kFloat));
    // One stride must be 1: the packing loads sixteen neighbours at a time.
    const Tensor rows = s.stride(0) == 1 || s.stride(1) == 1 ? s : s.contiguous();
    cpu::pack(kernels, matrix(rows), pairs, packed.mutable_data_ptr());
    return packed;
}

Sweep sweep_over(const Tensor& wide, const Layout& layout) {
    return {.dtype = dtype_of(wide),
            .rows = wide.size(0),
            .columns = wide.size(1),
            .ranks = layout.ranks,
            .groups = layout.groups};
}

// y = x W (added onto y where `add`), W [K, N]
void vendor_product(Tensor y, const Tensor& x, const Tensor& weight, bool add) {
    if (add)
        y.addmm_(x, weight);
    else
        at::mm_out(y, x, weight);
}

// The same in float32, stripe by stripe of W.
void vendor_product_float32(const Tensor& y, const Tensor& x, const Tensor& weight) {
    constexpr int64_t kColumns = 256;
    const Tensor wide = x.to(at::kFloat);
    for (int64_t n = 0; n < y.size(1); n += kColumns) {
        const int64_t columns = std::min(kColumns, y.size(1) - n);
        y.narrow(1, n, columns).copy_(at::mm(wide, weight.narrow(1, n, columns).to(at::kFloat)));
    }
}

// y = x W + the output of the sweep, W [K, N]; what else the sweep does is done too.
void base_and_low_rank(const cpu::Kernels& kernels, Sweep& sweep, const Tensor& y, const Tensor& x,
                       const Tensor& weight, Plan plan) {
    sweep.output = y.mutable_data_ptr();
    sweep.ld_output = y.stride(0);
    if (plan == Plan::one_accumulator) {
        TORCH_CHECK(
            cpu::has_base_product(kernels) && y.scalar_type() == at::kBFloat16 && x.size(1) % 2 == 0,
            "Plan.one_accumulator needs has_base_product(), bfloat16 and an even number of contracted elements");
        const Tensor rows = x.stride(0) >= x.size(1) ? x : x.contiguous();
        const int64_t ld = rows.size(0) > 1 ? rows.stride(0) : rows.size(1);
        cpu::base_product(kernels, sweep, rows.const_data_ptr(), ld, matrix(weight));
        sweep.output = nullptr;
        if (sweep.product || sweep.gradient) cpu::run(kernels, sweep);
        return;
    }
    sweep.add = plan != Plan::vendor_last;
    if (plan == Plan::vendor_first) vendor_product(y, x, weight, false);
    if (plan == Plan::vendor_float32) vendor_product_float32(y, x, weight);
    cpu::run(kernels, sweep);
    if (plan == Plan::vendor_last) vendor_product(y, x, weight, true);
}

// A few tokens: u and y as dot products with the rows of A and of W, every row read once.
void few_tokens_product(const Tensor& x, const Tensor& weight, const Tensor& bias, const Adapters& adapters,
                        const Tensor& u, const Tensor& y) {
    const cpu::Kernels& kernels = cpu::kernels();
    const int64_t tokens = x.size(0), columns = x.size(1);
    const bool fits = x.scalar_type() == at::kFloat && columns == padded(columns);
    Tensor wide = fits ? x : Tensor();  // x in float32, zero-padded
    const auto widened = [&]() -> const Tensor& {
        if (!wide.defined()) {
            wide = at::zeros({tokens, padded(columns)}, at::dtype(at::kFloat));
            wide.narrow(1, 0, columns).copy_(x);
        }
        return wide;
    };
    const auto dot = [&](const Tensor& input, const Tensor& w, const Tensor& q, const Tensor& b, const Tensor& out) {
        constexpr int64_t kGrainElements = 1 << 15;  // of w a thread should have, at least
        at::parallel_for(0, w.size(0), std::max<int64_t>(1, kGrainElements / columns), [&](int64_t begin, int64_t end) {
            kernels.dot(input.const_data_ptr(), input.stride(0), tokens, matrix(w),
                        q.defined() ? q.const_data_ptr<float>() : nullptr, q.defined() ? matrix(b) : Matrix{},
                        q.defined() && bias.defined() ? bias.const_data_ptr<float>() : nullptr, out.mutable_data_ptr(),
                        dtype_of(out), out.stride(0), begin, end);
        });
    };
    const auto pairs = [&](const Tensor& w) {
        return kernels.pairs(dtype_of(w)) && w.scalar_type() == x.scalar_type();
    };
    const Tensor q = at::empty_like(u);
    int64_t offset = 0;
    for (size_t i = 0; i < adapters.A.size(); ++i) {
        const Tensor& A = adapters.A[i];
        const int64_t rank = A.size(0);
        Tensor input = pairs(A) ? x : widened();
        if (adapters.thresholds[i]) {
            const Tensor dropped =
                dropout_keep(seed_of(adapters, i), tokens, columns, adapters.thresholds[i]).logical_not_();
            input = input.clone();
            input.narrow(1, 0, columns).masked_fill_(dropped, 0);
        }
        const Tensor part = adapters.A.size() == 1 ? u : u.narrow(1, offset, rank);
        dot(input, A, {}, {}, part);
        if (adapters.index) part.masked_fill_(adapters.index->reshape({-1, 1}).ne(static_cast<int64_t>(i)), 0);
        const float scaling = static_cast<float>(adapters.scaling[i]);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t r = offset; r < offset + rank; ++r)
                q.mutable_data_ptr<float>()[t * u.size(1) + r] = scaling * u.const_data_ptr<float>()[t * u.size(1) + r];
        offset += rank;
    }
    dot(pairs(weight) ? x : widened(), weight, q, adapters.B.size() == 1 ? adapters.B[0] : at::cat(adapters.B, 1), y);
}

}  // namespace

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                       const Adapters& adapters, Plan plan) {
    const Tensor x2 = flat_rows(x);
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = weight.size(0);
    const Tensor y = at::empty(shape, x.options());
    const Tensor y2 = y.dim() == 2 ? y : y.view({-1, weight.size(0)});
    const Tensor bias32 = bias ? bias->to(at::kFloat).contiguous() : Tensor();

    if (plan == Plan::dots) {
        int64_t ranks = 0;
        for (const Tensor& A : adapters.A) ranks += A.size(0);
        const Tensor u = floats({x2.size(0), ranks});
        few_tokens_product(x2, weight, bias32, adapters, u, y2);
        return {y, u};
    }

    const cpu::Kernels& kernels = cpu::kernels();
    const bool pairs = kernels.pairs(dtype_of(x));
    const Layout layout(adapters);
    const Tensor q = floats({x2.size(0), layout.ranks});

    Sweep down = sweep_over(x2, layout);
    const Tensor panel_A = panel(kernels, layout.stacked(adapters.A, false).t(), pairs);
    down.input = x2.const_data_ptr();
    down.ld_input = x2.stride(0);
    down.panel_in = panel_A.const_data_ptr();
    down.product = q.mutable_data_ptr<float>();
    cpu::run(kernels, down);
    layout.select_(q);
    Tensor u = layout.dense_then_scale_(q);

    Sweep up = sweep_over(y2, layout);
    const Tensor panel_B = panel(kernels, layout.stacked(adapters.B, true), pairs);
    up.groups = {layout.unmasked()};
    up.q = q.const_data_ptr<float>();
    up.panel_out = panel_B.const_data_ptr();
    up.bias = bias ? bias32.const_data_ptr<float>() : nullptr;
    base_and_low_rank(kernels, up, y2, x2, weight.t(), plan);
    return {y, u};
}

std::vector<Tensor> lora_linear_backward(const Tensor& dy, const std::optional<Tensor>& x, const Tensor& weight,
                                         const Adapters& adapters, const std::optional<Tensor>& u,
                                         const std::vector<bool>& needs, Plan plan) {
    const size_t count = adapters.A.size();
    const auto any = [&](size_t begin, size_t end) {
        return std::any_of(needs.begin() + begin, needs.begin() + end, [](bool need) { return need; });
    };
    const bool need_x = needs[0], need_A = any(3, 3 + count), need_B = any(3 + count, 3 + 2 * count);
    const cpu::Kernels& kernels = cpu::kernels();
    const Layout layout(adapters);
    const Tensor dy2 = flat_rows(dy);
    const Tensor x2 = x ? flat_rows(*x) : Tensor();
    const bool pairs = kernels.pairs(dtype_of(dy));
    const int64_t M = dy2.size(0), N = weight.size(0), K = weight.size(1);

    Tensor v, dA, dB, dx;
    if (need_x || need_A || need_B) {  // dy is read once for v and dB
        Sweep sweep = sweep_over(dy2, layout);
        sweep.groups = {layout.unmasked()};
        sweep.input = dy2.const_data_ptr();
        sweep.ld_input = dy2.stride(0);
        Tensor panel_B, q;
        if (need_x || need_A) {
            v = floats({M, layout.ranks});
            panel_B = panel(kernels, layout.stacked(adapters.B, true).t(), pairs);
            sweep.panel_in = panel_B.const_data_ptr();
            sweep.product = v.mutable_data_ptr<float>();
        }
        if (need_B) {
            q = layout.padded_from(*u);
            dB = floats({layout.ranks, gradient_stride(N)});
            sweep.q = q.const_data_ptr<float>();
            sweep.gradient = dB.mutable_data_ptr<float>();
            sweep.ld_gradient = dB.size(1);
        }
        cpu::run(kernels, sweep);
    }
    if (v.defined()) {
        layout.scale_(v);
        layout.select_(v);
    }
    if (need_x || need_A) {  // x is read once for dA; the low-rank part of dx is written in the same sweep
        std::vector<int64_t> shape(dy.sizes().begin(), dy.sizes().end());
        shape.back() = K;
        if (need_x) dx = at::empty(shape, dy.options());
        const Tensor dx2 = need_x ? dx.view({-1, K}) : x2;
        Sweep sweep = sweep_over(dx2, layout);
        sweep.q = v.const_data_ptr<float>();
        Tensor panel_A;
        if (need_A) {
            dA = floats({layout.ranks, gradient_stride(K)});
            sweep.input = x2.const_data_ptr();
            sweep.ld_input = x2.stride(0);
            sweep.gradient = dA.mutable_data_ptr<float>();
            sweep.ld_gradient = dA.size(1);
        }
        if (need_x) {
            panel_A = panel(kernels, layout.stacked(adapters.A, false), pairs);
            sweep.panel_out = panel_A.const_data_ptr();
            base_and_low_rank(kernels, sweep, dx2, dy2, weight, plan);
        } else {
            cpu::run(kernels, sweep);
        }
    }

    std::vector<Tensor> grads;
    if (need_x) grads.push_back(dx);
    if (needs[1]) grads.push_back(at::mm(dy2.t(), x2).to(weight.scalar_type()));
    if (needs[2]) grads.push_back(dy2.sum(at::IntArrayRef{0}, false, at::kFloat).to(dy.scalar_type()));
    for (size_t i = 0; i < count; ++i)
        if (needs[3 + i]) grads.push_back(layout.rows_of(dA, i, K));
    for (size_t i = 0; i < count; ++i)
        if (needs[3 + count + i]) grads.push_back(layout.scaled_columns_of(dB, i, N));
    return grads;
}

Tensor dropout_keep(int64_t seed, int64_t rows, int64_t columns, int64_t threshold) {
    const cpu::Kernels& kernels = cpu::kernels();
    Tensor mask = at::empty({rows, columns}, at::dtype(at::kBool));
    bool* out = mask.mutable_data_ptr<bool>();
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t c = 0; c < columns; c += cpu::kColumns) {
            uint64_t words[cpu::kKeepWords];
            const int64_t n = std::min(cpu::kColumns, columns - c);
            kernels.keep(static_cast<uint64_t>(seed), static_cast<uint32_t>(threshold), m, c, 1, n, words);
            for (int64_t i = 0; i < n; ++i) out[m * columns + c + i] = words[i / 64] >> (i % 64) & 1;
        }
    return mask;
}

}  // namespace fastpeft
