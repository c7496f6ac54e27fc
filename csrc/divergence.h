// The divergence mathematics, written once for host and device.
//
// Two score rows s (student) and t (teacher) give q = softmax(s / tau) and p = softmax(t / tau). Every divergence D has
//
//     dD/ds_j = q_j (u_j - mean) / tau,     u = dD/dq,     mean = sum_k q_k u_k.
//
// A constant added to u cancels, so each u below is shifted to vanish where p = q. That is what keeps gradients exact
// for a student that has nearly converged: nothing is the small difference of two large numbers.
//
// The same care is taken with p and q themselves, in a row whose models nearly agree. There log(p / q) is computed from
// t - s and not from p and q; the larger of the two is one exponential and the other follows from e^-|log(p / q)| - 1, so
// that q - p keeps its relative accuracy when p and q agree to six digits.
#pragma once

#include "elementary.h"

namespace fastkd {

// The order is that of fastkd.divergence.DIVERGENCES.
enum class Divergence : int64_t { kForwardKL, kReverseKL, kJSD, kSkewKL, kSkewReverseKL, kTVD };
constexpr int64_t kDivergences = 6;
// Codes from here on are those of mixes, weighted sums of the above: a bit for each member.
constexpr int64_t kMix = 64;

// ---- one row --------------------------------------------------------------------------------------------------------

// Divergence, in nats, under which a row is computed with care. At 0.1 probabilities differ by some 40 %, so the plain
// difference of two that are each good to 1e-7 is still good to 1e-6.
constexpr double kNearlyEqual = 0.1;
// Divergence over which the mean of log(q / p) is refined: one so large is summed up with an error of its own last digit.
constexpr double kFarApart = 16;
// The label of a row that is a shard of a longer one, in another shard of which the label lies.
constexpr int64_t kElsewhere = INT64_MIN;

// What the gradient of a row needs, in fp64: kept between forward and backward as one line of `stats` [rows, 7].
struct RowStats {
  double max_s, sum_s;  // max_j s_j, sum_j e^((s_j - max_s) / tau)
  double max_t, sum_t;
  double mean;     // sum_j q_j u_j; of a saturated row minus sum_j q_j v_j (see the family below)
  double careful;  // 1 where the gradient takes its second form: the models nearly agree, or the row is saturated
  double sum_1;    // sum_j e^(s_j - max_s): the cross-entropy's, at temperature 1
  static constexpr int64_t kCount = 7;

  // log(Z_t) - log(Z_s) in units of score, that is times tau: t - s less this is tau log(p / q).
  FASTKD_INLINE double shift(double tau) const { return (max_t - max_s) - tau * std::log(sum_s / sum_t); }
  // A row of nothing but -inf has no distribution: it counts as masked, with loss and gradient 0.
  FASTKD_INLINE bool empty() const { return sum_s == 0 || sum_t == 0; }
};

constexpr double kLowestScore = -1e30;  // see unmasked

// The same, in the working precision, ready for the inner loop.
template <class F>
struct RowConstants {
  F max_s, inv_sum_s, max_t, inv_sum_t, inv_tau, log2e_over_tau;
  Split<F> shift, centred_shift;  // the second also subtracts `mean`, for u = -log(p / q)
  F mean;
  // The least of scores and exponents. As data: GCC 12 makes one instruction of a clamp to it, of one to a constant three.
  F lowest_score = F(kLowestScore), lowest_exponent = F(kLowestExponent);

  FASTKD_INLINE RowConstants(const RowStats& row, double tau, double mean_unit = 1)
      : max_s(static_cast<F>(row.max_s)), inv_sum_s(static_cast<F>(1 / row.sum_s)), max_t(static_cast<F>(row.max_t)),
        inv_sum_t(static_cast<F>(1 / row.sum_t)), inv_tau(static_cast<F>(1 / tau)),
        log2e_over_tau(static_cast<F>(kLog2E / tau)), shift(row.shift(tau)),
        centred_shift(row.shift(tau) - tau * row.mean / mean_unit), mean(static_cast<F>(row.mean)) {}
};

// What a divergence takes beside the scores: beta, and of a mix the weight of each.
struct Shape {
  double beta;
  double weights[kDivergences] = {};

