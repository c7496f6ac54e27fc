// What every translation unit of fastkd/_C starts with: LibTorch's stable ABI and argument checks.
//
// Only headers under torch/csrc/stable and torch/headeronly are used, and for GEMMs AOTInductor's C shim, whose functions
// are kept compatible for the models it compiled; so one binary serves every torch >= 2.11 and, with Python's limited
// API, every Python >= 3.10.
#pragma once

#include <cstdint>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if !defined(TORCH_TARGET_VERSION)
#error "fastkd builds against a fixed stable ABI: pass -DTORCH_TARGET_VERSION=0x020b000000000000 (torch 2.11)"
#endif

namespace fastkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The public functions have checked shapes and dtypes with better messages already. These checks guard direct calls of
// torch.ops.fastkd.*, where a wrong shape would otherwise read out of bounds.
inline void check_matrix(const Tensor& x, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == columns, "fastkd: ", name, " must be [", rows, ", ",
                  columns, "]");
}

inline void check_vector(const Tensor& x, int64_t rows, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == rows && x.stride(0) == 1, "fastkd: ", name, " must be contiguous [",
                  rows, "]");
  STD_TORCH_CHECK(x.scalar_type() == dtype, "fastkd: ", name, " has the wrong dtype");
}

// What a tensor [rows], or [rows, columns], holds; nullptr where there is none.
template <class T>
T* vector_of(const std::optional<Tensor>& x, int64_t rows, ScalarType dtype, const char* name) {
  if (!x) return nullptr;
  check_vector(*x, rows, dtype, name);
  return static_cast<T*>(x->data_ptr());
}

template <class T>
T* matrix_of(const std::optional<Tensor>& x, int64_t rows, int64_t columns, ScalarType dtype, const char* name) {
  if (!x) return nullptr;
  check_matrix(*x, rows, columns, name);
  STD_TORCH_CHECK(x->is_contiguous() && x->scalar_type() == dtype, "fastkd: ", name,
                  " must be contiguous and of its dtype");
  return static_cast<T*>(x->data_ptr());
}

// Of a function of the C shim. Torch's own macro for it has one name in 2.11 and another since.
inline void check_call(int32_t error, const char* what) {
  STD_TORCH_CHECK(error == 0, "fastkd: torch failed at ", what);
}

}  // namespace fastkd
