// Divergences from a mixture of both models.
#include "divergence_loops.h"

namespace fastkd {

template Loops<float> loops<JSD>();
template Loops<double> loops<JSD>();
template Loops<float> loops<SkewKL>();
template Loops<double> loops<SkewKL>();
template Loops<float> loops<SkewReverseKL>();
template Loops<double> loops<SkewReverseKL>();

}  // namespace fastkd
