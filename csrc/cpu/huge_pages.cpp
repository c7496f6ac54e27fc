// advise_huge_pages as an op, for gradients that torch's GEMMs write.
#include "huge_pages.h"

namespace fastkd {
namespace {

void advise_huge_pages_(Tensor x) { advise_huge_pages(x); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("advise_huge_pages_", TORCH_BOX(&advise_huge_pages_)); }

}  // namespace fastkd
