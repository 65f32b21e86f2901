// An order of 64 elements: where those that follow each other stood before.
#pragma once
#include <cstdint>

namespace fastpeft::cpu {

struct Order64 {
    uint8_t at[64];
};

template <typename F>
constexpr Order64 order_of_64(F stood_at) {
    Order64 order{};
    for (int i = 0; i < 64; ++i) order.at[i] = static_cast<uint8_t>(stood_at(i));
    return order;
}

constexpr Order64 kEvenThenOdd = order_of_64([](int i) { return i % 32 * 2 + i / 32; });

}  // namespace fastpeft::cpu
