// What starts the CUDA kernels: functions of raw pointers to device memory, sizes in elements, and where to run. Each
// gives its launch's error, 0 for none, and leaves none pending. Needs no CUDA to include.
#pragma once
#include <cstdint>

#include "../../matrix.h"

namespace fastpeft::cuda {

using Error = int;  // a cudaError_t
const char* error_string(Error error);

struct Place {
    int device;
    void* stream;  // a cudaStream_t
};

// scale q [M, r] right [N, r]ᵀ onto a product, where the mask of a threshold other than 0 keeps it; then DoRA's c [N]
// and z [M, N] (contiguous), the bias [N]. Pointers of what there is not are null.
struct Tail {
    const float* q;
    int64_t q_stride, rank;
    Matrix right;
    float scale;
    uint32_t threshold;
    const int64_t* seed;
    const float* c;
    void* z;
    bool z_is_float;
    Matrix bias;  // one row
};

constexpr int64_t kFewTokens = 8;    // columns of one product of the matrix units
constexpr int64_t kDownTokens = 64;  // of lora_down
constexpr int64_t kGroup = 64;       // elements of a row that share a scale in four_bit_linear

// out [elements] = code * scale of its block, rounded once.
Error four_bit_decode(const FourBit& weight, int64_t elements, void* out, DType dtype, const Place& place);

// y [M, N] = x [M, K] Wᵀ with its tail (no mask); M up to kFewTokens, K in whole groups, blocks of a group or more.
Error four_bit_linear(const void* x, const FourBit& weight, void* y, int64_t M, int64_t N, int64_t K, const Tail& tail,
                      DType dtype, const Place& place);

// u [M, r] = x [M, K] A [r, K]ᵀ by dot products, M up to kDownTokens; 0 where index [M] names another adapter.
Error lora_down(const void* x, int64_t x_stride, const Matrix& A, float* u, int64_t u_stride, const int32_t* index,
                int adapter, int64_t M, int64_t K, int64_t rank, DType dtype, const Place& place);

// y [M, N] = base [M, N] with its tail; with `second` = D(x) Wᵀ (rows as far apart as base's) DoRA over dropped-out
// inputs. y may be base.
Error lora_up(const void* base, int64_t base_stride, const void* second, void* y, int64_t y_stride, int64_t M,
              int64_t N, const Tail& tail, DType dtype, const Place& place);

// x [M, K] A [r, K]ᵀ in a low precision: A's columns times factor [K] where it is given, x where the mask of a
// threshold other than 0 keeps it; 0 where index [M] names another adapter.
struct DownOperands {
    const void* x;
    int64_t x_stride;
    Matrix A;
    const float* factor;
    uint32_t threshold;
    const int64_t* seed;
    const int32_t* index;
    int adapter;
    int64_t M, K, rank;
};
// The result: u and, rounded, q, each times its scale; null where nobody wants it.
struct DownOutputs {
    float* u;
    int64_t u_stride;
    void* q;
    int64_t q_stride;
    float u_scale, q_scale;
};
// to [rows, columns] = from, rounded; nothing where there are no rows.
struct Cast {
    Matrix from;
    void* to;
    int64_t to_stride, rows, columns;
};

// Any number of tokens; `cast` is done beside it.
Error lora_down_many(const DownOperands& operands, const DownOutputs& outputs, const Cast& cast, DType dtype,
                     const Place& place);

// Sums over tokens of x [M, C] in a low precision, masked as above, and q [M, r] (float32 or as x) times scale.
struct GradientOperands {
    const void* x;
    int64_t x_stride;
    Matrix q;
    float scale;
    uint32_t threshold;
    const int64_t* seed;
    const float* c;  // [C], DoRA's
    const void* z;   // [M, C], contiguous, as x
    int64_t M, columns, rank;
};
// sums [r, C] = scale qᵀ (c ∘ x); dc [C] = Σ x ∘ z, dz [M, C] = c ∘ x; null where nobody wants it.
struct GradientOutputs {
    void* sums;
    DType sums_dtype;
    int64_t sums_rank_stride, sums_column_stride;
    float* dc;
    void* dz;
};
Error lora_gradient(const GradientOperands& operands, const GradientOutputs& outputs, DType dtype, const Place& place);

// A product y [M, N] = x [M, K] Wᵀ with the low-rank part q [M, r] right [N, r]ᵀ in the same sums (q scaled already,
// all in one low precision), then a tail's mask, c, z and bias; of the tail q and scale are not read.
struct LinearOperands {
    const void* x;
    int64_t x_stride;
    Matrix weight;  // [N, K]; tail.right is contiguous along the same dimension
    const void* q;
    int64_t q_stride;
    void* y;
    int64_t y_stride, M, N, K;
};
constexpr int64_t kFewestTokens = 129;     // of lora_linear: fewer would leave half of each cluster idle
constexpr int64_t kMostRanksMasked = 256;  // what lora_linear holds at once
constexpr int64_t kRowBytes = 16;          // all its rows and addresses are multiples of this

// Whether lora_linear has kernels for a GPU.
bool has_lora_linear(int device);
Error lora_linear(const LinearOperands& operands, const Tail& tail, DType dtype, const Place& place);

// out [M, K] = factor * keep ∘ x [M, K]; out is contiguous.
Error dropout(const Matrix& x, void* out, int64_t M, int64_t K, uint32_t threshold, float factor, const int64_t* seed,
              const Place& place);

// norm [N] = ‖W + scale B A‖ of each row; B A is computed in `dtype`.
Error dora_norm(const Matrix& weight, const Matrix& A, const float* B, int64_t B_stride, float scale, float* norm,
                int64_t N, int64_t K, int64_t rank, DType dtype, const Place& place);

// All of them, for another library to call.
struct Launchers {
    int64_t layout;  // kLayout of whoever made the table
    decltype(&cuda::error_string) error_string;
    decltype(&cuda::four_bit_decode) four_bit_decode;
    decltype(&cuda::four_bit_linear) four_bit_linear;
    decltype(&cuda::lora_down) lora_down;
    decltype(&cuda::lora_up) lora_up;
    decltype(&cuda::dropout) dropout;
    decltype(&cuda::lora_down_many) lora_down_many;
    decltype(&cuda::lora_gradient) lora_gradient;
    decltype(&cuda::has_lora_linear) has_lora_linear;
    decltype(&cuda::lora_linear) lora_linear;
    decltype(&cuda::dora_norm) dora_norm;
};
constexpr int64_t kLayout = 4;  // raised when anything in this file changes

}  // namespace fastpeft::cuda
