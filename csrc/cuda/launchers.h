// The launchers: raw pointers to device memory, sizes in elements, where to run. Each gives its launch's error, 0 for
// none, and leaves none pending. Needs no CUDA to include.
#pragma once
#include <cstdint>

namespace fastpeft::cuda {

using Error = int;  // a cudaError_t
const char* error_string(Error error);

struct Place {
    int device;
    void* stream;  // a cudaStream_t
};

enum class DType : int { f32, bf16, f16 };

// A matrix of any strides.
struct Matrix {
    const void* data;
    DType dtype;
    int64_t row_stride, column_stride;
};

// A 4-bit weight, see nf4.py: absmax is null where the statistics are nested, and q is where they are not.
struct FourBit {
    const uint8_t* packed;
    const float* code;
    const float* absmax;
    const uint8_t* q;
    const float* code2;
    const float* absmax2;
    const float* offset;
    int block_bits;
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

// out [M, K] = factor * keep ∘ x [M, K]; out is contiguous.
Error dropout(const Matrix& x, void* out, int64_t M, int64_t K, uint32_t threshold, float factor, const int64_t* seed,
              const Place& place);

// norm [N] = ‖W + scale B A‖ of each row; B A is computed in `dtype`, and 4-bit weights are rounded to it.
Error dora_norm(const Matrix& weight, const FourBit* four_bit, const Matrix& A, const float* B, int64_t B_stride,
                float scale, float* norm, int64_t N, int64_t K, int64_t rank, DType dtype, const Place& place);

// All of them, for another library to call.
struct Launchers {
    int64_t layout;  // kLayout of whoever made the table
    decltype(&cuda::error_string) error_string;
    decltype(&cuda::four_bit_decode) four_bit_decode;
    decltype(&cuda::four_bit_linear) four_bit_linear;
    decltype(&cuda::lora_down) lora_down;
    decltype(&cuda::lora_up) lora_up;
    decltype(&cuda::dropout) dropout;
};
constexpr int64_t kLayout = 2;  // raised when anything in this file changes

}  // namespace fastpeft::cuda
