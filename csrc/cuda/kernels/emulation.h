// Runs the kernels on a processor without a GPU, for tests: each thread of a block is a fiber of its own, which gives
// way at barriers and warp exchanges; blocks run one after the other. It checks that all threads come to a barrier and
// all lanes to an exchange. `emulation::backwards` turns the order of blocks and threads round: a race shows as other
// bits.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define FASTPEFT_LAUNCH(kernel, grid, threads, place, ...) \
    launched(place, [&] { return emulation::launch(grid, threads, [&] { kernel(__VA_ARGS__); }); })

#define FASTPEFT_LAUNCH_CLUSTERS(kernel, grid, threads, blocks, place, ...) \
    FASTPEFT_LAUNCH(kernel, grid, threads, place, __VA_ARGS__)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};

enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice };
inline const char* cudaGetErrorString(cudaError_t) { return "invalid device ordinal"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}
inline __nv_bfloat16 __float2bfloat16(float value) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (std::isnan(value)) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
using __half = _Float16;
inline float __half2float(__half value) { return static_cast<float>(value); }
inline __half __float2half(float value) { return static_cast<__half>(value); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }
inline float __fmul_rn(float a, float b) { return a * b; }  // compiled with -ffp-contract=off
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }

namespace emulation {

constexpr int kLanes = 32, kStackBytes = 1 << 16;

enum class Waits { no, warp, block, gone };

struct alignas(16) Slot {
    uint32_t words[8];
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    Waits waits;
    int phase;  // which of its two slots the lane writes next: another lane may still read the one before
    Slot slots[2];
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline unsigned current, alive;
inline bool backwards = false;
inline bool has_lora_linear = false;  // whether the stand-in for it is taken
inline int64_t launches = 0;          // so far

inline void give_way(Waits waits) {
    fibers[current].waits = waits;
    const unsigned self = current;
    swapcontext(&fibers[self].context, &scheduler);
}

inline void run_body() {
    body();
    give_way(Waits::gone);
}

// Lets the fibers [first, last) go on if all of them wait for each other.
inline bool release(unsigned first, unsigned last, Waits waits) {
    for (unsigned i = first; i < last; ++i)
        if (fibers[i].waits != waits) return false;
    for (unsigned i = first; i < last; ++i) fibers[i].waits = Waits::no;
    return true;
}

inline void run_block(unsigned threads) {
    if (threads % kLanes) throw std::logic_error("emulation: a block must consist of whole warps");
    if (fibers.size() < threads) fibers.resize(threads);
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStackBytes;
        makecontext(&fiber.context, run_body, 0);
        fiber.waits = Waits::no;
        fiber.phase = 0;
    }
    while (true) {
        bool progress = false;
        for (unsigned i = 0; i < threads; ++i) {
            current = backwards ? threads - 1 - i : i;
            if (fibers[current].waits != Waits::no) continue;
            progress = true;
            swapcontext(&scheduler, &fibers[current].context);
        }
        if (release(0, threads, Waits::gone)) return;
        bool released = release(0, threads, Waits::block);
        for (unsigned warp = 0; warp < threads; warp += kLanes) released |= release(warp, warp + kLanes, Waits::warp);
        if (!progress && !released)
            throw std::logic_error("emulation: not all threads came to a barrier, or not all lanes to an exchange");
    }
}

struct Index {
    unsigned x, y, z;
};
struct ThreadIndex {  // blocks are one-dimensional
    struct X {
        operator unsigned() const { return current; }
    } x;
};
inline Index block_index, block_dimension;

template <typename Kernel>
cudaError_t launch(dim3 grid, unsigned threads, Kernel kernel) {
    ++launches;
    body = kernel;
    block_dimension = {threads, 1, 1};
    const unsigned blocks = grid.x * grid.y * grid.z;
    for (unsigned i = 0; i < blocks; ++i) {
        const unsigned block = backwards ? blocks - 1 - i : i;
        block_index = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
        run_block(threads);
    }
    return cudaSuccess;
}

// Publishes a lane's words, waits for the warp, and gives access to what all lanes published.
inline auto exchange(const Slot& mine) {
    Fiber& fiber = fibers[current];
    const int phase = fiber.phase;
    fiber.slots[phase] = mine;
    fiber.phase ^= 1;
    give_way(Waits::warp);
    return [first = current / kLanes * kLanes, phase](int lane) -> const Slot& {
        return fibers[first + lane].slots[phase];
    };
}

}  // namespace emulation

inline emulation::ThreadIndex threadIdx;
#define blockIdx emulation::block_index
#define blockDim emulation::block_dimension

inline void __syncthreads() { emulation::give_way(emulation::Waits::block); }

inline float __shfl_sync(unsigned, float value, int lane) {
    emulation::Slot mine;
    std::memcpy(mine.words, &value, sizeof value);
    std::memcpy(&value, emulation::exchange(mine)(lane).words, sizeof value);
    return value;
}
inline float __shfl_xor_sync(unsigned mask, float value, int other) {
    return __shfl_sync(mask, value, (emulation::current % emulation::kLanes) ^ other);
}

namespace fastpeft::cuda {

template <typename T>
float half_of(uint32_t pair, int i) {
    const auto bits = static_cast<uint16_t>(pair >> (16 * i));
    T value;
    std::memcpy(&value, &bits, sizeof value);
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        return __bfloat162float(value);
    else
        return __half2float(value);
}

// PTX's mma.m16n8k16: of lane 4 g + t, a holds rows g and g + 8, b column g, each k = 2 t, 2 t + 1, 2 t + 8, 2 t + 9;
// d rows g and g + 8 of columns 2 t, 2 t + 1.
template <typename T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const auto lanes = emulation::exchange({a[0], a[1], a[2], a[3], b[0], b[1]});
    const int lane = emulation::current % emulation::kLanes, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k) {
            const int of = k % 8 / 2, upper = k / 8;
            const float left = half_of<T>(lanes(4 * g + of).words[i / 2 + 2 * upper], k % 2);
            const float right = half_of<T>(lanes(4 * (2 * t + i % 2) + of).words[4 + upper], k % 2);
            d[i] += left * right;
        }
}

}  // namespace fastpeft::cuda
