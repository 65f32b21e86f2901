#include "base_product.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>

namespace fastpeft::cpu {
namespace {

using c10::BFloat16;

constexpr int64_t kBlock = 64;  // rows of x that torch's micro-kernel takes
constexpr int64_t kPart = 512;  // rows whose sums wait in scratch, at most
// Of the contracted dimension that is packed at a time, at most: pairs for the whole of a layer, as the micro-kernel
// has blocks of its own; in float32 what a first-level cache holds of sixteen columns.
constexpr int64_t kDepthPairs = 3072, kDepthFloat = 256;
constexpr int64_t kTasksAThread = 4;
// Of the stripes that are packed together: bytes, in parts of their depth and whole. Bytes of x from which on that
// pays.
constexpr int64_t kBytesInParts = 3 << 18, kBytesWhole = 1 << 20, kBytesNear = 1 << 20;
// Elements from one block of sixteen columns of the turned stripe to the next: a line more than it holds, so that the
// lines of a row do not share a cache set.
constexpr int64_t kTurned = kStripe * kLanes + kLanes;

int64_t padded(int64_t n) { return ceil_div(n, kLanes) * kLanes; }

// The contracted dimension in parts of the same size, none above the most.
int64_t even_part(int64_t rows, int64_t most) {
    constexpr int64_t kUnit = 2 * kLanes;
    return ceil_div(rows, ceil_div(rows, most) * kUnit) * kUnit;
}

// How many stripes are packed at a time, and how deep.
struct Packing {
    int64_t together, depth;
};

// In pairs, `most` stripes at most. Of rows that are many, each part meets what is packed already if that is whole.
Packing packing(int64_t rows, int64_t depth, int64_t most) {
    constexpr int64_t kRowBytes = kStripe * 2;
    const bool far = std::min(rows, kPart) * depth * 2 > kBytesNear;
    if (far && most > 1 && rows > kPart && depth <= kDepthPairs)
        return {std::clamp<int64_t>(kBytesWhole / (depth * kRowBytes), 1, most), even_part(depth, kDepthPairs)};
    if (far && most > 1) return {most, even_part(depth, kBytesInParts / (most * kRowBytes))};
    return {1, even_part(depth, kDepthPairs)};
}

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
    Task(const Kernels& kernels, const BaseProduct& product, bool pairs, const Apart& apart, const Packing& packing)
        : k_(kernels),
          sweep_(product.sweep),
          terms_(product.terms),
          whole_(product.depth()),
          apart_(apart),
          pairs_(pairs),
          low_rank_pairs_(kernels.pairs(sweep_.dtype)),
          decoded_dtype_(pairs ? DType::bf16 : DType::f32),
          element_(pairs ? 2 : 4),
          together_(packing.together),
          depth_(packing.depth) {
        thread_local Scratch sums, stripe, floats, columns, left, decoded;
        const size_t operands = apart ? 2 : terms_[0].x.size();
        sums_ = reinterpret_cast<float*>(sums.lines(operands * together_ * kPart * kStripe * sizeof(float)));
        stripe_ = stripe.lines(together_ * depth_ * kStripe * element_);
        floats_ = reinterpret_cast<float*>(pairs && apart.inputs ? floats.lines(depth_ * kStripe * 4) : stripe_);
        if (apart.outputs)
            columns_ = reinterpret_cast<float*>(columns.lines(ceil_div(depth_, kStripe) * 4 * kTurned * sizeof(float)));
        left_ = left.lines(kRows * sweep_.ranks * sizeof(float));
        if (std::any_of(terms_.begin(), terms_.end(), [](const Term& term) { return term.s.packed; }))
            decoded_ = decoded.lines(kStripe * kColumns * element_);
    }

    // Up to kPart rows of `together` stripes of columns.
    void run(int64_t row_begin, int64_t row_end, int64_t column) {
        const int64_t end = std::min(column + together_ * kStripe, sweep_.columns);
        const int64_t block = pairs_ && !apart_ ? kBlock : kPart;  // of rows, finished while their sums are near
        for (int64_t k = 0; k < whole_; k += depth_) {
            const int64_t depth = std::min(depth_, whole_ - k);
            const bool last = k + depth_ >= whole_;
            pack(k, depth, column, end);
            for (int64_t m = row_begin; m < row_end; m += block) {
                const int64_t m_end = std::min(m + block, row_end);
                const int64_t offset = (m - row_begin) * kStripe;
                multiply(0, m, m_end, offset, k, depth, column, end);
                if (apart_.inputs)
                    multiply_dropped(row_begin, row_end, k, padded(end - column));
                else if (apart_.outputs)
                    sample(row_begin, row_end, k, depth, column);
                else
                    for (size_t i = 1; i < terms_[0].x.size(); ++i)
                        multiply(i, m, m_end, offset, k, depth, column, end);
                if (last) finish(m, m_end, offset, column, end);
            }
        }
    }

