// What attention does along diagonals of a head's scores [R, n], in which element (i, j) is at distance j - i + offset,
// key position less query position.
//
// A relative-position bias is given by its diagonals, [2 * reach + 1] for each head: that of distance d is element
// clamp(d, -reach, reach) + reach. A row of scores meets it in three stretches: the first element over and over, the
// elements as they lie, and the last over and over.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "clones.h"

namespace fastkd {

// Where a row of n columns, the first of them at distance `first`, enters and leaves the diagonals.
struct Stretches {
  int64_t begin, end;  // columns with a diagonal of their own
  int64_t diagonal;    // that of column `begin`
  Stretches(int64_t first, int64_t n, int64_t reach)
      : begin(std::clamp<int64_t>(-reach - first, 0, n)), end(std::clamp<int64_t>(reach - first + 1, begin, n)),
        diagonal(std::clamp<int64_t>(first + begin + reach, 0, 2 * reach + 1)) {}
};

template <class F>
FASTKD_CLONES void add_bias(F* row, const F* diagonals, int64_t n, int64_t first, int64_t reach) {
  const Stretches at(first, n, reach);
  const F below = diagonals[0], above = diagonals[2 * reach];
  const F* own = diagonals + at.diagonal;
  F* middle = row + at.begin;
#pragma omp simd
  for (int64_t j = 0; j < at.begin; ++j) row[j] += below;
#pragma omp simd
  for (int64_t j = 0; j < at.end - at.begin; ++j) middle[j] += own[j];
#pragma omp simd
  for (int64_t j = at.end; j < n; ++j) row[j] += above;
}

// sums [2 * reach + 1] += a gradient [R, n] along its diagonals. Its rows add up in their own precision, in `partial`,
// which is as long; blocks add up in double.
template <class F>
FASTKD_CLONES void sum_diagonals(const F* gradient, double* sums, int64_t rows, int64_t n, int64_t offset,
                                 int64_t reach, F* partial) {
  std::fill(partial, partial + 2 * reach + 1, F(0));
  double below = 0, above = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const F* row = gradient + i * n;
    const Stretches at(offset - i, n, reach);
    F before = 0, after = 0;
#pragma omp simd reduction(+ : before)
    for (int64_t j = 0; j < at.begin; ++j) before += row[j];
    F* target = partial + at.diagonal;
    const F* source = row + at.begin;
#pragma omp simd
    for (int64_t j = 0; j < at.end - at.begin; ++j) target[j] += source[j];
#pragma omp simd reduction(+ : after)
    for (int64_t j = at.end; j < n; ++j) after += row[j];
    below += before;
    above += after;
  }
  for (int64_t d = 0; d < 2 * reach + 1; ++d) sums[d] += partial[d];
  sums[0] += below;
  sums[2 * reach] += above;
}

// -inf where the key comes after the query.
template <class F>
void hide_later_keys(F* row, int64_t n, int64_t first) {
  std::fill(row + std::clamp<int64_t>(1 - first, 0, n), row + n, -std::numeric_limits<F>::infinity());
}

}  // namespace fastkd
