// What is computed on a pair of score rows, as operators are told, and the kernel that it takes.
#pragma once

#include <algorithm>
#include <vector>

#include "../mix.h"
#include "../stable.h"

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
  constexpr int64_t kCount = static_cast<int64_t>(Divergence::kCount);
  STD_TORCH_CHECK(divergence >= 0 && (divergence < kCount || (divergence > kMix && divergence < kMix + (1 << kCount))),
                  "fastkd: unknown divergence");
  const size_t expected = divergence < kMix ? 1 : 1 + kCount;
  STD_TORCH_CHECK(beta.size() >= expected, "fastkd: beta must be a number or, of a mix, one and ", kCount, " weights");
  if (divergence >= kMix) std::copy_n(beta.begin() + 1, kCount, objective.shape.weights);
  return objective;
}

// body.template operator()<D, F>() for the divergence D and the working precision F of these students.
template <class Body>
void for_kernel(const Objective& objective, ScalarType student, const Body& body) {
  const auto with_precision = [&]<class D>() {
    student == ScalarType::Double ? body.template operator()<D, double>() : body.template operator()<D, float>();
  };
  if (objective.divergence >= kMix) {
    const MixConstants<double> mix(objective.shape);
    if (mix.closed()) return with_precision.template operator()<MixedKL>();
    switch (mix.count) {
      case 0: return with_precision.template operator()<Mix<0>>();
      case 1: return with_precision.template operator()<Mix<1>>();
      default: return with_precision.template operator()<Mix<2>>();
    }
  }
  switch (static_cast<Divergence>(objective.divergence)) {
    case Divergence::kForwardKL: return with_precision.template operator()<ForwardKL>();
    case Divergence::kReverseKL: return with_precision.template operator()<ReverseKL>();
    case Divergence::kJSD: return with_precision.template operator()<JSD>();
    case Divergence::kSkewKL: return with_precision.template operator()<SkewKL>();
    case Divergence::kSkewReverseKL: return with_precision.template operator()<SkewReverseKL>();
    case Divergence::kTVD: return with_precision.template operator()<TVD>();
    default: STD_TORCH_CHECK(false, "fastkd: unknown divergence");
  }
}

}  // namespace
}  // namespace fastkd
