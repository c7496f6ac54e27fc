// Large pages for what an op writes.
#pragma once

#include "../stable.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastkd {

// A gradient written into fresh memory pays for a page fault every 4 KB, more than its arithmetic costs. Asking for huge
// pages before the first touch makes that one fault in 2 MB; where the system has none the request changes nothing.
inline void advise_huge_pages(const Tensor& x) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(x.data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(x.numel()) * x.element_size();
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1), last = end & ~(kHugePage - 1);
  if (x.is_contiguous() && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fastkd
