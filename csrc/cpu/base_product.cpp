#include "base_product.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace fastpeft::cpu {
namespace {

constexpr int64_t kBlock = 64;    // rows of x that a micro-kernel takes
constexpr int64_t kPart = 512;    // rows whose sums wait in scratch, at most
constexpr int64_t kDepth = 3072;  // of the contracted dimension that is packed at a time, at most
constexpr int64_t kTasksAThread = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t padded(int64_t n) { return ceil_div(n, kLanes) * kLanes; }

// Whole cache lines that a thread keeps: fresh pages in every call would cost as much as the packing.
class Scratch {
  public:
    char* lines(int64_t bytes) {
        if (bytes > size_) {
            size_ = ceil_div(bytes, 64) * 64;
            data_.reset(static_cast<char*>(std::aligned_alloc(64, size_)));
        }
        return data_.get();
    }

  private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    std::unique_ptr<char[], Free> data_;
    int64_t size_ = 0;
};

class Task {
  public:
    Task(const Kernels& kernels, const Sweep& low_rank, const void* x, int64_t ld_x, const Matrix& s)
        : k_(kernels), low_(low_rank), x_(static_cast<const c10::BFloat16*>(x)), ld_x_(ld_x), s_(s) {
        const int64_t depths = ceil_div(s.rows, kDepth);
        depth_ = ceil_div(s.rows, depths * 2 * kLanes) * 2 * kLanes;
        thread_local Scratch sums, stripe, left;
        sums_ = reinterpret_cast<float*>(sums.lines(kPart * kStripe * sizeof(float)));
        stripe_ = reinterpret_cast<c10::BFloat16*>(stripe.lines(depth_ * kStripe * sizeof(c10::BFloat16)));
        left_ = left.lines(kRows * low_.ranks * sizeof(c10::BFloat16));
    }

    // Up to kPart rows of one stripe of columns.
    void run(int64_t row_begin, int64_t row_end, int64_t column) {
        const int64_t columns = std::min(kStripe, low_.columns - column);
        const auto sums = [&](int64_t m) { return sums_ + (m - row_begin) * kStripe; };
        for (int64_t m = row_begin; m < row_end; m += kRows)
            set_low_rank(m, std::min(kRows, row_end - m), column, columns, sums(m));
        for (int64_t k = 0; k < s_.rows; k += depth_) {
            const int64_t depth = std::min(depth_, s_.rows - k);
            pack(k, depth, column);
            // Powers of two, so that there are few kernels to generate however many the tokens are.
            for (int64_t m = row_begin, rows; m < row_end; m += rows) {
                rows = std::min<int64_t>(kBlock, std::bit_floor(static_cast<uint64_t>(row_end - m)));
                at::native::cpublas::brgemm(rows, padded(columns), depth, ld_x_, kStripe, kStripe, true,
                                            x_ + m * ld_x_ + k, stripe_, sums(m), true);
            }
        }
        at::native::cpublas::brgemm_release(true);  // expand may need the same tile registers
        k_.round(sums_, kStripe, row_end - row_begin, columns,
                 static_cast<c10::BFloat16*>(low_.output) + row_begin * low_.ld_output + column, low_.ld_output);
    }

  private:
    void pack(int64_t k, int64_t depth, int64_t column) {
        if (k == packed_k_ && column == packed_column_) return;
        k_.pack_stripe(s_, k, depth, column, stripe_);
        packed_k_ = k;
        packed_column_ = column;
    }

    void set_low_rank(int64_t m, int64_t rows, int64_t column, int64_t columns, float* sums) {
        uint64_t words[kRows * kKeepWords];
        const int64_t stride = low_.ranks * kLanes;  // elements of a panel's column block
        for (const RankGroup& g : low_.groups) {
            const bool first = &g == &low_.groups.front();
            if (g.threshold) k_.keep(g.seed, g.threshold, m, column, rows, columns, words);
            k_.left(low_.q + m * low_.ranks + g.first_rank, low_.ranks, rows, g.ranks, true, left_);
            const auto* panel = static_cast<const c10::BFloat16*>(low_.panel_out) + column / kLanes * stride;
            k_.expand(left_, true, rows, columns, g.ranks, panel + g.first_rank * kLanes, stride,
                      g.threshold ? words : nullptr, first && low_.bias ? low_.bias + column : nullptr, !first, sums,
                      DType::f32, kStripe);
        }
    }

    const Kernels& k_;
    const Sweep& low_;
    const c10::BFloat16* x_;
    const int64_t ld_x_;
    const Matrix& s_;
    int64_t depth_;
    float* sums_;
    c10::BFloat16* stripe_;
    char* left_;
    int64_t packed_k_ = -1, packed_column_ = -1;
};

bool try_kernel() {
    alignas(64) c10::BFloat16 operands[kLanes * kLanes] = {};
    alignas(64) float sums[kLanes * kLanes] = {};
    try {
        at::native::cpublas::brgemm(kLanes, kLanes, kLanes, kLanes, kLanes, kLanes, false, operands, operands, sums,
                                    true);
        at::native::cpublas::brgemm_release(true);
        return true;
    } catch (const c10::Error&) {
        return false;
    }
}

}  // namespace

bool has_base_product(const Kernels& kernels) {
    if (!kernels.pack_stripe || !at::globalContext().userEnabledMkldnn()) return false;
    static const bool works = try_kernel();
    return works;
}

void base_product(const Kernels& kernels, const Sweep& low_rank, const void* x, int64_t ld_x, const Matrix& s) {
    const int64_t stripes = ceil_div(low_rank.columns, kStripe);
    const int64_t wanted = ceil_div(low_rank.rows * stripes, kTasksAThread * at::get_num_threads());
    const int64_t part = std::clamp(ceil_div(wanted, kBlock) * kBlock, kBlock, kPart);
    const int64_t parts = ceil_div(low_rank.rows, part);
    at::parallel_for(0, parts * stripes, 1, [&](int64_t begin, int64_t end) {
        Task task(kernels, low_rank, x, ld_x, s);
        for (int64_t i = begin; i < end; ++i) {  // the parts of a stripe one after the other: it is packed once
            const int64_t row = i % parts * part;
            task.run(row, std::min(row + part, low_rank.rows), i / parts * kStripe);
        }
    });
}

}  // namespace fastpeft::cpu