  private:
    // Calls f(term, first row of its S, how many, the first one's row in the packed stripe) for what lies in
    // [k, k + depth) of the terms one below the other.
    template <typename F>
    void each_part(int64_t k, int64_t depth, F f) {
        int64_t first = 0;
        for (const Term& term : terms_) {
            const int64_t begin = std::max(k, first), end = std::min(k + depth, first + term.s.s.rows);
            if (begin < end) f(term, begin - first, end - begin, begin - k);
            first += term.s.s.rows;
        }
    }

    void pack(int64_t k, int64_t depth, int64_t column, int64_t end) {
        if (k == packed_k_ && column == packed_column_) return;
        for (int64_t c = column; c < end; c += kStripe)
            each_part(k, depth, [&](const Term& term, int64_t row, int64_t rows, int64_t d) {
                char* stripe = stripe_ + (c - column) * depth_ * element_;
                if (term.s.packed)
                    decode_and_pack(term.s, row, rows, c, d, stripe);
                else
                    pack_tile(term.s.s, row, rows, c, d, stripe);
            });
        packed_k_ = k;
        packed_column_ = column;
    }

    // Rows [row, row + rows) of a stripe of columns of S, to where row `d` of the packed stripe is.
    void pack_tile(const Matrix& s, int64_t row, int64_t rows, int64_t column, int64_t d, char* stripe) {
        auto* floats = pairs_ ? floats_ : reinterpret_cast<float*>(stripe);
        if (pairs_) k_.pack_stripe(s, row, rows, column, stripe + d * kStripe * element_);
        if (!pairs_ || apart_.inputs) k_.pack_stripe_float(s, row, rows, column, floats + d * kLanes, depth_ * kLanes);
        if (!apart_.outputs) return;
        const Matrix turned{s.data, s.dtype, s.columns, s.rows, s.column_stride, s.row_stride};
        for (int64_t i = 0; i < rows; i += kStripe)
            k_.pack_stripe_float(turned, column, kStripe, row + i, columns_ + (d + i) / kLanes * kTurned, kTurned);
    }

    // Tiles of W, kStripe x kColumns or kColumns x kStripe, are decoded row by row of W and packed from scratch.
    void decode_and_pack(const RightOperand& right, int64_t row, int64_t count, int64_t column, int64_t d,
                         char* stripe) {
        const Matrix& s = right.s;
        const int64_t columns = std::min(kStripe, s.columns - column);
        const int64_t length = right.transposed ? s.rows : s.columns;  // of a row of W
        for (int64_t i = 0; i < count; i += kColumns) {
            const int64_t rows = std::min(kColumns, count - i);
            Matrix tile{decoded_, decoded_dtype_, rows, columns, kStripe, 1};
            if (right.transposed) {
                tile.row_stride = 1;
                tile.column_stride = kColumns;
                k_.decode(*right.packed, right.first + column * length + row + i, length, columns, rows, s.dtype,
                          decoded_, decoded_dtype_, kColumns);
            } else {
                k_.decode(*right.packed, right.first + (row + i) * length + column, length, rows, columns, s.dtype,
                          decoded_, decoded_dtype_, kStripe);
            }
            pack_tile(tile, 0, rows, 0, d + i, stripe);
        }
    }

    // The low-rank part onto the sums of some rows, and the output.
    void finish(int64_t row_begin, int64_t row_end, int64_t offset, int64_t column, int64_t end) {
        if (apart_.outputs) replace_sampled(row_begin, row_end, column);
        if (pairs_) at::native::cpublas::brgemm_release(true);  // expand may need the same tile registers
        for (int64_t m = row_begin; m < row_end; m += kRows)
            for (int64_t c = column; c < end; c += kStripe)
                for (const RankGroup& g : sweep_.groups)
                    expand(g, m, std::min(kRows, row_end - m), c, std::min(kStripe, end - c),
                           (c - column) * kPart + offset + (m - row_begin) * kStripe);
    }

    float* sums(size_t operand) const { return sums_ + operand * together_ * kPart * kStripe; }

