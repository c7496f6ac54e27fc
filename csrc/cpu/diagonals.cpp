// What attention does along diagonals, on CPUs: a relative-position bias, from its diagonals to a block of scores and back
// from a block's gradient, and causality.
//
// The bias of key j for query i of head a is diagonals[a, clamp(j - i, -reach, reach) + reach], with diagonals
// [A, 2 * reach + 1]. A block [A, R, n] starts at key - query = offset: its element (i, j) is at distance j - i + offset.
// Each row of a block is a constant stretch, a stretch of the diagonals as they lie, and another constant stretch. One
// head goes to one thread, in a fixed order.
#include "../stable.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "clones.h"

namespace fastkd {
namespace {

// Where a row of n columns, the first of them at distance `first`, enters and leaves the diagonals.
struct Stretches {
  int64_t begin, end;   // columns with a diagonal of their own
  int64_t diagonal;     // that of column `begin`
  Stretches(int64_t first, int64_t n, int64_t reach)
      : begin(std::clamp<int64_t>(-reach - first, 0, n)), end(std::clamp<int64_t>(reach - first + 1, begin, n)),
        diagonal(std::clamp<int64_t>(first + begin + reach, 0, 2 * reach + 1)) {}
};

template <class F>
void expand(const F* diagonals, F* block, int64_t rows, int64_t n, int64_t offset, int64_t reach) {
  for (int64_t i = 0; i < rows; ++i) {
    F* row = block + i * n;
    const Stretches at(offset - i, n, reach);
    std::fill(row, row + at.begin, diagonals[0]);
    std::copy(diagonals + at.diagonal, diagonals + at.diagonal + (at.end - at.begin), row + at.begin);
    std::fill(row + at.end, row + n, diagonals[2 * reach]);
  }
}

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

void check_block(const Tensor& block) {
  STD_TORCH_CHECK(block.dim() == 3 && block.is_contiguous(), "fastkd: a block must be contiguous [A, R, n]");
  STD_TORCH_CHECK(block.scalar_type() == ScalarType::Float || block.scalar_type() == ScalarType::Double,
                  "fastkd: a block must be float32 or float64");
}

int64_t check_diagonals(const Tensor& diagonals, const Tensor& block, ScalarType dtype) {
  check_block(block);
  STD_TORCH_CHECK(diagonals.dim() == 2 && diagonals.is_contiguous() && diagonals.size(0) == block.size(0) &&
                      diagonals.size(1) % 2 == 1,
                  "fastkd: diagonals must be contiguous [A, 2 * reach + 1]");
  STD_TORCH_CHECK(diagonals.scalar_type() == dtype, "fastkd: diagonals have the wrong dtype");
  return diagonals.size(1) / 2;
}

// Calls body(head's block, head) for every head.
template <class F, class Body>
void for_heads(const Tensor& block, const Body& body) {
  F* data = static_cast<F*>(block.data_ptr());
  const int64_t size = block.size(1) * block.size(2);
  torch::stable::parallel_for(0, block.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t a = begin; a < end; ++a) body(data + a * size, a);
  });
}

template <class F>
void expand_heads(const Tensor& diagonals, const Tensor& bias, int64_t offset, int64_t reach) {
  const F* data = static_cast<const F*>(diagonals.data_ptr());
  for_heads<F>(bias, [&](F* block, int64_t a) {
    expand(data + a * (2 * reach + 1), block, bias.size(1), bias.size(2), offset, reach);
  });
}

template <class F>
void sum_heads(const Tensor& gradient, const Tensor& sums, int64_t offset, int64_t reach) {
  double* data = static_cast<double*>(sums.data_ptr());
  for_heads<F>(gradient, [&](const F* block, int64_t a) {
    std::vector<F> partial(2 * reach + 1);
    sum(block, data + a * (2 * reach + 1), gradient.size(1), gradient.size(2), offset, reach, partial);
  });
}

// bias [A, R, n] = the diagonals, spread out.
void expand_diagonals_(Tensor diagonals, Tensor bias, int64_t offset) {
  const int64_t reach = check_diagonals(diagonals, bias, bias.scalar_type());
  bias.scalar_type() == ScalarType::Double ? expand_heads<double>(diagonals, bias, offset, reach)
                                           : expand_heads<float>(diagonals, bias, offset, reach);
}

// sums [A, 2 * reach + 1] float64 += the gradient [A, R, n] along its diagonals.
void sum_diagonals_(Tensor gradient, Tensor sums, int64_t offset) {
  const int64_t reach = check_diagonals(sums, gradient, ScalarType::Double);
  gradient.scalar_type() == ScalarType::Double ? sum_heads<double>(gradient, sums, offset, reach)
                                               : sum_heads<float>(gradient, sums, offset, reach);
}

template <class F>
void hide(const Tensor& scores, int64_t offset) {
  const int64_t rows = scores.size(1), n = scores.size(2);
  for_heads<F>(scores, [&](F* block, int64_t) {
    for (int64_t i = 0; i < rows; ++i) {
      F* row = block + i * n;
      std::fill(row + std::clamp<int64_t>(i - offset + 1, 0, n), row + n, -std::numeric_limits<F>::infinity());
    }
  });
}

// scores [A, R, n]: -inf where the key comes after the query.
void hide_later_keys_(Tensor scores, int64_t offset) {
  check_block(scores);
  scores.scalar_type() == ScalarType::Double ? hide<double>(scores, offset) : hide<float>(scores, offset);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("expand_diagonals_", TORCH_BOX(&expand_diagonals_));
  m.impl("sum_diagonals_", TORCH_BOX(&sum_diagonals_));
  m.impl("hide_later_keys_", TORCH_BOX(&hide_later_keys_));
}

}  // namespace fastkd