  double weight(Divergence divergence) const { return weights[static_cast<int64_t>(divergence)]; }
  // What log(q / p) is multiplied with in u, where the mean of u is subtracted inside it.
  double mean_unit() const {
    const double reverse = weight(Divergence::kReverseKL);
    return reverse == 0 ? 1 : reverse;
  }
};

// beta and what the mixtures need of it.
template <class F>
struct Beta {
  F beta, rest;          // rest = 1 - beta
  F log_beta, log_rest;  // their logarithms
  FASTKD_INLINE explicit Beta(double b)
      : beta(static_cast<F>(b)), rest(static_cast<F>(1 - b)), log_beta(static_cast<F>(std::log(b))),
        log_rest(static_cast<F>(std::log1p(-b))) {}
  FASTKD_INLINE explicit Beta(const Shape& shape) : Beta(shape.beta) {}
};

// ---- one column -----------------------------------------------------------------------------------------------------

// Scores of -inf are masked columns. They are worked on as a very low number, so that differences stay finite and a
// probability of zero makes products of zero; a divergence beyond what that number allows is reported as infinite.
template <class F>
FASTKD_INLINE F unmasked(F score, F lowest = F(kLowestScore)) {
#if defined(__CUDA_ARCH__)
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(score) : "f"(score), "f"(lowest));  // one instruction, of floats alone here
  return score;
#else
  return score < lowest ? lowest : score;  // NaN passes
#endif
}

// The maximum as it is subtracted inside exponentials: of a row so far all -inf it must not make -inf - -inf.
template <class F>
FASTKD_INLINE F finite(F max) {
  return max == F(-INFINITY) ? F(0) : max;
}

constexpr double kInfinite = 1e20;  // divergences over it come from a masked column

FASTKD_INLINE double with_infinity(double divergence) {
  return divergence > kInfinite ? static_cast<double>(INFINITY) : divergence;
}

template <class F>
FASTKD_INLINE F student_probability(F s, const RowConstants<F>& row) {
  return exp2_nonpositive((s - row.max_s) * row.log2e_over_tau) * row.inv_sum_s;
}

template <class F>
FASTKD_INLINE F teacher_probability(F t, const RowConstants<F>& row) {
  return exp2_nonpositive((t - row.max_t) * row.log2e_over_tau) * row.inv_sum_t;
}

// (t - s - shift) / tau, with what rounding takes from t - s (Knuth's two-sum) put back.
template <class F>
FASTKD_INLINE F shifted_ratio(F s, F t, const Split<F>& shift, F inv_tau) {
  const F d = t - s;
  const F back = d - t;
  const F lost = (t - (d - back)) - (s + back);
  return ((d - shift.high) + (lost - shift.low)) * inv_tau;
}

// Both probabilities, and how they differ, to full relative accuracy.
template <class F>
struct Pair {
  F p, q;
  F difference;  // q - p
  F log_ratio;   // log(p / q)
  F ratio;       // the smaller of p and q over the larger
  F ratio_minus1;
  F tail;  // ratio_minus1 - log(ratio), small of second order where p and q agree
  F larger;
  bool teacher_larger;

  FASTKD_INLINE Pair(F student, F teacher, const RowConstants<F>& row) {
    const F s = unmasked(student), t = unmasked(teacher);
    log_ratio = shifted_ratio(s, t, row.shift, row.inv_tau);
    teacher_larger = log_ratio >= F(0);
    const Exp<F> exponential = exp_nonpositive(-std::abs(log_ratio));
    ratio = exponential.value;
    ratio_minus1 = exponential.minus1;
    tail = exponential.tail;
    const F top = teacher_larger ? t - row.max_t : s - row.max_s;
    larger = exp2_nonpositive(top * row.log2e_over_tau) * (teacher_larger ? row.inv_sum_t : row.inv_sum_s);
    const F smaller = larger * ratio;
    const F gap = larger * ratio_minus1;
    p = teacher_larger ? larger : smaller;
    q = teacher_larger ? smaller : larger;
    difference = teacher_larger ? gap : -gap;
  }

  // p log(p / q) + q - p and q log(q / p) + p - q: never negative, and free of cancellation where p and q agree.
  FASTKD_INLINE F teacher_excess() const { return larger * (teacher_larger ? tail : excess_of_smaller()); }
  FASTKD_INLINE F student_excess() const { return larger * (teacher_larger ? excess_of_smaller() : tail); }

 private:
  // x e^x + 1 - e^x for x = -|log(p / q)|, in the form that has no large terms to cancel.
  FASTKD_INLINE F excess_of_smaller() const {
    const F x = -std::abs(log_ratio);
    return x > F(-1) ? x * ratio_minus1 - tail : x * ratio - ratio_minus1;
  }
};

// ---- the family -----------------------------------------------------------------------------------------------------

