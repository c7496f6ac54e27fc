// Divergences of a closed form, and the total variation.
#include "divergence_loops.h"

namespace fastkd {

template Loops<float> loops<ForwardKL>();
template Loops<double> loops<ForwardKL>();
template Loops<float> loops<ReverseKL>();
template Loops<double> loops<ReverseKL>();
template Loops<float> loops<MixedKL>();
template Loops<double> loops<MixedKL>();
template Loops<float> loops<TVD>();
template Loops<double> loops<TVD>();

}  // namespace fastkd
