// From torch's tensors to what kernels take (matrix.h), and back, on any device.
#pragma once
#include "call.h"

namespace fastpeft {

DType dtype_of(at::ScalarType dtype);  // raises where no kernel computes in it
DType dtype_of(const at::Tensor& t);
Matrix matrix(const at::Tensor& t);
Matrix matrix(const at::Tensor& stack, int64_t i);  // stack[i], without a tensor for it
FourBit four_bit(const Weight& weight);
at::Tensor flat_rows(const at::Tensor& t);  // [..., C] as [M, C] with contiguous rows; a copy where a view cannot be
at::Tensor with_leading_shape_of(const at::Tensor& like, const at::Tensor& rows);  // the way back
int64_t dropout_threshold(double p);      // p in steps of 2^-16, see fastpeft/dropout.py
double dropout_scale(int64_t threshold);  // what kept elements count

}  // namespace fastpeft
