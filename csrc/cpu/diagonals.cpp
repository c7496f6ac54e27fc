// The gradient of a relative-position bias on CPUs: the sums of a block of score gradients along its diagonals
// (diagonals.h). One head goes to one thread, in a fixed order.
#include "../stable.h"

#include <vector>

#include "diagonals.h"

namespace fastkd {
namespace {

template <class F>
FASTKD_CLONES F sum_of(const F* x, int64_t n) {
  F sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += x[j];
  return sum;
}

// A block's rows add up in their own precision, blocks in double.
template <class F>
FASTKD_CLONES void sum(const F* block, double* sums, int64_t rows, int64_t n, int64_t offset, int64_t reach, std::vector<F>& partial) {
  std::fill(partial.begin(), partial.end(), F(0));
  double below = 0, above = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const F* row = block + i * n;
    const Stretches at(offset - i, n, reach);
    below += sum_of(row, at.begin);
    above += sum_of(row + at.end, n - at.end);
    F* target = partial.data() + at.diagonal;
    const F* source = row + at.begin;
#pragma omp simd
    for (int64_t j = 0; j < at.end - at.begin; ++j) target[j] += source[j];
  }
  for (size_t d = 0; d < partial.size(); ++d) sums[d] += partial[d];
  sums[0] += below;
  sums[2 * reach] += above;
}

template <class F>
void sum_heads(const Tensor& gradient, const Tensor& sums, int64_t offset) {
  const int64_t rows = gradient.size(1), n = gradient.size(2), reach = sums.size(1) / 2;
  const F* blocks = static_cast<const F*>(gradient.data_ptr());
  double* data = static_cast<double*>(sums.data_ptr());
  torch::stable::parallel_for(0, gradient.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<F> partial(2 * reach + 1);
    for (int64_t a = begin; a < end; ++a) {
      sum(blocks + a * rows * n, data + a * (2 * reach + 1), rows, n, offset, reach, partial);
    }
  });
}

// sums [A, 2 * reach + 1] float64 += the gradient [A, R, n] along its diagonals.
void sum_diagonals_(Tensor gradient, Tensor sums, int64_t offset) {
  STD_TORCH_CHECK(gradient.dim() == 3 && gradient.is_contiguous(), "fastkd: gradient must be contiguous [A, R, n]");
  STD_TORCH_CHECK(gradient.scalar_type() == ScalarType::Float || gradient.scalar_type() == ScalarType::Double,
                  "fastkd: gradient must be float32 or float64");
  STD_TORCH_CHECK(sums.dim() == 2 && sums.is_contiguous() && sums.size(0) == gradient.size(0) && sums.size(1) % 2 == 1 &&
                      sums.scalar_type() == ScalarType::Double,
                  "fastkd: sums must be contiguous float64 [A, 2 * reach + 1]");
  gradient.scalar_type() == ScalarType::Double ? sum_heads<double>(gradient, sums, offset)
                                               : sum_heads<float>(gradient, sums, offset);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("sum_diagonals_", TORCH_BOX(&sum_diagonals_)); }

}  // namespace fastkd
