// What the checks of the CPU kernels share: numbers, memory without a byte to spare, and who is right. Each kernel is
// held to what kernels.h says of it, computed here element by element: exactly where nothing is summed, else in double
// precision, with twice the error that float32 arithmetic may make in any order.
#pragma once
#include <cmath>
#include <cstdint>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels/kernels.h"

namespace check {

using namespace fastpeft;
using namespace fastpeft::cpu;

constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f16};
constexpr int64_t kRowCounts[] = {1, 3, 31, 32}, kColumnCounts[] = {1, 7, 63, 100, 255, 256}, kRankCounts[] = {16, 48};

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// ---- numbers ----------------------------------------------------------------------------------------------------

int64_t below(int64_t n);  // a random number of 0 … n - 1

// Infinities and NaN among random numbers: none, but then subnormal ones; a few; many.
enum class Special { none, few, many };
float number(Special special);
inline Special none_or_few() { return below(2) ? Special::few : Special::none; }

float rounded(float v, DType dtype);  // once, to nearest even

// ---- memory -----------------------------------------------------------------------------------------------------

// Ends before a page that must not be touched, or, where AddressSanitizer looks after it, at the heap. All bits are set
// before anyone writes, which makes NaN of every dtype.
class Memory {
  public:
    explicit Memory(int64_t bytes);
    char* data() const { return start_; }
    bool is_untouched(int64_t first, int64_t bytes) const;

  private:
    std::shared_ptr<void> owner_;
    char* start_;
};

class Elements {
  public:
    Elements(DType dtype, int64_t count) : dtype_(dtype), memory_(count * size()) {}
    Elements(DType dtype, int64_t count, Special special) : Elements(dtype, count) {
        for (int64_t i = 0; i < count; ++i) set(i, number(special));
    }
    float operator[](int64_t i) const;
    void set(int64_t i, float v);  // rounded
    void* at(int64_t i = 0) const { return memory_.data() + i * size(); }
    float* floats() const { return static_cast<float*>(at()); }
    DType dtype() const { return dtype_; }
    bool is_untouched(int64_t first, int64_t count) const {
        return memory_.is_untouched(first * size(), count * size());
    }

  private:
    int64_t size() const { return dtype_ == DType::f32 ? 4 : 2; }
    DType dtype_;
    Memory memory_;
};

template <typename T>
class Array {
  public:
    explicit Array(int64_t count) : memory_(count * static_cast<int64_t>(sizeof(T))) {}
    T* data() const { return reinterpret_cast<T*>(memory_.data()); }
    T& operator[](int64_t i) const { return data()[i]; }

  private:
    Memory memory_;
};

// Rows of elements with a gap of NaN between them.
struct Rows {
    Rows(DType dtype, int64_t rows, int64_t columns, Special special, int64_t gap = 3);
    Rows(DType dtype, int64_t rows, int64_t columns, int64_t gap = 3)  // NaN
        : rows(rows), columns(columns), ld(columns + gap), elements(dtype, (rows - 1) * ld + columns) {}
    float operator()(int64_t row, int64_t column) const { return elements[row * ld + column]; }
    Rows copy() const;
    Tile tile() const { return {elements.at(), elements.dtype(), ld}; }

    int64_t rows, columns, ld;
    Elements elements;
};

// A matrix whose rows, or whose columns, are contiguous.
struct Source {
    Source(DType dtype, int64_t rows, int64_t columns, bool transposed, Special special)
        : stored(dtype, transposed ? columns : rows, transposed ? rows : columns, special), transposed(transposed) {}
    float operator()(int64_t row, int64_t column) const {
        return transposed ? stored(column, row) : stored(row, column);
    }
    Matrix matrix() const {
        if (transposed)
            return {stored.elements.at(), stored.elements.dtype(), stored.columns, stored.rows, 1, stored.ld};
        return {stored.elements.at(), stored.elements.dtype(), stored.rows, stored.columns, stored.ld, 1};
    }
    float or_zero(int64_t row, int64_t column) const {  // beyond the edges
        const Matrix m = matrix();
        return row < m.rows && column < m.columns ? (*this)(row, column) : 0.0f;
    }

    Rows stored;
    bool transposed;
};

// ---- who is right -----------------------------------------------------------------------------------------------

constexpr double kSmallestNormal = 0x1p-126;  // of float32 and of bfloat16

// A sum of products, and what bounds its error.
struct Sum {
    void add(double a, double b = 1.0) {
        const double product = a * b, magnitude = std::abs(product);
        value += product;
        size += magnitude;
        if (std::abs(a) <= kSmallestNormal || std::abs(b) <= kSmallestNormal) subnormal += magnitude;
    }
    Sum times(double factor) const;
    double value = 0;
    double size = 0;       // the sum of the absolute values
    double subnormal = 0;  // the part of the size that has a subnormal factor
    double grain = 1;      // by how much roundings among subnormal numbers were enlarged
};

const char* name(DType dtype);

extern thread_local std::string place;  // what is being checked, told when something is wrong
template <typename... Parts>
void now(const Parts&... parts) {
    std::ostringstream told;
    ((told << ' ' << parts), ...);
    place = told.str();
}

void expect(bool right, const char* what);
// Equal bit by bit, all NaN being equal; where `rounds` to bfloat16, an instruction set with products of pairs may
// have 0 in place of a subnormal number.
void expect_same(int64_t row, int64_t column, float expected, float got, bool rounds = false);
// Within twice the error of a float32 sum with so many roundings one after the other, then rounded to dtype.
void expect_sum(int64_t row, int64_t column, const Sum& exact, int64_t roundings, float got, DType dtype = DType::f32);
// Nothing was written between rows of an output.
void expect_gaps(const Rows& out);

// ---- the checks, each of some members of a table ------------------------------------------------------------------

void check_skinny(const Kernels& k);
void check_base_product(const Kernels& k);
void check_dots(const Kernels& k);

}  // namespace check
