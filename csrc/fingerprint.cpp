#include <ATen/core/Tensor.h>

#include <cstring>

#include "operands.h"

namespace fastpeft {
namespace {

// Independent chains of multiply and add hide the multiplier's latency; the multiplier is Knuth's (MMIX).
constexpr int64_t kChains = 8;
constexpr uint64_t kMultiplier = 6364136223846793005u;

template <typename Word>
uint64_t of_words(const Word* words, int64_t count, int64_t every) {
    uint64_t chains[kChains] = {};
    int64_t i = 0;
    for (; i + (kChains - 1) * every < count; i += kChains * every)
        for (int64_t j = 0; j < kChains; ++j) chains[j] = chains[j] * kMultiplier + words[i + j * every] + 1;
    for (; i < count; i += every) chains[0] = chains[0] * kMultiplier + words[i] + 1;
    uint64_t all = static_cast<uint64_t>(count);
    for (const uint64_t chain : chains) all = (all ^ (all >> 29)) * kMultiplier + chain;
    return all;
}

}  // namespace

uint64_t fingerprint(const at::Tensor& t, int64_t every) {
    check_memory("a tensor that DoRA's norm depends on", t);
    if (is_lazy(t)) return fingerprint(in_memory(t), every);
    const void* data = t.const_data_ptr();
    switch (t.element_size()) {
        case 1:
            return of_words(static_cast<const uint8_t*>(data), t.numel(), every);
        case 2:
            return of_words(static_cast<const uint16_t*>(data), t.numel(), every);
        case 4:
            return of_words(static_cast<const uint32_t*>(data), t.numel(), every);
        default:
            return of_words(static_cast<const uint64_t*>(data), t.numel(), every);
    }
}

}  // namespace fastpeft