// Which running moment beside the sums of exponentials gives D and the mean of u without a second look at the row.
enum class Moment { kNone, kTeacher, kStudent, kBoth };

// D, of its moment and the sums of exponentials, all relative to the maxima: of sum p log(p / q), or of sum q log(q / p).
FASTKD_INLINE double divergence_of(bool by_student, double moment, double sum_s, double sum_t) {
  const double log_sums = std::log(sum_s / sum_t);
  return by_student ? moment / sum_s - log_sums : moment / sum_t + log_sums;
}

// What each member has, beside what its part of the gradient is made of.
struct Member {
  template <class F>
  using Constants = Beta<F>;
};

// D = sum p log(p / q);  u = 1 - p / q, of mean 0
struct ForwardKL : Member {
  static constexpr Moment kMoment = Moment::kTeacher;
  template <bool kCareful, class F>
  static FASTKD_INLINE F gradient(F s, F t, const RowConstants<F>& row) {
    if constexpr (kCareful) {
      return Pair<F>(s, t, row).difference;
    } else {
      return gradient_of_probabilities(student_probability(s, row), teacher_probability(t, row), s, t, row);
    }
  }
  template <class F>
  static FASTKD_INLINE F gradient_of_probabilities(F q, F p, F, F, const RowConstants<F>&) {
    return q - p;
  }
};

// D = sum q log(q / p);  u = log(q / p), of mean D
struct ReverseKL : Member {
  static constexpr Moment kMoment = Moment::kStudent;
  template <bool kCareful, class F>
  static FASTKD_INLINE F gradient(F s, F t, const RowConstants<F>& row) {
    return gradient_of_probabilities(student_probability(s, row), F(0), s, t, row);
  }
  template <class F>
  static FASTKD_INLINE F gradient_of_probabilities(F q, F, F s, F t, const RowConstants<F>& row) {
    return q * -shifted_ratio(unmasked(s), unmasked(t), row.centred_shift, row.inv_tau);
  }
};

// The other four are bounded, so they saturate: where p << q, u approaches a constant, and in a row whose models
// disagree everywhere q (u - mean) is the small difference of numbers close to it. Each member therefore gives u in two
// forms, and each row uses the one of smaller mean:
//
//     slope   q u,  u = 0 where p = q         coslope   q v,  v = (limit of u) - u, v = 0 where p << q
//
// `value` is a column's share of D, to which m - p and m - q (zero over a row) are added: that makes every share positive
// and of second order where the models agree, like D itself.

// m = a p + (1 - a) q
template <class F>
struct Mixture {
  F m;
  F log_q_over_m;
  F log_m_over_limit;                // log(m / ((1 - a) q)), small where p << q
  F teacher_excess, student_excess;  // p log(p / m) + m - p and q log(q / m) + m - q

  FASTKD_INLINE Mixture(const Pair<F>& c, F a, F rest, F log_rest) {
    m = a * c.p + rest * c.q;
    const F w = (c.teacher_larger ? rest : a) * c.ratio_minus1;  // m over the larger of p and q, minus 1
    const Log1p<F> log_m_over_larger = log_1p(w);
    log_q_over_m = (c.teacher_larger ? -c.log_ratio : F(0)) - log_m_over_larger.value;
    log_m_over_limit = c.teacher_larger ? -log_q_over_m - log_rest : log_1p(a / rest * c.ratio).value;
    const F of_larger = c.larger * log_m_over_larger.tail;
    const F of_smaller = c.larger * (c.ratio_minus1 * (c.ratio_minus1 - w) - c.ratio * (c.tail - log_m_over_larger.tail));
    teacher_excess = c.teacher_larger ? of_larger : of_smaller;
    student_excess = c.teacher_larger ? of_smaller : of_larger;
  }
};

template <class F>
FASTKD_INLINE F share(F numerator, F denominator) {
  return denominator > F(0) ? numerator / denominator : F(0);
}

// D = beta sum p log(p / m) + (1 - beta) sum q log(q / m), m = beta p + (1 - beta) q;  u = (1 - beta) log(q / m)
struct JSD : Member {
  static constexpr Moment kMoment = Moment::kNone;
  template <class F>
  static FASTKD_INLINE Mixture<F> mixture(const Pair<F>& c, const Beta<F>& b) {
    return {c, b.beta, b.rest, b.log_rest};
  }
  template <class F>
  static FASTKD_INLINE F value(const Pair<F>& c, const Beta<F>& b) {
    const Mixture<F> mix = mixture(c, b);
    return b.beta * mix.teacher_excess + b.rest * mix.student_excess;
  }
  template <class F>
  static FASTKD_INLINE F slope(const Pair<F>& c, const Beta<F>& b) {
    return b.rest * c.q * mixture(c, b).log_q_over_m;
  }
  template <class F>
  static FASTKD_INLINE F coslope(const Pair<F>& c, const Beta<F>& b) {
    return b.rest * c.q * mixture(c, b).log_m_over_limit;
  }
};

