// The inner loops of the top-k row primitive (topk_row.h), each over one block of a row's columns: see row_blocks.h.
#pragma once

#include "row_blocks.h"

namespace fastkd {
namespace {

// 2^y for y <= 0 in double, without a branch or a call, so that loops vectorise: relative error 1e-11.
FASTKD_INLINE double wide_exp2_nonpositive(double y) {
  const double kRound = 6755399441055744.0;  // 1.5 * 2^52
  const double clamped = y < -1023.0 ? -1023.0 : y;  // whose scale below is 0; NaN passes
  const double shifted = clamped + kRound;
  const double x = (clamped - (shifted - kRound)) * 0.6931471805599453;
  double poly = 1.0 / 362880;
  poly = poly * x + 1.0 / 40320;
  poly = poly * x + 1.0 / 5040;
  poly = poly * x + 1.0 / 720;
  poly = poly * x + 1.0 / 120;
  poly = poly * x + 1.0 / 24;
  poly = poly * x + 1.0 / 6;
  poly = poly * x + 0.5;
  poly = poly * x + 1.0;
  poly = poly * x + 1.0;
  return poly * bit_cast<double>((bit_cast<int64_t>(shifted) << 52) + 0x3ff0000000000000);
}

// sum 2^((s - max) * log2_scale)
template <class F>
FASTKD_CLONES F block_tail(const F* s, int64_t n, F max, F log2_scale) {
  F sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += exp2_nonpositive((s[j] - max) * log2_scale);
  return sum;
}

// The same with the digits of a double.
template <class F>
FASTKD_CLONES double block_tail_carefully(const F* s, int64_t n, double max, double log2_scale) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += wide_exp2_nonpositive((static_cast<double>(s[j]) - max) * log2_scale);
  return sum;
}

// g = factor * 2^((s - max) * log2_scale); g may be s.
template <class F>
FASTKD_CLONES void block_tail_gradient(const F* s, F* g, int64_t n, F max, F log2_scale, F factor) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) g[j] = factor * exp2_nonpositive((s[j] - max) * log2_scale);
}

// The same, and factor_1 * e^(s - max) besides.
template <class F>
FASTKD_CLONES void block_tail_gradients(const F* s, F* g, int64_t n, F max, F log2_scale, F factor, F factor_1) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const F top = s[j] - max;
    g[j] = factor * exp2_nonpositive(top * log2_scale) + factor_1 * exp2_nonpositive(top * F(kLog2E));
  }
}

}  // namespace
}  // namespace fastkd
