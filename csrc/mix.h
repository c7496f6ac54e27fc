// Mixes: weighted sums of divergences, D = sum w D_i with u = sum w u_i, where what members share is computed once.
#pragma once

#include <utility>

#include "divergence.h"

namespace fastkd {

// What jsd, skew_kl and skew_reverse_kl add to a mix with their mixture m = a p + rest q.
template <class F>
struct OfMixture {
  F a, rest, log_rest;
  F teacher, student;  // D's factors of the excesses
  F logarithm, share;  // q u = logarithm q log(q / m) + share (q - p) q / m
  F limit_share;       // q v = logarithm q log(m / limit) + limit_share p q / m
};

// A mix as factors of what its members have in common.
template <class F>
struct MixConstants {
  F forward, reverse, tvd;
  F mean;  // 0 where the mean of u is subtracted inside log(q / p)
  OfMixture<F> mixtures[2];
  int count;      // of mixtures
  int two_sided;  // so many of them, the first ones, are of more than skew_kl, which takes no logarithm of q / m

  explicit MixConstants(const Shape& shape)
      : forward(weight(shape, Divergence::kForwardKL)), reverse(weight(shape, Divergence::kReverseKL)),
        tvd(weight(shape, Divergence::kTVD)), mean(reverse == F(0) ? F(1) : F(0)), count(0), two_sided(0) {
    const double beta = shape.beta, rest = 1 - beta, jsd = shape.weight(Divergence::kJSD);
    const double skew = shape.weight(Divergence::kSkewKL), skew_reverse = shape.weight(Divergence::kSkewReverseKL);
    OfMixture<double> both[] = {
        {beta, rest, std::log1p(-beta), beta * jsd + skew, rest * jsd, rest * jsd, rest * rest * skew, rest * skew},
        {rest, beta, std::log(beta), 0, 0, 0, 0, 0}};
    OfMixture<double>& reversed = both[beta == rest ? 0 : 1];  // the same one
    reversed.student += skew_reverse;
    reversed.logarithm += skew_reverse;
    reversed.share -= beta * rest * skew_reverse;
    reversed.limit_share -= rest * skew_reverse;
    if (both[0].student == 0) std::swap(both[0], both[1]);
    for (const auto& [a, b, log_b, teacher, student, logarithm, share, limit_share] : both) {
      if (teacher == 0 && student == 0) continue;
      two_sided += student != 0;
      mixtures[count++] = {F(a), F(b), F(log_b), F(teacher), F(student), F(logarithm), F(share), F(limit_share)};
    }
  }

  // Members of a closed form alone.
  bool closed() const { return count == 0 && tvd == F(0); }

 private:
  static F weight(const Shape& shape, Divergence divergence) { return static_cast<F>(shape.weight(divergence)); }
};

// A mix with so many different mixtures m, of which so many are two-sided, and perhaps the total variation. Its first form of u is the sum of the members' first forms, and its second of
// their second ones, but for two members. Forward KL's mean of u is 0, so its part of the gradient, q - p, stays apart. And
// log(q / p) tends to no limit: it is in both forms, and centred like reverse KL's own.
template <int kMixtures, int kTwoSided = kMixtures, bool kTVD = false>
struct Mix {
  static constexpr Moment kMoment = Moment::kNone;
  template <class F>
  using Constants = MixConstants<F>;

  template <class F>
  static FASTKD_INLINE F value(const Pair<F>& c, const MixConstants<F>& b) {
    F sum = b.forward * c.teacher_excess() + b.reverse * c.student_excess();
    if constexpr (kTVD) sum += b.tvd * TVD::value(c, b);
#pragma GCC unroll 2  // a loop inside keeps the one over columns from being vectorised
    for (int i = 0; i < kMixtures; ++i) {
      const OfMixture<F>& of = b.mixtures[i];
      const Mixture<F> mix(c, of.a, of.rest, of.log_rest);
      sum += of.teacher * mix.teacher_excess;
      if (i < kTwoSided) sum += of.student * mix.student_excess;
    }
    return sum;
  }
  template <class F>
  static FASTKD_INLINE F slope(const Pair<F>& c, const MixConstants<F>& b) {
    return bounded_slope(c, b) - b.reverse * c.q * c.log_ratio;
  }
  template <class F>
  static FASTKD_INLINE F coslope(const Pair<F>& c, const MixConstants<F>& b) {
    return bounded_coslope(c, b) + b.reverse * c.q * c.log_ratio;
  }
  template <bool kCareful, class F>
  static FASTKD_INLINE F gradient(F s, F t, const MixConstants<F>& b, const RowConstants<F>& row) {
    const Pair<F> c(s, t, row);
    const F centred = shifted_ratio(unmasked(s), unmasked(t), row.centred_shift, row.inv_tau);
    const F bounded = kCareful ? -bounded_coslope(c, b) : bounded_slope(c, b);
    return b.forward * c.difference + bounded - c.q * (b.reverse * centred + b.mean * row.mean);
  }

 private:
  template <class F>
  static FASTKD_INLINE F bounded_slope(const Pair<F>& c, const MixConstants<F>& b) {
    F sum = kTVD ? b.tvd * TVD::slope(c, b) : F(0);
#pragma GCC unroll 2  // a loop inside keeps the one over columns from being vectorised
    for (int i = 0; i < kMixtures; ++i) {
      const OfMixture<F>& of = b.mixtures[i];
      const Mixture<F> mix(c, of.a, of.rest, of.log_rest);
      sum += of.share * c.difference * share(c.q, mix.m);
      if (i < kTwoSided) sum += of.logarithm * c.q * mix.log_q_over_m;
    }
    return sum;
  }
  template <class F>
  static FASTKD_INLINE F bounded_coslope(const Pair<F>& c, const MixConstants<F>& b) {
    F sum = kTVD ? b.tvd * TVD::coslope(c, b) : F(0);
#pragma GCC unroll 2  // a loop inside keeps the one over columns from being vectorised
    for (int i = 0; i < kMixtures; ++i) {
      const OfMixture<F>& of = b.mixtures[i];
      const Mixture<F> mix(c, of.a, of.rest, of.log_rest);
      sum += of.limit_share * c.p * share(c.q, mix.m);
      if (i < kTwoSided) sum += of.logarithm * c.q * mix.log_m_over_limit;
    }
    return sum;
  }
};

// Forward and reverse KL alone, whose moments the first pass gives. The mean of u is reverse KL's, times its weight.
struct MixedKL : Mix<0> {
  static constexpr Moment kMoment = Moment::kBoth;
  template <bool kCareful, class F>
  static FASTKD_INLINE F gradient(F s, F t, const MixConstants<F>& b, const RowConstants<F>& row) {
    if constexpr (kCareful) {
      const Pair<F> c(s, t, row);
      return gradient_of_difference(c.difference, c.q, s, t, b, row);
    } else {
      const F q = student_probability(s, row);
      return gradient_of_difference(q - teacher_probability(t, row), q, s, t, b, row);
    }
  }
  template <class F>
  static FASTKD_INLINE F gradient_of_difference(F difference, F q, F s, F t, const MixConstants<F>& b,
                                                const RowConstants<F>& row) {
    return b.forward * difference + b.reverse * ReverseKL::gradient_of_probabilities(q, F(0), s, t, row);
  }
};

}  // namespace fastkd
