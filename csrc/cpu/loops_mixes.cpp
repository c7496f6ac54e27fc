// Mixes of divergences, by the number of mixtures of both models in them.
#include "divergence_loops.h"

namespace fastkd {

template Loops<float> loops<Mix<0>>();
template Loops<double> loops<Mix<0>>();
template Loops<float> loops<Mix<1>>();
template Loops<double> loops<Mix<1>>();
template Loops<float> loops<Mix<2>>();
template Loops<double> loops<Mix<2>>();

}  // namespace fastkd