    void multiply(size_t operand, int64_t row_begin, int64_t row_end, int64_t offset, int64_t k, int64_t depth,
                  int64_t column, int64_t end) {
        // Rows in powers of two, so that there are few kernels to generate however many the tokens are.
        for (int64_t m = row_begin, rows; m < row_end; m += rows) {
            rows = pairs_ ? std::min<int64_t>(kBlock, std::bit_floor(static_cast<uint64_t>(row_end - m))) : row_end - m;
            for (int64_t c = column; c < end; c += kStripe) {
                const char* stripe = stripe_ + (c - column) * depth_ * element_;
                float* out = sums(operand) + (c - column) * kPart + offset + (m - row_begin) * kStripe;
                const int64_t columns = padded(std::min(kStripe, end - c));
                each_part(k, depth, [&](const Term& term, int64_t row, int64_t count, int64_t d) {
                    const Operand& x = term.x[operand];
                    const bool onto = k + d > 0;
                    if (pairs_)
                        at::native::cpublas::brgemm(rows, columns, count, x.ld, kStripe, kStripe, onto,
                                                    static_cast<const BFloat16*>(x.data) + m * x.ld + row,
                                                    reinterpret_cast<const BFloat16*>(stripe + d * kStripe * element_),
                                                    out, true);
                    else
                        k_.product(static_cast<const float*>(x.data) + m * x.ld + row, x.ld, rows, count,
                                   reinterpret_cast<const float*>(stripe) + d * kLanes, depth_ * kLanes,
                                   columns / kLanes, onto, out, kStripe);
                });
            }
        }
    }

    template <typename F>
    void each_tile(int64_t row_begin, int64_t row_end, F f) {
        for (int64_t m = row_begin; m < row_end; m += kRows)
            f(m, std::min(kRows, row_end - m), (m - row_begin) * kStripe);
    }

    void multiply_dropped(int64_t row_begin, int64_t row_end, int64_t k, int64_t columns) {
        const bool last = k + depth_ >= whole_;
        each_tile(row_begin, row_end, [&](int64_t m, int64_t rows, int64_t offset) {
            k_.product_dropped(apart_.inputs->block(m, k / depth_), rows, floats_, depth_ * kLanes, columns / kLanes,
                               k > 0, last ? sums(0) + offset : nullptr, apart_.factor, sums(1) + offset, kStripe);
        });
    }

    void sample(int64_t row_begin, int64_t row_end, int64_t k, int64_t depth, int64_t column) {
        each_tile(row_begin, row_end, [&](int64_t m, int64_t rows, int64_t offset) {
            k_.product_sampled(apart_.whole + m * whole_ + k, whole_, apart_.outputs->block(m, column / kStripe), rows,
                               depth, columns_, kTurned, k > 0, sums(1) + offset, kStripe);
        });
    }

    void replace_sampled(int64_t row_begin, int64_t row_end, int64_t column) {
        each_tile(row_begin, row_end, [&](int64_t m, int64_t rows, int64_t offset) {
            const SparseBlock dropped = apart_.outputs->block(m, column / kStripe);
            for (int64_t i = 0; i < rows; ++i)
                for (int32_t e = dropped.starts[i * dropped.stride]; e < dropped.starts[i * dropped.stride + 1]; ++e) {
                    const int64_t at = offset + i * kStripe + dropped.columns[e];
                    sums(0)[at] = sums(1)[at];
                }
        });
    }

    // One group onto the sums at `offset`; the last one's result is the output.
    void expand(const RankGroup& g, int64_t m, int64_t rows, int64_t column, int64_t columns, int64_t offset) {
        uint64_t words[kRows * kKeepWords];
        if (g.threshold) k_.keep(g.seed, g.threshold, sweep_.first_row + m, column, rows, columns, words);
        k_.left(sweep_.q + m * sweep_.ranks + g.first_rank, sweep_.ranks, rows, g.ranks, low_rank_pairs_, left_);
        Tail target{.keep = g.threshold ? words : nullptr, .from = {sums(0) + offset, DType::f32, kStripe}};
        if (g.operand) target.second = {sums(g.operand) + offset, DType::f32, kStripe};
        if (g.scale) target.scale = g.scale + column;
        if (g.z) {
            target.z = static_cast<char*>(g.z) + (m * sweep_.columns + column) * (g.z_dtype == DType::f32 ? 4 : 2);
            target.z_dtype = g.z_dtype;
            target.ld_z = sweep_.columns;
        }
        if (&g == &sweep_.groups.back()) {
            target.bias = sweep_.bias ? sweep_.bias + column : nullptr;
            target.y = static_cast<char*>(sweep_.output) +
                       (m * sweep_.ld_output + column) * (sweep_.dtype == DType::f32 ? 4 : 2);
            target.dtype = sweep_.dtype;
            target.ld_y = sweep_.ld_output;
        } else {
            target.y = sums(0) + offset;
            target.ld_y = kStripe;
        }
        const int64_t stride = sweep_.ranks * kLanes;  // elements of a panel's column block
        const auto* panel = static_cast<const char*>(sweep_.panel_out) +
                            (column / kLanes * stride + g.first_rank * kLanes) * (low_rank_pairs_ ? 2 : 4);
        k_.expand(left_, low_rank_pairs_, rows, columns, g.ranks, panel, stride, target);
    }

