#include "skinny.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace fastpeft::cpu {
namespace {

constexpr int64_t kPackGrain = 64;      // 16 x 16 blocks a thread should have, at least
constexpr int64_t kSumGrain = 1 << 15;  // elements, likewise
constexpr int64_t kTasksAThread = 2;    // sweeps that are a smaller part of all are a thread's each

// The matrix is cut into row_parts x column_parts tasks, in whole tiles. A cut of the contracted dimension costs a
// partial sum: columns for `product`, rows for `gradient`; a cut of the other dimension is free.
struct Grid {
    int64_t row_tiles, column_tiles, row_parts, column_parts;

    explicit Grid(const Sweep& s)
        : row_tiles(std::max<int64_t>(1, ceil_div(s.rows, kRows))),  // without rows there are sums to clear still
          column_tiles(ceil_div(s.columns, kColumns)) {
        const int64_t threads = at::get_num_threads();
        const bool rows_first = !s.gradient && s.rows >= s.columns / 8;
        if (rows_first) {
            row_parts = std::min(threads, row_tiles);
            column_parts = std::min(threads / row_parts, column_tiles);
        } else {
            column_parts = std::min(threads, column_tiles);
            row_parts = std::min(threads / column_parts, row_tiles);
        }
    }
    int64_t row(int64_t part) const { return part * row_tiles / row_parts * kRows; }
    int64_t column(int64_t part) const { return part * column_tiles / column_parts * kColumns; }
};

class Task {
  public:
    Task(const Kernels& kernels, const Sweep& sweep, float* product, float* gradient)
        : k_(kernels),
          s_(sweep),
          product_(product),
          gradient_(gradient),
          pairs_(kernels.pairs(sweep.dtype)),
          element_(pairs_ ? 2 : 4),
          tile_(bytes(kRows * kColumns * element_)),
          left_(bytes(kRows * s_.ranks * element_)),
          left_outer_(bytes(kRows * s_.ranks * element_)) {}

    void run(int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end) {
        if (gradient_)
            for (int64_t r = 0; r < s_.ranks; ++r)
                std::memset(gradient_ + r * s_.ld_gradient + column_begin, 0,
                            (ceil_div(column_end, kLanes) * kLanes - column_begin) * sizeof(float));
        for (int64_t m = row_begin; m < row_end; m += kRows) {
            const int64_t rows = std::min(kRows, row_end - m);
            if (product_) std::memset(product_ + m * s_.ranks, 0, rows * s_.ranks * sizeof(float));
            prepare_left(m, rows);
            for (int64_t c = column_begin; c < column_end; c += kColumns)
                tile(m, c, rows, std::min(kColumns, column_end - c));
        }
    }

  private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    using Bytes = std::unique_ptr<char[], Free>;
    static Bytes bytes(int64_t n) {  // whole cache lines
        return Bytes(static_cast<char*>(std::aligned_alloc(64, ceil_div(n, 64) * 64)));
    }

    void prepare_left(int64_t m, int64_t rows) {
        if (!s_.q) return;
        for (const RankGroup& g : s_.groups) {
            const float* q = s_.q + m * s_.ranks + g.first_rank;
            const int64_t offset = kRows * g.first_rank * element_;
            if (s_.output) k_.left(q, s_.ranks, rows, g.ranks, pairs_, left_.get() + offset);
            if (gradient_) k_.left_outer(q, s_.ranks, rows, g.ranks, pairs_, left_outer_.get() + offset);
        }
    }

    void tile(int64_t m, int64_t c, int64_t rows, int64_t columns) {
        uint64_t words[kRows * kKeepWords];
        bool staged = false;
        for (const RankGroup& g : s_.groups) {
            const uint64_t* keep = g.threshold ? words : nullptr;
            if (keep) k_.keep(g.seed, g.threshold, s_.first_row + m, c, rows, columns, words);
            if ((product_ || gradient_) && (keep || !staged)) {
                const char* input = static_cast<const char*>(s_.input);
                const int64_t offset = (m * s_.ld_input + c) * (s_.dtype == DType::f32 ? 4 : 2);
                k_.stage(input + offset, s_.dtype, s_.ld_input, rows, columns, keep, tile_.get());
                staged = !keep;
            }
            if (product_) multiply(g, m, c, rows, columns);
            if (gradient_)
                k_.outer(tile_.get(), pairs_, rows, columns, left_outer_.get() + kRows * g.first_rank * element_,
                         g.ranks / kLanes, gradient_ + g.first_rank * s_.ld_gradient + c, s_.ld_gradient);
            if (s_.output) expand(g, m, c, rows, columns, keep);
        }
    }

    void multiply(const RankGroup& g, int64_t m, int64_t c, int64_t rows, int64_t columns) {
        const int64_t stride = ceil_div(s_.columns, kLanes) * kLanes * kLanes;  // elements of a panel's column block
        const int64_t offset = (g.first_rank / kLanes * stride + c * kLanes) * element_;
        k_.multiply(tile_.get(), pairs_, rows, columns, static_cast<const char*>(s_.panel_in) + offset, stride,
                    g.ranks / kLanes, product_ + m * s_.ranks + g.first_rank, s_.ranks);
    }

