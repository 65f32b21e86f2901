// Chooses how a product with W is computed on the CPU; its thresholds are what bench/cpu_plans.py measured.
#include "plan.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <atomic>

#include "../tensors.h"
#include "base_product.h"

namespace fastpeft::cpu {

using at::Tensor;

namespace {

constexpr int kChosen = -1;
std::atomic<int> forced{kChosen};

// Up to so many tokens, while they fit half a first-level cache, dot products with the rows of W beat any other plan.
int64_t few_tokens(at::ScalarType dtype) { return dtype == at::kBFloat16 ? 4 : dtype == at::kFloat ? 8 : 16; }
constexpr int64_t kFewTokensBytes = 16384;
constexpr int64_t kFewTokensFourBit = 8;  // the same of a 4-bit W, at any size: each weight is decoded once for all

// From so many tokens on, packing W in float32 is worth its time where the kernels prefer it.
constexpr int64_t kTokensPacked = 64;

// Of 65,536: up to this share of x, products with its dropped elements take less time than one with all of it.
constexpr int64_t kMostDropped = 65536 / 4;

// Fewer tokens than that take little of the second product's time, most of which is packing.
constexpr int64_t kTokensApart = 16;

bool drops_few(const Tensor& x, const Adapters& adapters) {
    return tokens_of(x) >= kTokensApart && adapters.dora() && adapters.count() == 1 && adapters.thresholds[0] > 0 &&
           adapters.thresholds[0] <= kMostDropped;
}

// Whether the vendor's float16 product is fast here; without instructions for it, it is slower than float32's. A torch
// without oneDNN, as on a Mac, has nobody to ask.
bool has_float16_products() {
    static const bool found = [] {
        const auto asked = c10::Dispatcher::singleton().findSchema({"mkldnn::_is_mkldnn_fp16_supported", ""});
        return asked && asked->typed<bool()>().call();
    }();
    return found;
}

// Intel's library is at its best on Intel's processors; there, packing W costs more than sharing its sums saves.
bool has_tuned_float_products() {
#if defined(__x86_64__)
    static const bool tuned = at::hasMKL() && __builtin_cpu_is("intel");
    return tuned;
#else
    return false;
#endif
}

bool is_contiguous(const std::vector<Tensor>& some) {
    return std::all_of(some.begin(), some.end(), [](const Tensor& t) { return t.is_contiguous(); });
}

bool takes_dots(const Tensor& x, const Weight& weight, const Adapters& adapters) {
    if (adapters.dora() && (adapters.count() > 1 || adapters.thresholds[0])) return false;
    return x.numel() > 0 && weight.data.is_contiguous() && is_contiguous(adapters.A) && is_contiguous(adapters.B);
}

bool has_few_tokens(const Tensor& x, const Weight& weight) {
    const int64_t tokens = tokens_of(x);
    if (weight.four_bit()) return tokens <= kFewTokensFourBit;
    const int64_t bytes = x.numel() * static_cast<int64_t>(x.element_size());
    return tokens == 1 || (tokens <= few_tokens(x.scalar_type()) && bytes <= kFewTokensBytes);
}

// The product of x [..., columns] with W, contracted over `columns`.
Plan product_plan(const Tensor& x, const Weight& weight, const Adapters& adapters) {
    const Kernels& kernels = cpu::kernels();
    const at::ScalarType dtype = x.scalar_type();
    if (weight.four_bit()) return Plan::one_accumulator;
    if (dtype == at::kFloat) {
        const bool packs = kernels.prefers.packs_float && !has_tuned_float_products() && tokens_of(x) >= kTokensPacked;
        if (packs || drops_few(x, adapters)) return Plan::one_accumulator;
        // Its library adds onto the low-rank part at no cost. DoRA scales the base product, which comes first then.
        return has_tuned_float_products() && !adapters.dora() ? Plan::low_rank_first : Plan::base_first;
    }
    if (dtype == at::kHalf) return has_float16_products() ? Plan::base_first : Plan::one_accumulator;
    // Of an odd number of elements oneDNN reads the next one, too, and a nan there comes through.
    if (!kernels.pairs(DType::bf16) || x.size(-1) % 2) return Plan::one_accumulator;
    const Preferences& prefers = kernels.prefers;
    const bool packs = x.size(-1) >= prefers.packs_from_depth || tokens_of(x) <= prefers.packs_up_to_tokens;
    if (packs && multiplies_pairs(kernels, DType::bf16, x.size(-1))) return Plan::one_accumulator;
    return prefers.low_rank_first && !adapters.dora() ? Plan::low_rank_first : Plan::base_first;
}

}  // namespace

Plan forward_plan(const Tensor& x, const Weight& weight, const Adapters& adapters) {
    if (weight.absent()) return Plan::low_rank_first;
    const int plan = forced;
    if (plan != kChosen) return static_cast<Plan>(plan);
    if (has_few_tokens(x, weight) && takes_dots(x, weight, adapters)) return Plan::dots;
    return product_plan(x, weight, adapters);
}

Plan backward_plan(const Tensor& dy, const Weight& weight, const Adapters& adapters) {
    if (weight.absent()) return Plan::low_rank_first;
    const int plan = forced;
    if (plan != kChosen && static_cast<Plan>(plan) != Plan::dots) return static_cast<Plan>(plan);
    return product_plan(dy, weight, adapters);
}

bool takes_dropped_apart(Plan plan, const Tensor& x, const Adapters& adapters) {
    const Kernels& kernels = cpu::kernels();
    return plan == Plan::one_accumulator && drops_few(x, adapters) &&
           (kernels.prefers.pairs_apart || !multiplies_pairs(kernels, dtype_of(x), x.size(-1)));
}

void force_plan(std::optional<Plan> plan) { forced = plan ? static_cast<int>(*plan) : kChosen; }

}  // namespace fastpeft::cpu