    const Kernels& k_;
    const Sweep& sweep_;
    const std::vector<Term>& terms_;
    const int64_t whole_;  // of all that is contracted
    const Apart& apart_;
    const bool pairs_, low_rank_pairs_;  // of the product with S, and of the one with the panel
    const DType decoded_dtype_;
    const int64_t element_;   // bytes, of the packed stripe
    const int64_t together_;  // stripes
    char* decoded_ = nullptr;
    float* columns_ = nullptr;  // the stripe turned round, for elements by themselves
    const int64_t depth_;
    float* sums_;
    char *stripe_, *left_;
    float* floats_;  // the stripe in float32
    int64_t packed_k_ = -1, packed_column_ = -1;
};

bool try_kernel() {
    alignas(64) BFloat16 operands[kLanes * kLanes] = {};
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

bool multiplies_pairs(const Kernels& kernels, DType dtype, int64_t depth) {
    if (!kernels.pairs(dtype) || depth % 2 || !at::globalContext().userEnabledMkldnn()) return false;
    static const bool works = try_kernel();
    return works;
}

bool reaches_rows(int64_t ld) { return ld * kBlock * 2 <= std::numeric_limits<int32_t>::max(); }

int64_t depth_of(int64_t rows) { return even_part(rows, kDepthFloat); }

void base_products(const Kernels& kernels, const std::vector<BaseProduct>& products, bool pairs, const Apart& apart) {
    // How a product is cut into tasks, and how many of them a thread takes at a time.
    struct Cut {
        const BaseProduct* product;
        Packing packed;
        int64_t rows, stripes, part = 0, parts = 0, at_once = 0;
        int64_t end = 0;  // of what threads take of it, in order
    };
    const int64_t threads = at::get_num_threads(), busy = kTasksAThread * threads;
    int64_t all = 0, work = 0;
    for (const BaseProduct& p : products) all += ceil_div(p.sweep.columns, kStripe);
    const int64_t most = std::clamp<int64_t>(all / busy, 1, kernels.prefers.stripes_together);
    std::vector<Cut> cuts;
    for (const BaseProduct& p : products) {
        const int64_t rows = p.sweep.rows, depth = p.depth();
        const Packing packed = pairs && !apart ? packing(rows, depth, most) : Packing{1, depth_of(depth)};
        cuts.push_back({&p, packed, rows, ceil_div(ceil_div(p.sweep.columns, kStripe), packed.together)});
        work += rows * cuts.back().stripes;
    }
    std::stable_sort(cuts.begin(), cuts.end(), [](const Cut& a, const Cut& b) { return a.rows > b.rows; });
    const int64_t wanted = ceil_div(work, busy);
    int64_t takes = 0;
    for (Cut& cut : cuts) {
        cut.part = std::clamp(ceil_div(wanted, kBlock) * kBlock, kBlock, kPart);
        cut.parts = ceil_div(cut.rows, cut.part);
        // The parts of a stripe one after the other, so that it is packed once, unless that is too much of the whole.
        cut.at_once = cut.rows <= wanted ? cut.parts : 1;
        takes += cut.parts ? cut.stripes * cut.parts / cut.at_once : 0;
        cut.end = takes;
    }
    // Whichever thread is free goes on, with the longest that is left: a task's result does not depend on the thread
    // that computes it.
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min(threads, takes), 1, [&](int64_t, int64_t) {
        std::optional<Task> task;
        int64_t take = next.fetch_add(1), begin = 0;
        for (const Cut& cut : cuts) {
            if (take < cut.end) task.emplace(kernels, *cut.product, pairs, apart, cut.packed);
            for (; take < cut.end; take = next.fetch_add(1))
                for (int64_t i = (take - begin) * cut.at_once; i < (take - begin + 1) * cut.at_once; ++i) {
                    const int64_t row = i % cut.parts * cut.part;
                    task->run(row, std::min(row + cut.part, cut.rows), i / cut.parts * cut.packed.together * kStripe);
                }
            begin = cut.end;
        }
    });
}

}  // namespace fastpeft::cpu
