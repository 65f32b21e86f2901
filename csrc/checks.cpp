#include "checks.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>

#include <algorithm>

namespace fastpeft {

using at::Tensor;
using Tensors = std::vector<Tensor>;

namespace {

void check_matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
    TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, " must have shape [", rows, ", ",
                columns, "], got ", t.sizes());
    check_memory(name, t);
}

void check_rows(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
    TORCH_CHECK(t.dim() > 0 && t.size(-1) == columns && t.numel() == rows * columns, name, " must have ", rows,
                " rows of ", columns, ", got ", t.sizes());
    check_memory(name, t);
}

void check_stack(const char* name, const Tensor& t, int64_t experts, int64_t rows, int64_t columns) {
    TORCH_CHECK(t.dim() == 3 && t.size(0) == experts && t.size(1) == rows && t.size(2) == columns, name,
                " must have shape [", experts, ", ", rows, ", ", columns, "], got ", t.sizes());
    check_memory(name, t);
}

void check_four_bit(const Weight& weight, int64_t elements) {
    TORCH_CHECK(weight.data.numel() >= (elements + 1) / 2, "weight must hold ", elements, " elements of 4 bits, got ",
                weight.data.numel(), " bytes");
    check_memory("weight", weight.data);
    for (const Tensor& statistics : weight.quant) check_memory("what describes weight", statistics);
}

}  // namespace

void check_memory(const char* name, const Tensor& t) {
    if (t._is_zerotensor()) return;
    const size_t needed = at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.dtype().itemsize(),
                                                           static_cast<size_t>(t.storage_offset()));
    TORCH_CHECK(t.numel() == 0 || needed <= t.storage().nbytes(), name, " has shape ", t.sizes(), " and takes ", needed,
                " bytes of memory, and there are ", t.storage().nbytes(), ": its data was freed or replaced");
}

void check_operands(const std::optional<Tensor>& x, const Weight& weight, const std::optional<Tensor>& bias,
                    const Adapters& adapters, int64_t tokens) {
    const int64_t N = weight.N, K = weight.K;
    if (x) check_rows("x", *x, tokens, K);
    if (weight.four_bit()) {
        check_four_bit(weight, N * K);
    } else if (weight.absent()) {
        TORCH_CHECK(!adapters.dora(), "DoRA scales a product with a weight, and there is none");
    } else {
        check_matrix("weight", weight.data, N, K);
    }
    if (bias) check_rows("bias", *bias, 1, N);
    for (size_t i = 0; i < adapters.A.size(); ++i) {
        check_matrix("A", adapters.A[i], adapters.A[i].size(0), K);
        check_matrix("B", adapters.B[i], N, adapters.A[i].size(0));
    }
    for (const Tensor& c : adapters.c) check_rows("c", c, 1, N);
    if (adapters.index) check_rows("adapter_index", adapters.index->reshape({-1}), 1, tokens);
}

void check_kept(const Tensor& dy, const Weight& weight, const Adapters& adapters, const Kept& kept, int64_t tokens) {
    check_rows("dy", dy, tokens, weight.N);
    if (kept.u) check_matrix("u", *kept.u, tokens, adapters.ranks());
    for (const Tensor& each : kept.z) check_matrix("z", each, tokens, weight.N);
}

void check_layers(const std::optional<Tensor>& x, const Layers& layers, int64_t tokens) {
    for (const auto& [weight, bias, adapter] : layers) check_operands(x, weight, bias, adapter, tokens);
}

void check_kept(const Tensors& dy, const Layers& layers, const std::optional<Tensor>& u, int64_t tokens) {
    int64_t ranks = 0;
    for (size_t i = 0; i < layers.size(); ++i) {
        check_rows("dy", dy[i], tokens, layers[i].weight.N);
        ranks += layers[i].adapter.ranks();
    }
    if (u) check_matrix("u", *u, tokens, ranks);
}

