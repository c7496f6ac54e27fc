// FASTKD_CLONES before a function: it is compiled for AVX-512, AVX2 and the baseline, and the loader picks one.
#pragma once

// GCC 12 is the first to know the levels of x86-64 by name; others get the baseline, or what their flags allow.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define FASTKD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTKD_CLONES
#endif
