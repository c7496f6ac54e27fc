// What keeps a library that a new system has compiled loadable on every system that torch's own wheels run on, those of
// glibc 2.28 and of GCC 8's libstdc++: with cpu/portable.cpp, nothing newer is asked of either.
#pragma once

#include <cmath>

// glibc 2.29 gave these names a second version, for a faster way to tell of errors by errno. Its own functions beneath,
// which tell of none, are in every glibc since 2.15.
#if defined(__GLIBC__) && defined(__x86_64__) && !defined(__CUDACC__)
__asm__(".symver exp, __exp_finite@GLIBC_2.15");
__asm__(".symver exp2, __exp2_finite@GLIBC_2.15");
__asm__(".symver log, __log_finite@GLIBC_2.15");
#endif
