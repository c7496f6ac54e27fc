// The loops of the row primitive's first pass (row_loops.h).
#include "clones.h"
#include "row_loops.h"

namespace fastkd {
namespace {

// Sums over a block relative to the maxima so far, which `row` holds with sums of 1: probabilities are the plain
// exponentials.
template <class F, Moment kMoment, Pass kPass, bool kMetrics, bool kKeep>
FASTKD_CLONES BlockSums<F> block_sums(const F* s, const F* t, int64_t n, const RowConstants<F>& row,
                                      Exponentials<F>* kept) {
  F* const kept_student = kKeep ? kept->student : nullptr;
  F* const kept_teacher = kKeep ? kept->teacher : nullptr;
  const RowConstants<F> r = row;
  F student = 0, teacher = 0, difference = 0, moment = 0, student_moment = 0, student_own = 0, teacher_own = 0;
#pragma omp simd reduction(+ : student, teacher, difference, moment, student_moment, student_own, teacher_own)
  for (int64_t j = 0; j < n; ++j) {
    const F top_s = (kPass == Pass::kPlain ? s[j] : unmasked(s[j], r.lowest_score)) - r.max_s;
    const F top_t = (kPass == Pass::kPlain ? t[j] : unmasked(t[j], r.lowest_score)) - r.max_t;
    F p, q;
    if constexpr (kPass == Pass::kCareful) {
      const Pair<F> c(s[j], t[j], r);
      p = c.p, q = c.q;
      difference += c.difference;
      moment += kMoment == Moment::kStudent ? c.student_excess() : c.teacher_excess();
      if constexpr (kMoment == Moment::kBoth) student_moment += c.student_excess();
      if constexpr (kKeep) kept_student[j] = kMoment == Moment::kStudent ? c.q : c.difference, kept_teacher[j] = c.p;
    } else {
      q = exp2_nonpositive(top_s * r.log2e_over_tau, r.lowest_exponent);
      p = exp2_nonpositive(top_t * r.log2e_over_tau, r.lowest_exponent);
      moment += (kMoment == Moment::kStudent ? -q : p) * (top_t - top_s);
      if constexpr (kMoment == Moment::kBoth) student_moment -= q * (top_t - top_s);
      if constexpr (kKeep) kept_student[j] = q, kept_teacher[j] = p;
    }
    student += q;
    teacher += p;
    if constexpr (kMetrics) student_own += q * top_s, teacher_own += p * top_t;
  }
  if constexpr (kPass != Pass::kCareful) moment *= r.inv_tau, student_moment *= r.inv_tau;
  student_own *= r.inv_tau, teacher_own *= r.inv_tau;
  return {student, teacher, difference, moment, student_moment, student_own, teacher_own};
}

template <class F, Moment kMoment, Pass kPass>
SumLoop<F> sum_loop(bool metrics, bool keep) {
  if constexpr (kPass != Pass::kPlain) {
    if (keep) return metrics ? &block_sums<F, kMoment, kPass, true, true> : &block_sums<F, kMoment, kPass, false, true>;
  }
  return metrics ? &block_sums<F, kMoment, kPass, true, false> : &block_sums<F, kMoment, kPass, false, false>;
}

template <class F, Moment kMoment>
SumLoop<F> sum_loop(Pass pass, bool metrics, bool keep) {
  switch (pass) {
    case Pass::kPlain: return sum_loop<F, kMoment, Pass::kPlain>(metrics, keep);
    case Pass::kMasked: return sum_loop<F, kMoment, Pass::kMasked>(metrics, keep);
    default: return sum_loop<F, kMoment, Pass::kCareful>(metrics, keep);
  }
}

}  // namespace

template <class F>
SumLoop<F> sum_loop(Moment moment, Pass pass, bool metrics, bool keep) {
  switch (moment) {
    case Moment::kStudent: return sum_loop<F, Moment::kStudent>(pass, metrics, keep);
    case Moment::kBoth: return sum_loop<F, Moment::kBoth>(pass, metrics, keep);
    default: return sum_loop<F, Moment::kTeacher>(pass, metrics, keep);  // kNone: it tells rows that nearly agree
  }
}

template SumLoop<float> sum_loop(Moment, Pass, bool, bool);
template SumLoop<double> sum_loop(Moment, Pass, bool, bool);

}  // namespace fastkd
