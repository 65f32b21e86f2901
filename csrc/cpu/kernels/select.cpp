// Which instruction set's kernels run: the processor is asked once, and an override serves the tests.
#include <atomic>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace fastpeft::cpu {
namespace {

#if defined(__x86_64__)
// For what older compilers have no name in __builtin_cpu_supports.
struct Cpuid {
    explicit Cpuid(unsigned leaf) { __get_cpuid_count(leaf, 0, &eax, &ebx, &ecx, &edx); }
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

bool has_avx2() {
    constexpr unsigned kF16c = 1u << 29;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (Cpuid(1).ecx & kF16c);
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

bool has_amx() {
#if defined(__linux__)
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    if (!has_avx512_bf16() || !(Cpuid(7).edx & kAmxBf16) || !(Cpuid(7).edx & kAmxTile)) return false;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#elif defined(__aarch64__)
bool has_neon_bf16() {
#if defined(__linux__)
    constexpr unsigned long kBf16 = 1 << 14;  // HWCAP2_BF16
    return getauxval(AT_HWCAP2) & kBf16;
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has;
#else
    return false;
#endif
}
#endif

struct Candidates {
    const Kernels* tables[6] = {};
    const char* names[6] = {};

    Candidates() {
        int count = 0;
        const auto offer = [&](const Kernels& table) {
            tables[count] = &table;
            names[count++] = table.name;
        };
#if defined(__x86_64__)
        if (has_amx()) offer(kAmx);
        if (has_avx512_bf16()) offer(kAvx512Bf16);
        if (has_avx512()) offer(kAvx512);
        if (has_avx2()) offer(kAvx2);
#elif defined(__aarch64__)
        if (has_neon_bf16()) offer(kNeonBf16);
        offer(kNeon);
#endif
        offer(kPlain);
    }
};

const Candidates& candidates() {
    static const Candidates found;
    return found;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* table = chosen.load(std::memory_order_relaxed);
    return table ? *table : *candidates().tables[0];
}

bool set_kernels(const char* name) {
    if (std::strcmp(name, "auto") == 0) {
        chosen = nullptr;
        return true;
    }
    for (int i = 0; candidates().tables[i]; ++i)
        if (std::strcmp(candidates().names[i], name) == 0) {
            chosen = candidates().tables[i];
            return true;
        }
#if defined(__x86_64__)
    if (has_avx512_bf16() && std::strcmp(kEmulatedAmx.name, name) == 0) {
        chosen = &kEmulatedAmx;
        return true;
    }
#endif
    return false;
}

const char* const* available_kernels() { return candidates().names; }

}  // namespace fastpeft::cpu
