// Tensors of any float dtype and stride, read and written as rows of one precision.
#pragma once

#include <algorithm>

#include "../stable.h"

namespace fastkd {
namespace {

inline bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

inline void check_scores(const std::optional<Tensor>& x, int64_t rows, int64_t columns, const char* name) {
  if (!x) return;
  check_matrix(*x, rows, columns, name);
  STD_TORCH_CHECK(is_float(x->scalar_type()), "fastkd: ", name, " must be of a floating dtype");
}

template <class F>
constexpr ScalarType kScalarType = sizeof(F) == 4 ? ScalarType::Float : ScalarType::Double;

// A [rows, columns] tensor of any float dtype and stride, read and written a part of a row at a time in precision F.
template <class F>
struct Matrix {
  char* data;
  ScalarType dtype;
  int64_t row_stride, column_stride;
  bool direct;  // rows can be used where they lie

  Matrix(void* data, ScalarType dtype, int64_t row_stride, int64_t column_stride)
      : data(static_cast<char*>(data)), dtype(dtype), row_stride(row_stride), column_stride(column_stride),
        direct(column_stride == 1 && dtype == kScalarType<F>) {}

  explicit Matrix(const Tensor& x) : Matrix(x.data_ptr(), x.scalar_type(), x.stride(0), x.stride(1)) {}

  template <class T>
  T* at(int64_t row, int64_t column) const {
    return reinterpret_cast<T*>(data) + row * row_stride + column * column_stride;
  }

  template <class T>
  void gather(int64_t row, int64_t column, int64_t n, F* out) const {
    const T* x = at<const T>(row, column);
    for (int64_t j = 0; j < n; ++j) out[j] = static_cast<F>(x[j * column_stride]);
  }

  template <class T>
  void scatter(int64_t row, int64_t column, int64_t n, const F* in) const {
    T* x = at<T>(row, column);
    for (int64_t j = 0; j < n; ++j) x[j * column_stride] = static_cast<T>(in[j]);
  }

  const F* read(int64_t row, int64_t column, int64_t n, F* buffer) const {
    if (direct) return at<const F>(row, column);
    switch (dtype) {
      case ScalarType::Double: gather<double>(row, column, n, buffer); break;
      case ScalarType::Float: gather<float>(row, column, n, buffer); break;
      case ScalarType::Half: gather<torch::headeronly::Half>(row, column, n, buffer); break;
      default: gather<torch::headeronly::BFloat16>(row, column, n, buffer); break;
    }
    return buffer;
  }

  // Where to put results: in place if possible, else in the buffer, which `write` then stores.
  F* target(int64_t row, int64_t column, F* buffer) const { return direct ? at<F>(row, column) : buffer; }

  void write(int64_t row, int64_t column, int64_t n, const F* buffer) const {
    if (direct) return;
    switch (dtype) {
      case ScalarType::Double: scatter<double>(row, column, n, buffer); break;
      case ScalarType::Float: scatter<float>(row, column, n, buffer); break;
      case ScalarType::Half: scatter<torch::headeronly::Half>(row, column, n, buffer); break;
      default: scatter<torch::headeronly::BFloat16>(row, column, n, buffer); break;
    }
  }

  // Asks for columns ahead of their turn: the processor's own prefetching stops where a page of memory ends.
  void prefetch(int64_t row, int64_t begin, int64_t end) const {
    if (!direct) return;
    for (int64_t j = begin; j < end; j += 64 / static_cast<int64_t>(sizeof(F))) __builtin_prefetch(at<F>(row, j), 0, 2);
  }

  F element(int64_t row, int64_t column) const {
    F x;
    return *read(row, column, 1, &x);
  }
};

}  // namespace
}  // namespace fastkd