    void expand(const RankGroup& g, int64_t m, int64_t c, int64_t rows, int64_t columns, const uint64_t* keep) {
        const int64_t stride = s_.ranks * kLanes, size = s_.dtype == DType::f32 ? 4 : 2;
        const char* panel =
            static_cast<const char*>(s_.panel_out) + (c / kLanes * stride + g.first_rank * kLanes) * element_;
        const auto contiguous = [&](const void* p) {
            return static_cast<const char*>(p) + (m * s_.columns + c) * size;
        };
        Tail target{.keep = keep, .dtype = s_.dtype, .ld_y = s_.ld_output};
        target.y = static_cast<char*>(s_.output) + (m * s_.ld_output + c) * size;
        if (s_.add || &g != &s_.groups.front()) target.from = {target.y, s_.dtype, s_.ld_output};
        if (g.operand) target.second = {contiguous(s_.seconds[g.operand - 1]), s_.dtype, s_.columns};
        if (s_.bias && &g == &s_.groups.back()) target.bias = s_.bias + c;
        if (g.scale) target.scale = g.scale + c;
        if (g.z) {
            target.z = static_cast<char*>(g.z) + (m * s_.columns + c) * (g.z_dtype == DType::f32 ? 4 : 2);
            target.z_dtype = g.z_dtype;
            target.ld_z = s_.columns;
        }
        k_.expand(left_.get() + kRows * g.first_rank * element_, pairs_, rows, columns, g.ranks, panel, stride, target);
    }

    const Kernels& k_;
    const Sweep& s_;
    float* product_;
    float* gradient_;
    const bool pairs_;
    const int64_t element_;
    Bytes tile_, left_, left_outer_;
};

void add_parts(float* total, const float* parts, int64_t count, int64_t n) {
    at::parallel_for(0, n, kSumGrain, [&](int64_t begin, int64_t end) {
        for (int64_t part = 0; part < count; ++part)
            for (int64_t i = begin; i < end; ++i) total[i] += parts[part * n + i];
    });
}

}  // namespace

void run(const Kernels& kernels, const Sweep& s) {
    const Grid grid(s);
    // The first part of a partial sum is the result itself.
    const int64_t product_size = s.rows * s.ranks, gradient_size = s.ranks * s.ld_gradient;
    std::unique_ptr<float[]> products, gradients;
    if (s.product && grid.column_parts > 1) products.reset(new float[(grid.column_parts - 1) * product_size]);
    if (s.gradient && grid.row_parts > 1) gradients.reset(new float[(grid.row_parts - 1) * gradient_size]);

    at::parallel_for(0, grid.row_parts * grid.column_parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t i = task / grid.column_parts, j = task % grid.column_parts;
            float* product = s.product && j > 0 ? products.get() + (j - 1) * product_size : s.product;
            float* gradient = s.gradient && i > 0 ? gradients.get() + (i - 1) * gradient_size : s.gradient;
            Task(kernels, s, product, gradient)
                .run(grid.row(i), std::min(grid.row(i + 1), s.rows), grid.column(j),
                     std::min(grid.column(j + 1), s.columns));
        }
    });

    if (products) add_parts(s.product, products.get(), grid.column_parts - 1, product_size);
    if (gradients) add_parts(s.gradient, gradients.get(), grid.row_parts - 1, gradient_size);
}

void run(const Kernels& kernels, const std::vector<Sweep>& sweeps) {
    const int64_t threads = at::get_num_threads();
    int64_t rows = 0;
    for (const Sweep& s : sweeps) rows += s.rows;
    std::vector<const Sweep*> small;
    for (const Sweep& s : sweeps) {
        if (kTasksAThread * threads * s.rows > rows)
            run(kernels, s);
        else
            small.push_back(&s);
    }
    // Whichever thread is free goes on, with the longest that is left.
    std::stable_sort(small.begin(), small.end(), [](const Sweep* a, const Sweep* b) { return a->rows > b->rows; });
    const auto count = static_cast<int64_t>(small.size());
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min(threads, count), 1, [&](int64_t, int64_t) {
        for (int64_t i; (i = next.fetch_add(1)) < count;) {
            const Sweep& s = *small[i];
            Task(kernels, s, s.product, s.gradient).run(0, s.rows, 0, s.columns);
        }
    });
}

int64_t panel_elements(int64_t rows, int64_t columns) {
    return ceil_div(rows, kLanes) * kLanes * ceil_div(columns, kLanes) * kLanes;
}

void pack(const Kernels& kernels, const Matrix& s, bool pairs, void* panel) {
    const int64_t blocks = ceil_div(s.rows, kLanes) * ceil_div(s.columns, kLanes);
    at::parallel_for(0, blocks, kPackGrain,
                     [&](int64_t begin, int64_t end) { kernels.pack(s, pairs, panel, begin, end); });
}

}  // namespace fastpeft::cpu
