// Numbers too small for their format's full digits, which processors take a hundred times as long for.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace fastkd {

// While it lives, they count as zero in this thread, in operands and results: rows of models that disagree about nearly
// everything are full of them, and no loss or gradient is made of them.
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kFlushResults | kFlushOperands); }
  ~FlushSubnormals() { _mm_setcsr(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;

 private:
  static constexpr unsigned kFlushResults = 0x8000, kFlushOperands = 0x0040;
  const unsigned before_;
#else
  FlushSubnormals() {}  // not = default, so that one is no unused variable
#endif
};

}  // namespace fastkd
