// Scores as a model caps them, s = c tanh(z / c) (Gemma 2), and the slope ds/dz = 1 - (s / c)^2.
//
// The slope is computed of z: near the cap 1 - (s / c)^2 would lack the digits that s has lost. Rows are shared out among
// torch's threads as the row primitive's are, so that a row stays in one core's cache.
#include "../stable.h"

#include <algorithm>
#include <cmath>

#include "../elementary.h"
#include "clones.h"

namespace fastkd {
namespace {

struct Capped {
  float score, slope;
};

// With x = |z / c| and e = exp(-2 x): near 0 by how much tanh x is less than x, and else by how much it is less than 1, so
// that the result is rounded about once. The slope is 4 e / (1 + e)^2; that of NaN is 0: a dropped token counts for
// nothing, and the gradient of any other is NaN itself.
FASTKD_INLINE Capped capped(float z, float cap, float inverse) {
  const float top = std::abs(z), x = top * inverse, u = x * x;
  float poly = 1.7369354410e-3f;  // tanh(x) / x - 1 over x^2, relative error 2e-9 of tanh on [0, 3/4]
  poly = poly * u - 7.6572547873e-3f;
  poly = poly * u + 2.1452033995e-2f;
  poly = poly * u - 5.3892724217e-2f;
  poly = poly * u + 1.3332694080e-1f;
  poly = poly * u - 3.3333315124e-1f;
  const float e = exp_nonpositive(-2 * x).value, share = 1 / (1 + e);
  const float score = x < 0.75f ? top + top * (poly * u) : cap - cap * (2 * e * share);
  return {std::copysign(score, z), z == z ? 4 * e * share * share : 0};
}

FASTKD_CLONES void cap_row(const float* scores, float* out, int64_t n, float cap) {
  const float inverse = 1 / cap;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = capped(scores[j], cap, inverse).score;
}

FASTKD_CLONES void cap_row(const float* scores, float* out, float* slope, int64_t n, float cap) {
  const float inverse = 1 / cap;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const Capped result = capped(scores[j], cap, inverse);
    out[j] = result.score;
    slope[j] = result.slope;
  }
}

void cap_row(const double* scores, double* out, int64_t n, double cap) {
  for (int64_t j = 0; j < n; ++j) out[j] = cap * std::tanh(scores[j] / cap);
}

void cap_row(const double* scores, double* out, double* slope, int64_t n, double cap) {
  for (int64_t j = 0; j < n; ++j) {
    const double score = scores[j], e = std::exp(-2 * std::abs(score / cap));
    out[j] = cap * std::tanh(score / cap);
    slope[j] = score == score ? 4 * e / ((1 + e) * (1 + e)) : 0;
  }
}

void check(const Tensor& x, const Tensor& scores, const char* name) {
  check_matrix(x, scores.size(0), scores.size(1), name);
  STD_TORCH_CHECK(x.scalar_type() == scores.scalar_type(), "fastkd: ", name, " must have the dtype of the scores");
  STD_TORCH_CHECK(x.stride(1) == 1 || x.size(1) == 1, "fastkd: ", name, " must have columns side by side");
}

template <class F>
F* row_of(const Tensor& x, int64_t row) {
  return static_cast<F*>(x.data_ptr()) + row * x.stride(0);
}

template <class F>
void cap_rows(const Tensor& scores, const Tensor& capped, const std::optional<Tensor>& slope, F cap) {
  const int64_t columns = scores.size(1), grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns));
  torch::stable::parallel_for(0, scores.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (slope) {
        cap_row(row_of<F>(scores, row), row_of<F>(capped, row), row_of<F>(*slope, row), columns, cap);
      } else {
        cap_row(row_of<F>(scores, row), row_of<F>(capped, row), columns, cap);
      }
    }
  });
}

// capped [R, V] = cap * tanh(scores / cap), and its derivative; either may be the scores themselves.
void softcap(Tensor scores, Tensor capped, std::optional<Tensor> slope, double cap) {
  STD_TORCH_CHECK(cap > 0, "fastkd: cap must be positive");
  STD_TORCH_CHECK(scores.dim() == 2, "fastkd: scores must be [rows, columns]");
  check(scores, scores, "scores");
  check(capped, scores, "capped");
  if (slope) check(*slope, scores, "slope");
  switch (scores.scalar_type()) {
    case ScalarType::Float: return cap_rows<float>(scores, capped, slope, static_cast<float>(cap));
    case ScalarType::Double: return cap_rows<double>(scores, capped, slope, cap);
    default: STD_TORCH_CHECK(false, "fastkd: scores must be float32 or float64");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("softcap", TORCH_BOX(&softcap)); }

}  // namespace fastkd
