// The loops of the row primitive (row_kernel.h) over one block of a row's columns that know no divergence.
//
// Like those that do (row_loops.h) they are plain loops over contiguous floats. Function clones compile each of them for AVX-512, AVX2 and the baseline;
// the loader picks one when the library is loaded.
#pragma once

#include <limits>

#include "clones.h"
#include "row_loops.h"

namespace fastkd {
namespace {

template <class F>
FASTKD_CLONES F block_max(const F* x, int64_t n) {
  F top = -std::numeric_limits<F>::infinity();
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < n; ++j) top = x[j] > top ? x[j] : top;
  return top;
}

template <class F>
struct BlockMaxima {
  F student, teacher;
};

// Of both models, in halves: four maxima under way at a time, where one would wait for itself.
template <class F>
FASTKD_CLONES BlockMaxima<F> block_maxima(const F* s, const F* t, int64_t n) {
  const F lowest = -std::numeric_limits<F>::infinity();
  const int64_t half = n / 2;
  F s_0 = lowest, s_1 = lowest, t_0 = lowest, t_1 = lowest;
#pragma omp simd reduction(max : s_0, s_1, t_0, t_1)
  for (int64_t j = 0; j < half; ++j) {
    s_0 = s[j] > s_0 ? s[j] : s_0;
    s_1 = s[half + j] > s_1 ? s[half + j] : s_1;
    t_0 = t[j] > t_0 ? t[j] : t_0;
    t_1 = t[half + j] > t_1 ? t[half + j] : t_1;
  }
  if (n % 2 != 0) {
    s_0 = s[n - 1] > s_0 ? s[n - 1] : s_0;
    t_0 = t[n - 1] > t_0 ? t[n - 1] : t_0;
  }
  return {s_0 > s_1 ? s_0 : s_1, t_0 > t_1 ? t_0 : t_1};
}

// The column of the first score that is the maximum of its block.
template <class F>
FASTKD_CLONES int64_t block_position(const F* x, int64_t n, F top) {
  int32_t first = kBlock;
#pragma omp simd reduction(min : first)
  for (int32_t j = 0; j < static_cast<int32_t>(n); ++j) {
    const int32_t found = x[j] == top ? j : static_cast<int32_t>(kBlock);
    first = found < first ? found : first;
  }
  return first;
}

template <class F>
FASTKD_CLONES F block_sum(const F* s, int64_t n, F max_s) {
  F sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += exp2_nonpositive((s[j] - max_s) * F(kLog2E));
  return sum;
}

template <class F>
FASTKD_CLONES F block_total(const F* x, int64_t n) {
  F sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += x[j];
  return sum;
}

template <class F>
FASTKD_CLONES void block_softmax(const F* s, F* g, int64_t n, F max_s, F scale) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) g[j] = scale * exp2_nonpositive((s[j] - max_s) * F(kLog2E));
}

template <class F>
FASTKD_CLONES void block_kd_and_softmax(const F* s, const F* kd, F* g, int64_t n, F max_s, F scale) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) g[j] = kd[j] + scale * exp2_nonpositive((s[j] - max_s) * F(kLog2E));
}

}  // namespace
}  // namespace fastkd