void check_stacks(const Weight& weight, const Adapters& adapters) {
    TORCH_CHECK(!weight.absent() && !adapters.index, "stacked experts have weights and no mixed batches");
    const int64_t E = adapters.A[0].size(0), N = weight.N, K = weight.K;
    if (weight.four_bit())
        check_four_bit(weight, E * N * K);
    else
        check_stack("weight", weight.data, E, N, K);
    for (size_t i = 0; i < adapters.count(); ++i) {
        check_stack("A", adapters.A[i], E, adapters.A[i].size(-2), K);
        check_stack("B", adapters.B[i], E, N, adapters.A[i].size(-2));
    }
    for (const Tensor& c : adapters.c) check_matrix("c", c, E, N);
}

std::vector<int64_t> check_experts(const std::optional<Tensor>& x, const Tensor& offsets, const Weight& weight,
                                   const std::optional<Tensor>& bias, const Adapters& adapters, int64_t tokens) {
    check_stacks(weight, adapters);
    const int64_t E = adapters.A[0].size(0), N = weight.N, K = weight.K;
    if (x) check_rows("x", *x, tokens, K);
    if (bias) check_matrix("bias", *bias, E, N);
    check_rows("offsets", offsets, 1, E + 1);
    const Tensor wide = offsets.to(at::kLong).contiguous();
    const int64_t* bounds = wide.const_data_ptr<int64_t>();
    TORCH_CHECK_VALUE(bounds[0] == 0 && bounds[E] == tokens, "offsets must start at 0 and end at the ", tokens,
                      " rows of x, got ", bounds[0], " and ", bounds[E]);
    for (int64_t e = 0; e < E; ++e)
        TORCH_CHECK_VALUE(bounds[e] <= bounds[e + 1], "offsets must ascend, and those of expert ", e, " are ",
                          bounds[e], " and ", bounds[e + 1]);
    return {bounds, bounds + E + 1};
}

bool is_lazy(const Tensor& t) { return t.is_neg() || t._is_zerotensor(); }
bool is_lazy(const std::optional<Tensor>& t) { return t && is_lazy(*t); }
bool is_lazy(const Tensors& some) {
    return std::any_of(some.begin(), some.end(), [](const Tensor& t) { return is_lazy(t); });
}
bool is_lazy(const Weight& weight) { return is_lazy(weight.data) || is_lazy(weight.quant); }
bool is_lazy(const Adapters& adapters) { return is_lazy(adapters.A) || is_lazy(adapters.B) || is_lazy(adapters.c); }
bool is_lazy(const Layers& layers) {
    return std::any_of(layers.begin(), layers.end(), [](const Layer& layer) {
        return is_lazy(layer.weight) || is_lazy(layer.bias) || is_lazy(layer.adapter);
    });
}

Tensor in_memory(const Tensor& t) { return t._is_zerotensor() ? at::zeros(t.sizes(), t.options()) : t.resolve_neg(); }
std::optional<Tensor> in_memory(const std::optional<Tensor>& t) {
    return t ? std::optional<Tensor>(in_memory(*t)) : std::nullopt;
}
Tensors in_memory(const Tensors& some) {
    Tensors all;
    for (const Tensor& t : some) all.push_back(in_memory(t));
    return all;
}
Weight in_memory(const Weight& weight) {
    return {in_memory(weight.data), in_memory(weight.quant), weight.blocksize, weight.N, weight.K};
}
Adapters in_memory(const Adapters& adapters) {
    return {in_memory(adapters.A), in_memory(adapters.B), in_memory(adapters.c), adapters.scaling,
            adapters.thresholds,   adapters.seed,         adapters.index};
}
Layers in_memory(const Layers& layers) {
    Layers all;
    for (const auto& [weight, bias, adapter] : layers)
        all.push_back({in_memory(weight), in_memory(bias), in_memory(adapter)});
    return all;
}

}  // namespace fastpeft
