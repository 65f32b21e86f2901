// The low-rank part of a tile, on the matrix units in the low precisions: 32 rows and 32 columns a warp. Of these, lane
// 4 g + t has the rows g, g + 8, g + 16, g + 24 and the columns 8 t … 8 t + 7: 16 bytes of each row, one draw of the
// mask.
#pragma once
#include "elements.cuh"

namespace fastpeft::cuda {

constexpr int kTileRows = 32, kTileColumns = 32, kLaneRows = 4;

struct Lane {
    int row, column;  // the first of its rows and of its columns
    __device__ Lane() : row(threadIdx.x % kWarp / 4), column(threadIdx.x % 4 * 8) {}
};

// sums[i][j] += (scale q) right, row `row` + 8 i of lane, column 8 t + j; q [rows, rank], right [columns, rank].
template <typename T>
__device__ __forceinline__ void add_low_rank(const float* q, int64_t q_stride, float scale, const Matrix& right,
                                             int64_t rank, int64_t row, int64_t rows, int64_t column, int64_t columns,
                                             float (&sums)[kLaneRows][8]) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    const auto left_at = [&](int64_t m, int64_t r) {
        return m < rows && r < rank ? q[m * q_stride + r] * scale : 0.0f;
    };
    const auto right_at = [&](int64_t n, int64_t r) {
        return n < columns && r < rank
                   ? element(right.data, right.dtype, n * right.row_stride + r * right.column_stride)
                   : 0.0f;
    };
    if constexpr (std::is_same_v<T, float>) {
        for (int64_t r = 0; r < rank; ++r) {
            float left[kLaneRows];
#pragma unroll
            for (int i = 0; i < kLaneRows; ++i) left[i] = left_at(row + g + 8 * i, r);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float factor = right_at(column + 8 * t + j, r);
#pragma unroll
                for (int i = 0; i < kLaneRows; ++i) sums[i][j] += left[i] * factor;
            }
        }
    } else {
        for (int64_t r = 0; r < rank; r += 16) {
            uint32_t a[2][4];
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int64_t m = row + 16 * half + 8 * (i % 2) + g, k = r + 8 * (i / 2) + 2 * t;
                    a[half][i] = pair<T>(left_at(m, k), left_at(m, k + 1));
                }
#pragma unroll
            for (int j = 0; j < 4; ++j) {  // the product's column n is column 8 (n / 2) + 2 j + n % 2 of the tile
                const int64_t n = column + 8 * (g / 2) + 2 * j + g % 2, k = r + 2 * t;
                const uint32_t b[2] = {pair<T>(right_at(n, k), right_at(n, k + 1)),
                                       pair<T>(right_at(n, k + 8), right_at(n, k + 9))};
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float d[4] = {sums[2 * half][2 * j], sums[2 * half][2 * j + 1], sums[2 * half + 1][2 * j],
                                  sums[2 * half + 1][2 * j + 1]};
                    mma_16x8x16<T>(d, a[half], b);
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[2 * half + i / 2][2 * j + i % 2] = d[i];
                }
            }
        }
    }
}

}  // namespace fastpeft::cuda