// D = sum p log(p / m), m = beta p + (1 - beta) q;  u = (1 - beta)^2 (q - p) / m
struct SkewKL : Member {
  static constexpr Moment kMoment = Moment::kNone;
  template <class F>
  static FASTKD_INLINE F value(const Pair<F>& c, const Beta<F>& b) {
    return Mixture<F>(c, b.beta, b.rest, b.log_rest).teacher_excess;
  }
  template <class F>
  static FASTKD_INLINE F slope(const Pair<F>& c, const Beta<F>& b) {
    return b.rest * b.rest * c.difference * share(c.q, b.beta * c.p + b.rest * c.q);
  }
  template <class F>
  static FASTKD_INLINE F coslope(const Pair<F>& c, const Beta<F>& b) {
    return b.rest * c.p * share(c.q, b.beta * c.p + b.rest * c.q);
  }
};

// D = sum q log(q / m), m = (1 - beta) p + beta q;  u = log(q / m) - beta (1 - beta) (q - p) / m
struct SkewReverseKL : Member {
  static constexpr Moment kMoment = Moment::kNone;
  template <class F>
  static FASTKD_INLINE Mixture<F> mixture(const Pair<F>& c, const Beta<F>& b) {
    return {c, b.rest, b.beta, b.log_beta};
  }
  template <class F>
  static FASTKD_INLINE F value(const Pair<F>& c, const Beta<F>& b) {
    return mixture(c, b).student_excess;
  }
  template <class F>
  static FASTKD_INLINE F slope(const Pair<F>& c, const Beta<F>& b) {
    const Mixture<F> mix = mixture(c, b);
    return c.q * mix.log_q_over_m - b.beta * b.rest * c.difference * share(c.q, mix.m);
  }
  template <class F>
  static FASTKD_INLINE F coslope(const Pair<F>& c, const Beta<F>& b) {
    const Mixture<F> mix = mixture(c, b);
    return c.q * mix.log_m_over_limit - b.rest * c.p * share(c.q, mix.m);
  }
};

// D = 1/2 sum |p - q|;  u = 1/2 sign(q - p)
struct TVD : Member {
  static constexpr Moment kMoment = Moment::kNone;
  template <class F>
  static FASTKD_INLINE F value(const Pair<F>& c, const auto&) {
    return F(0.5) * std::abs(c.difference);
  }
  template <class F>
  static FASTKD_INLINE F slope(const Pair<F>& c, const auto&) {
    return c.difference > F(0) ? F(0.5) * c.q : (c.difference < F(0) ? F(-0.5) * c.q : c.difference);  // 0 or NaN
  }
  template <class F>
  static FASTKD_INLINE F coslope(const Pair<F>& c, const auto&) {
    return c.difference > F(0) ? F(0) : (c.difference < F(0) ? c.q : F(0.5) * c.q + c.difference);
  }
};

// run(D()) of the divergence that has this code.
template <class Run>
auto with_divergence(int64_t code, const Run& run) {
  switch (static_cast<Divergence>(code)) {
    case Divergence::kForwardKL: return run(ForwardKL());
    case Divergence::kReverseKL: return run(ReverseKL());
    case Divergence::kJSD: return run(JSD());
    case Divergence::kSkewKL: return run(SkewKL());
    case Divergence::kSkewReverseKL: return run(SkewReverseKL());
    default: return run(TVD());
  }
}

// q (u - mean): tau times the gradient of D in s. `b` are D's constants.
template <class D, bool kCareful, class F>
FASTKD_INLINE F gradient_of(F s, F t, const auto& b, const RowConstants<F>& row) {
  if constexpr (requires { D::template gradient<kCareful>(s, t, b, row); }) {
    return D::template gradient<kCareful>(s, t, b, row);  // a mix's
  } else if constexpr (D::kMoment != Moment::kNone) {
    return D::template gradient<kCareful>(s, t, row);
  } else {
    const Pair<F> c(s, t, row);
    return (kCareful ? -D::coslope(c, b) : D::slope(c, b)) - c.q * row.mean;
  }
}

}  // namespace fastkd
