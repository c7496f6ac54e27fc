// Mixes of divergences, by the number of mixtures of both models in them.
#include "divergence_loops.h"

namespace fastkd {

template Loops<float> loops<Mix<1, 0>>();
template Loops<double> loops<Mix<1, 0>>();
template Loops<float> loops<Mix<1, 1>>();
template Loops<double> loops<Mix<1, 1>>();
template Loops<float> loops<Mix<2, 1>>();
template Loops<double> loops<Mix<2, 1>>();
template Loops<float> loops<Mix<2, 2>>();
template Loops<double> loops<Mix<2, 2>>();
template Loops<float> loops<Mix<0, 0, true>>();
template Loops<double> loops<Mix<0, 0, true>>();
template Loops<float> loops<Mix<1, 1, true>>();
template Loops<double> loops<Mix<1, 1, true>>();
template Loops<float> loops<Mix<2, 2, true>>();
template Loops<double> loops<Mix<2, 2, true>>();

}  // namespace fastkd
