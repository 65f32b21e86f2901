// Numbers, memory, the rule of who is right; and the program: every check on the instruction sets that are named, or on
// all that the processor has and the emulated one. With --threads two threads check each at the same time, each on
// numbers of its own: what they share by mistake a sanitizer sees.
#include "check.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>

namespace check {

thread_local std::string place;

namespace {

constexpr double kHalfStep = 0x1p-24;  // of float32, relative

#if defined(__aarch64__)
using Half = __fp16;
#else
using Half = _Float16;
#endif

thread_local int64_t elements = 0;  // that were looked at
bool pairs_flush = false;
thread_local uint64_t random_state = 0;

uint64_t random_bits() {  // SplitMix64
    uint64_t z = random_state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

template <typename To, typename From>
To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

uint16_t to_half(float v, DType dtype) {
    if (dtype == DType::f16) return bits_of<uint16_t>(static_cast<Half>(v));
    const uint32_t bits = bits_of<uint32_t>(v);
    if (std::isnan(v)) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_half(uint16_t half, DType dtype) {
    if (dtype == DType::f16) return static_cast<float>(bits_of<Half>(half));
    return bits_of<float>(static_cast<uint32_t>(half) << 16);
}

[[noreturn]] void fail(const char* format, ...) {
    std::printf("%s:%s: ", kernels().name, place.c_str());
    std::va_list arguments;
    va_start(arguments, format);
    std::vprintf(format, arguments);
    va_end(arguments);
    std::printf("\n");
    std::exit(1);
}

}  // namespace

int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n)); }

float number(Special special) {
    if (special != Special::none && below(special == Special::few ? 1000 : 8) == 0) {
        constexpr float kInfinity = std::numeric_limits<float>::infinity();
        return std::vector<float>{kInfinity, -kInfinity, std::nanf("")}[below(3)];
    }
    const float v = static_cast<float>(below(1 << 24)) * 0x1p-22f - 2.0f;
    switch (below(32)) {
        case 0:
            return 0.0f;
        case 1:
            return -0.0f;
        case 2:
            return special == Special::none ? v * 0x1p-127f : v;  // subnormal in float32 and bfloat16
        case 3:
            return v * 0x1p-16f;  // in float16
        case 4:
            return v * 1000.0f;
        default:
            return v;
    }
}

float rounded(float v, DType dtype) { return dtype == DType::f32 ? v : from_half(to_half(v, dtype), dtype); }

Memory::Memory(int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    owner_ = std::shared_ptr<void>(std::malloc(bytes), std::free);
    start_ = static_cast<char*>(owner_.get());
#else
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), usable = (bytes + page - 1) / page * page;
    void* mapped = mmap(nullptr, usable + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) fail("no memory");
    start_ = static_cast<char*>(mapped) + usable - bytes;
    if (mprotect(start_ + bytes, page, PROT_NONE) != 0) fail("no page without access");
    owner_ = std::shared_ptr<void>(mapped, [all = usable + page](void* p) { munmap(p, all); });
#endif
    std::memset(start_, 0xff, bytes);
}

bool Memory::is_untouched(int64_t first, int64_t bytes) const {
    return std::all_of(start_ + first, start_ + first + bytes, [](char c) { return c == '\xff'; });
}

float Elements::operator[](int64_t i) const {
    if (dtype_ == DType::f32) return static_cast<const float*>(at())[i];
    return from_half(static_cast<const uint16_t*>(at())[i], dtype_);
}

void Elements::set(int64_t i, float v) {
    if (dtype_ == DType::f32)
        static_cast<float*>(at())[i] = v;
    else
        static_cast<uint16_t*>(at())[i] = to_half(v, dtype_);
}

Rows::Rows(DType dtype, int64_t rows, int64_t columns, Special special, int64_t gap) : Rows(dtype, rows, columns, gap) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) elements.set(i * ld + j, number(special));
}

Rows Rows::copy() const {
    Rows other(elements.dtype(), rows, columns, ld - columns);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) other.elements.set(i * ld + j, (*this)(i, j));
    return other;
}

Sum Sum::times(double factor) const {
    const double by = std::abs(factor);
    return {factor * value, by * size, by * subnormal, std::max(1.0, by) * grain};
}

const char* name(DType dtype) { return dtype == DType::f32 ? "f32" : dtype == DType::bf16 ? "bf16" : "f16"; }

void expect(bool right, const char* what) {
    if (!right) fail("%s", what);
}

void expect_same(int64_t row, int64_t column, float expected, float got, bool rounds) {
    ++elements;
    if (bits_of<uint32_t>(expected) == bits_of<uint32_t>(got) || (std::isnan(expected) && std::isnan(got))) return;
    if (rounds && pairs_flush && std::abs(expected) <= kSmallestNormal && got == 0.0f) return;
    fail("[%ld, %ld] is %a, expected %a", static_cast<long>(row), static_cast<long>(column), got, expected);
}

void expect_sum(int64_t row, int64_t column, const Sum& exact, int64_t roundings, float got, DType dtype) {
    ++elements;
    const auto n = static_cast<double>(roundings);
    // A subnormal result is rounded to a multiple of the smallest one; instructions for pairs take 0 for any of them.
    double error = 2 * n * kHalfStep * (exact.size + exact.grain * kSmallestNormal);
    if (pairs_flush) error += exact.subnormal + n * exact.grain * kSmallestNormal;
    const bool right = std::isfinite(exact.value) ? rounded(static_cast<float>(exact.value - error), dtype) <= got &&
                                                        got <= rounded(static_cast<float>(exact.value + error), dtype)
                                                  : got == exact.value || (std::isnan(exact.value) && std::isnan(got));
    if (!right)
        fail("[%ld, %ld] is %a, expected %a give or take %g", static_cast<long>(row), static_cast<long>(column), got,
             exact.value, error);
}

void expect_gaps(const Rows& out) {
    for (int64_t i = 0; i + 1 < out.rows; ++i)
        expect(out.elements.is_untouched(i * out.ld + out.columns, out.ld - out.columns), "wrote between two rows");
}

}  // namespace check

int main(int argc, char** argv) {
    using namespace check;
    const bool threads = argc > 1 && std::strcmp(argv[1], "--threads") == 0;
    std::vector<const char*> names(argv + 1 + threads, argv + argc);
    if (names.empty()) {
        for (const char* const* available = available_kernels(); *available; ++available) names.push_back(*available);
        if (set_kernels("emulated_amx")) names.push_back("emulated_amx");
    }
    std::signal(SIGSEGV, [](int) { fail("touched memory that is not its own"); });
    for (const char* table : names) {
        if (!set_kernels(table)) {
            std::printf("%s: this processor lacks it\n", table);
            return 1;
        }
        pairs_flush = kernels().pairs(DType::bf16);
        const auto check_all = [&](uint64_t seed) {
            elements = 0;
            random_state = seed;
            for (const auto check_some : {check_skinny, check_base_product, check_dots}) check_some(kernels());
        };
        std::thread other;
        if (threads) other = std::thread(check_all, 1);
        check_all(0);
        if (threads) other.join();
        std::printf("%s: %ld elements are right\n", table, static_cast<long>(elements));
    }
}
