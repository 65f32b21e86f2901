// What kernels know of a tensor: dtype, pointer, strides; of a 4-bit weight its parts. No header of torch or CUDA.
#pragma once
#include <cstdint>

namespace fastpeft {

enum class DType : int32_t { f32, bf16, f16 };

// A matrix in memory; strides in elements.
struct Matrix {
    const void* data;
    DType dtype;
    int64_t rows, columns, row_stride, column_stride;
};

// A 4-bit weight as bitsandbytes stores it: two codes a byte, the even element in the high nibble, blocks over the flat
// matrix. A code stands for code[it] times its block's scale: absmax[block], or with nested statistics
// code2[q[block]] * absmax2[block / 256] + offset. Pointers of the other kind of statistics are null.
struct FourBit {
    const uint8_t* packed;
    const float* code;  // 16 values
    const float* absmax;
    const uint8_t* q;
    const float *code2, *absmax2, *offset;
    int block_bits;  // blocks are 2 ** block_bits elements
};

}  // namespace fastpeft
