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

// -inf where the key comes after the query.
template <class F>
void hide_later_keys(F* row, int64_t n, int64_t first) {
  std::fill(row + std::clamp<int64_t>(1 - first, 0, n), row + n, -std::numeric_limits<F>::infinity());
}

}  // namespace fastkd
