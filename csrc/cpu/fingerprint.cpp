// Numbers that depend on every byte of a tensor: they show whether what DoRA's kept norm depends on was changed.
#include <ATen/Parallel.h>

#include <array>
#include <cstring>

#include "../checks.h"
#include "lora_linear.h"

namespace fastpeft::cpu {
namespace {

constexpr uint64_t kMultiplier = 6364136223846793005u;            // Knuth's (MMIX)
constexpr int64_t kWords = 8, kLine = kWords * sizeof(uint64_t);  // a cache line
constexpr int64_t kGroup = kFingerprintParts;                     // lines, one of each part, in an order of their own
constexpr int64_t kGroupsAtOnce = 64;                             // that one thread sums up

using Prints = std::array<uint64_t, kFingerprintParts>;

// A pair for each word of a line.
constexpr std::array<uint32_t, 2 * kWords> kKeys = [] {
    std::array<uint32_t, 2 * kWords> keys{};
    uint64_t state = kMultiplier;
    for (uint32_t& key : keys) key = static_cast<uint32_t>((state *= kMultiplier) >> 32);
    return keys;
}();

// The sum over a line's words of (low half + key) (high half + key), NH of Black et al., "UMAC" (CRYPTO 1999): products
// that vector instructions of any processor have, and that do not wait for each other.
uint64_t of_line(const char* line) {
    uint32_t halves[2 * kWords];
    std::memcpy(halves, line, kLine);
    uint64_t sum = 0;
    for (int64_t i = 0; i < 2 * kWords; i += 2)
        sum += static_cast<uint64_t>(halves[i] + kKeys[i]) * static_cast<uint64_t>(halves[i + 1] + kKeys[i + 1]);
    return sum;
}

// The line at `at`; beyond the end of the memory lie zeros.
uint64_t of_line(const char* bytes, int64_t at, int64_t size) {
    if (at + kLine <= size) return of_line(bytes + at);
    char last[kLine] = {};
    std::memcpy(last, bytes + at, size - at);
    return of_line(last);
}

uint64_t mixed(uint64_t sum, uint64_t next) { return (sum ^ (sum >> 29)) * kMultiplier + next; }

// Where a group begins to count its parts: neighbours in a column of a matrix fall into different parts.
int64_t shift_of(int64_t group) {
    return static_cast<int64_t>((static_cast<uint64_t>(group) * kMultiplier) >> 40) % kGroup;
}

// The prints of `count` parts from `first` on over the groups [begin, end).
void add_groups(const char* bytes, int64_t size, int64_t first, int64_t count, int64_t begin, int64_t end,
                Prints& prints) {
    for (int64_t group = begin; group < end; ++group) {
        const int64_t shift = shift_of(group);
        for (int64_t part = first; part < first + count; ++part) {
            const int64_t at = (group * kGroup + (part + shift) % kGroup) * kLine;
            if (at < size) prints[part] = prints[part] * kMultiplier + of_line(bytes, at, size);
        }
    }
}

void add_parts(const at::Tensor& t, int64_t first, int64_t count, std::vector<uint64_t>& prints) {
    const auto* bytes = static_cast<const char*>(t.const_data_ptr());
    const auto size = static_cast<int64_t>(t.nbytes());
    const int64_t groups = (size + kGroup * kLine - 1) / (kGroup * kLine);
    const int64_t tasks = (groups + kGroupsAtOnce - 1) / kGroupsAtOnce;
    std::vector<Prints> sums(tasks, Prints{});
    at::parallel_for(0, tasks, std::max<int64_t>(1, kFingerprintParts / count), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task)
            add_groups(bytes, size, first, count, task * kGroupsAtOnce, std::min(groups, (task + 1) * kGroupsAtOnce),
                       sums[task]);
    });
    for (int64_t part = first; part < first + count; ++part) {
        uint64_t print = static_cast<uint64_t>(size);
        for (const Prints& sum : sums) print = mixed(print, sum[part]);
        prints.push_back(print);
    }
}

uint64_t of_all(const at::Tensor& t) {
    const auto* bytes = static_cast<const char*>(t.const_data_ptr());
    const auto size = static_cast<int64_t>(t.nbytes());
    uint64_t sum = static_cast<uint64_t>(size);
    for (int64_t at = 0; at < size; at += kLine) sum = sum * kMultiplier + of_line(bytes, at, size);
    return sum;
}

const at::Tensor& readable(const at::Tensor& t, at::Tensor& memory) {
    check_memory("a tensor that DoRA's norm depends on", t);
    TORCH_CHECK_VALUE(t.is_contiguous(), "a fingerprint is taken of contiguous tensors");
    if (!is_lazy(t)) return t;
    return memory = in_memory(t);
}

}  // namespace

std::vector<uint64_t> fingerprint(const std::vector<at::Tensor>& small, const std::vector<at::Tensor>& large,
                                  int64_t first, int64_t count) {
    TORCH_CHECK_VALUE(first >= 0 && count > 0 && first + count <= kFingerprintParts, "there are ", kFingerprintParts,
                      " parts, got first ", first, " and count ", count);
    std::vector<uint64_t> prints{0};
    at::Tensor memory;
    for (const at::Tensor& t : small) prints[0] = mixed(prints[0], of_all(readable(t, memory)));
    for (const at::Tensor& t : large) add_parts(readable(t, memory), first, count, prints);
    return prints;
}

}  // namespace fastpeft::cpu
