// What is computed on a pair of score rows, as operators are told, and the loops that it takes.
#pragma once

#include <algorithm>
#include <vector>

#include "../stable.h"
#include "row_loops.h"

namespace fastkd {
namespace {

struct Objective {
  int64_t divergence;  // its code
  Shape shape;
  double tau, kd_weight, ce_weight;
};

// Of `beta` as operators take it: alone or, for a mix, with every divergence's weight after it.
inline Objective make_objective(int64_t divergence, const std::vector<double>& beta, double tau, double kd_weight,
                                double ce_weight) {
  Objective objective{divergence, {beta.empty() ? 0 : beta[0]}, tau, kd_weight, ce_weight};
  STD_TORCH_CHECK(divergence >= 0 && (divergence < kDivergences || (divergence > kMix && divergence < kMix + (1 << kDivergences))),
                  "fastkd: unknown divergence");
  const size_t expected = divergence < kMix ? 1 : 1 + kDivergences;
  STD_TORCH_CHECK(beta.size() >= expected, "fastkd: beta must be a number or, of a mix, one and ", kDivergences, " weights");
  if (divergence >= kMix) std::copy_n(beta.begin() + 1, kDivergences, objective.shape.weights);
  return objective;
}

// The loops of this divergence, in the working precision F.
template <class F>
Loops<F> loops_of(const Objective& objective) {
  if (objective.divergence >= kMix) {
    const MixConstants<double> mix(objective.shape);
    if (mix.closed()) return loops<MixedKL, F>();
    const bool tvd = mix.tvd != 0;
    switch (mix.count) {
      case 0: return loops<Mix<0, 0, true>, F>();
      case 1: return tvd ? loops<Mix<1, 1, true>, F>() : mix.two_sided == 1 ? loops<Mix<1>, F>() : loops<Mix<1, 0>, F>();
      default: return tvd ? loops<Mix<2, 2, true>, F>() : mix.two_sided == 2 ? loops<Mix<2>, F>() : loops<Mix<2, 1>, F>();
    }
  }
  return with_divergence(objective.divergence, [](auto member) { return loops<decltype(member), F>(); });
}

}  // namespace
}  // namespace fastkd
