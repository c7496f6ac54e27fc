// The inner loops of the row primitive (row_kernel.h), each over one block of a row's columns.
//
// They are plain loops over contiguous floats. Function clones compile each of them for AVX-512, AVX2 and the baseline;
// the loader picks one when the library is loaded.
#pragma once

#include <limits>

#include "../mix.h"
#include "clones.h"

namespace fastkd {
namespace {

constexpr int64_t kBlock = 1024;  // columns: student, teacher and gradient blocks take 12 KB of fp32 together

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
  for (int32_t j = 0; j < static_cast<int32_t>(n); ++j) first = x[j] == top && j < first ? j : first;
  return first;
}

template <class F>
struct BlockSums {
  F student, teacher, difference;
  F moment;          // of the teacher's, or the only one
  F student_moment;  // beside it, for Moment::kBoth
  F student_1;
  F student_own, teacher_own;  // sum q log q and sum p log p
};

// The exponentials of a row that is one block long, kept from the sums for the gradient: half of a short row's work. For a
// careful forward KL, or a mix with it, `student` is what the student's exceed the teacher's by.
template <class F>
struct Exponentials {
  F student[kBlock], teacher[kBlock];
  bool kept = false;
};

// How the first pass sums up a block: plainly; plainly with an eye on scores of -inf; or to the accuracy of Pair. The
// moment is sum p log(p / q), or sum q log(q / p) for the student's; the careful pass sums up p log(p / q) + q - p
// instead, of second order like the divergence, and its caller takes q - p off again, exactly.
enum class Pass { kPlain, kMasked, kCareful };

// Sums over a block relative to the maxima so far, which `row` holds with sums of 1: probabilities are the plain
// exponentials. kSeparate: also the sum at temperature 1, for a cross-entropy beside a divergence at another one. kMetrics:
// also what the models' entropies take. kKeep: the exponentials are written to `kept`.
template <class F, Moment kMoment, Pass kPass, bool kSeparate, bool kMetrics, bool kKeep>
FASTKD_CLONES BlockSums<F> block_sums(const F* s, const F* t, int64_t n, const RowConstants<F>& row,
                                      Exponentials<F>* kept) {
  F* const kept_student = kKeep ? kept->student : nullptr;
  F* const kept_teacher = kKeep ? kept->teacher : nullptr;
  const RowConstants<F> r = row;
  F student = 0, teacher = 0, difference = 0, moment = 0, student_moment = 0, student_1 = 0;
  F student_own = 0, teacher_own = 0;
#pragma omp simd reduction(+ : student, teacher, difference, moment, student_moment, student_1, student_own, teacher_own)
  for (int64_t j = 0; j < n; ++j) {
    const F top_s = (kPass == Pass::kPlain ? s[j] : unmasked(s[j])) - r.max_s;
    const F top_t = (kPass == Pass::kPlain ? t[j] : unmasked(t[j])) - r.max_t;
    F p, q;
    if constexpr (kPass == Pass::kCareful) {
      const Pair<F> c(s[j], t[j], r);
      p = c.p, q = c.q;
      difference += c.difference;
      moment += kMoment == Moment::kStudent ? c.student_excess() : c.teacher_excess();
      if constexpr (kMoment == Moment::kBoth) student_moment += c.student_excess();
      if constexpr (kKeep) kept_student[j] = kMoment == Moment::kStudent ? c.q : c.difference, kept_teacher[j] = c.p;
    } else {
      q = exp2_nonpositive(top_s * r.log2e_over_tau), p = exp2_nonpositive(top_t * r.log2e_over_tau);
      moment += (kMoment == Moment::kStudent ? -q : p) * (top_t - top_s);
      if constexpr (kMoment == Moment::kBoth) student_moment -= q * (top_t - top_s);
      if constexpr (kKeep) kept_student[j] = q, kept_teacher[j] = p;
    }
    student += q;
    teacher += p;
    if constexpr (kSeparate) student_1 += exp2_nonpositive((s[j] - r.max_s) * F(kLog2E));
    if constexpr (kMetrics) student_own += q * top_s, teacher_own += p * top_t;
  }
  if constexpr (kPass != Pass::kCareful) moment *= r.inv_tau, student_moment *= r.inv_tau;
  student_own *= r.inv_tau, teacher_own *= r.inv_tau;
  return {student, teacher, difference, moment, student_moment, student_1, student_own, teacher_own};
}

template <class F>
FASTKD_CLONES F block_sum(const F* s, int64_t n, F max_s) {
  F sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += exp2_nonpositive((s[j] - max_s) * F(kLog2E));
  return sum;
}

template <class D, class F>
using Constants = typename D::template Constants<F>;

// The sum of gradients.
template <class D, bool kCareful, class F>
FASTKD_CLONES F block_residual(const F* s, const F* t, int64_t n, const RowConstants<F>& row,
                               const Constants<D, F>& constants) {
  const RowConstants<F> r = row;
  const Constants<D, F> b = constants;
  F sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += gradient_of<D, kCareful>(s[j], t[j], b, r);
  return sum;
}

template <class F>
struct BlockValue {
  F value, slope, coslope;
};

template <class D, class F>
FASTKD_CLONES BlockValue<F> block_value(const F* s, const F* t, int64_t n, const RowConstants<F>& row,
                                        const Constants<D, F>& constants) {
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

// g may be s. All three are read and written at the same j only.
template <class D, bool kCareful, class F>
FASTKD_CLONES void block_gradient(const F* s, const F* t, F* g, int64_t n, const RowConstants<F>& row,
                                  const Constants<D, F>& constants, F scale) {
  const RowConstants<F> r = row;
  const Constants<D, F> b = constants;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) g[j] = scale * gradient_of<D, kCareful>(s[j], t[j], b, r);
}

// The same where the exponentials are at hand. surplus: the student's sum of them over the teacher's, minus 1.
template <class D, bool kCareful, class F>
FASTKD_CLONES void block_gradient_kept(const F* s, const F* t, F* g, int64_t n, const RowConstants<F>& row,
                                       const Constants<D, F>& constants, const Exponentials<F>& kept, F surplus,
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
