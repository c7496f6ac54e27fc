// The divergences between the masses of a few categories, in double: those of a top-k teacher, and the student's.
#pragma once

#include <array>
#include <limits>
#include <vector>

#include "../divergence.h"

namespace fastkd {
namespace {

constexpr double kNothing = -std::numeric_limits<double>::infinity();  // the logarithm of no mass

// log(e^a + e^b)
inline double log_add(double a, double b) {
  const double high = a > b ? a : b, low = a > b ? b : a;  // of a NaN either
  return high == kNothing ? low : high + std::log1p(std::exp(low - high));
}

struct Categories {
  std::vector<double> log_q, log_p;
  std::vector<double> gradient;  // of a row's loss in log q, as if these were scores
  std::vector<double> q;         // the student's masses; none where there is no divergence
  std::vector<double> slope, coslope;

  void clear() { log_q.clear(), log_p.clear(), q.clear(); }

  void add(double student, double teacher) { log_q.push_back(student), log_p.push_back(teacher); }

  // The divergence with these weights of its members; `gradient` becomes that in the logarithms of the student's masses.
  double divergence(const std::array<double, kDivergences>& weights, const Beta<double>& beta) {
    const size_t n = log_q.size();
    gradient.assign(n, 0), slope.resize(n), coslope.resize(n), q.resize(n);
    double total = 0;
    for (size_t code = 0; code < weights.size(); ++code) {
      const auto share = [&](auto divergence) { return member<decltype(divergence)>(weights[code], beta); };
      if (weights[code] != 0) total += with_divergence(static_cast<int64_t>(code), share);
    }
    return total;
  }

 private:
  // Shares of D are positive, as p - q, or what of it a mixture holds, is added to each: zero over a row, unless the
  // teacher's masses do not sum to 1, which forward_kl and skew_kl know, so that it is taken off again.
  template <class D>
  double member(double weight, const Beta<double>& beta) {
    constexpr bool kForward = D::kMoment == Moment::kTeacher, kReverse = D::kMoment == Moment::kStudent;
    const RowConstants<double> as_given({0, 1, 0, 1, 0, 0, 1}, 1);
    double value = 0, difference = 0, mean = 0, comean = 0;
    for (size_t i = 0; i < log_q.size(); ++i) {
      const Pair<double> c(log_q[i], log_p[i], as_given);
      q[i] = c.q;
      difference += c.difference;
      // a category that one model rules out and the other does not, however little it gives it
      if (kForward && log_q[i] == kNothing && c.p > 0) value = -kNothing;
      if (kReverse && log_p[i] == kNothing && c.q > 0) value = -kNothing;
      if constexpr (kForward) {
        value += c.teacher_excess();
        slope[i] = c.difference;
      } else if constexpr (kReverse) {
        value += c.student_excess();
        slope[i] = c.q * -c.log_ratio;
      } else {
        value += D::value(c, beta);
        slope[i] = D::slope(c, beta);
        coslope[i] = D::coslope(c, beta);
        comean += coslope[i];
      }
      mean += slope[i];
    }
    if constexpr (kForward) value -= difference;
    if constexpr (std::is_same_v<D, SkewKL>) value -= beta.rest * difference;
    if constexpr (kReverse) mean = with_infinity(mean);  // then the gradient becomes NaN
    const bool saturated = !kForward && !kReverse && comean < mean;
    for (size_t i = 0; i < log_q.size(); ++i) {
      gradient[i] += weight * (saturated ? q[i] * comean - coslope[i] : slope[i] - q[i] * mean);
    }
    return weight * with_infinity(value);
  }
};

}  // namespace
}  // namespace fastkd
