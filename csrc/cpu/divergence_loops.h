// The loops of the row primitive's later passes (row_loops.h) as templates, for the translation units that compile them:
// loops_*.cpp, of which each has a few divergences, so that they compile side by side.
#pragma once

#include "clones.h"
#include "row_loops.h"

namespace fastkd {
namespace {

template <class D, class F>
using Constants = typename D::template Constants<F>;

template <class D, class F>
FASTKD_CLONES BlockValue<F> block_value(const F* s, const F* t, int64_t n, const RowConstants<F>& row,
                                        const AllConstants<F>& constants) {
  const RowConstants<F> r = row;
  const Constants<D, F> b = constants;
  F value = 0, slope = 0, coslope = 0;
#pragma omp simd reduction(+ : value, slope, coslope)
  for (int64_t j = 0; j < n; ++j) {
    const Pair<F> column(s[j], t[j], r);
    value += D::value(column, b);
    slope += D::slope(column, b);
    coslope += D::coslope(column, b);
  }
  return {value, slope, coslope};
}

template <class D, bool kCareful, class F>
FASTKD_CLONES void block_gradient(const F* s, const F* t, F* g, int64_t n, const RowConstants<F>& row,
                                  const AllConstants<F>& constants, F scale) {
  const RowConstants<F> r = row;
  const Constants<D, F> b = constants;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) g[j] = scale * gradient_of<D, kCareful>(s[j], t[j], b, r);
}

template <class D, bool kCareful, class F>
FASTKD_CLONES void block_gradient_kept(const F* s, const F* t, F* g, int64_t n, const RowConstants<F>& row,
                                       const AllConstants<F>& constants, const Exponentials<F>& kept, F surplus,
                                       F scale) {
  const RowConstants<F> r = row;
  const Constants<D, F> b = constants;
  const F* const student = kept.student;
  const F* const teacher = kept.teacher;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    if constexpr (D::kMoment == Moment::kBoth) {
      const F p = teacher[j] * (kCareful ? r.inv_sum_s : r.inv_sum_t);
      const F difference = student[j] * r.inv_sum_s - (kCareful ? surplus * p : p);
      const F q = kCareful ? student[j] * r.inv_sum_s + p : student[j] * r.inv_sum_s;
      g[j] = scale * D::gradient_of_difference(difference, q, s[j], t[j], b, r);
    } else if constexpr (kCareful && D::kMoment == Moment::kTeacher) {
      g[j] = scale * ((student[j] - surplus * teacher[j]) * r.inv_sum_s);
    } else {
      g[j] = scale * D::gradient_of_probabilities(student[j] * r.inv_sum_s, teacher[j] * r.inv_sum_t, s[j], t[j], r);
    }
  }
}

}  // namespace

template <class D, class F>
Loops<F> loops() {
  Loops<F> of{D::kMoment, nullptr, {&block_gradient<D, false, F>, &block_gradient<D, true, F>}, {}};
  if constexpr (D::kMoment == Moment::kNone || D::kMoment == Moment::kBoth) of.value = &block_value<D, F>;
  if constexpr (D::kMoment != Moment::kNone) {
    of.gradient_kept[0] = &block_gradient_kept<D, false, F>;
    of.gradient_kept[1] = &block_gradient_kept<D, true, F>;
  }
  return of;
}

}  // namespace fastkd
