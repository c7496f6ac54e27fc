// Exponentials and logarithms, written once for host and device, and doubles as two numbers of the working type.
//
// double calls the platform's. float is written out without a branch or a call, so that compilers vectorise the loops that
// use it, and so that a GPU, whose own functions give fewer of the digits asked for, computes what a CPU does.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "portable.h"

#if defined(__CUDACC__)
#define FASTKD_INLINE __host__ __device__ __forceinline__
#else
#define FASTKD_INLINE inline __attribute__((always_inline))
#endif

namespace fastkd {

template <class To, class From>
FASTKD_INLINE To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}

template <class F>
struct Exp {
  F value;   // e^x
  F minus1;  // e^x - 1, accurate near 0
  F tail;    // e^x - 1 - x, accurate near 0
};

// x <= 0. All three from one reduction x = n ln 2 + r, |r| <= ln 2 / 2: the polynomial gives e^r - 1, relative
// error 4e-9 before rounding. Results below 2^-126 come out as zero: subnormals are slow and matter to no softmax.
FASTKD_INLINE Exp<float> exp_nonpositive(float x) {
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low mantissa bits
  const float clamped = x < -88.0f ? -88.0f : x;  // gives n = -127, whose scale below is 0; NaN passes
  const float shifted = clamped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  float r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float poly = 1.9875691500e-4f;
  poly = poly * r + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  const float square = poly * (r * r);
  const float em1 = square + r;
  const float scale = bit_cast<float>((bit_cast<int32_t>(shifted) << 23) + 0x3f800000);  // 2^n
  const float minus1 = scale * em1 + (scale - 1.0f);
  return {scale * em1 + scale, minus1, n == 0.0f ? square : minus1 - x};
}

FASTKD_INLINE Exp<double> exp_nonpositive(double x) {
  const double minus1 = std::expm1(x);
  const double near = x * x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x / 720))));
  return {std::exp(x), minus1, x > -1e-2 ? near : minus1 - x};
}

constexpr double kLowestExponent = -127;

// 2^y for y <= 0, where e^x = 2^(x log2 e) is good enough: the product rounds x, but the reduction y = n + f is exact and
// one instruction. Polynomial of relative error 2e-8; zero below 2^-126 like the above.
FASTKD_INLINE float exp2_nonpositive(float y, [[maybe_unused]] float lowest = kLowestExponent) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(y));  // one instruction, relative error 2^-22.5
  return x;
#else
  const float kRound = 12582912.0f;
  const float clamped = y < lowest ? lowest : y;
  const float shifted = clamped + kRound;
  const float f = clamped - (shifted - kRound);
  float poly = 1.5345811590e-4f;
  poly = poly * f + 1.3399931216e-3f;
  poly = poly * f + 9.6184889586e-3f;
  poly = poly * f + 5.5503287770e-2f;
  poly = poly * f + 2.4022646891e-1f;
  poly = poly * f + 6.9314720574e-1f;
  poly = poly * f + 1.0f;
  return poly * bit_cast<float>((bit_cast<int32_t>(shifted) << 23) + 0x3f800000);
#endif
}

FASTKD_INLINE double exp2_nonpositive(double y, double = kLowestExponent) { return std::exp2(y); }

constexpr double kLog2E = 1.4426950408889634;

template <class F>
struct Log1p {
  F value;  // log(1 + x)
  F tail;   // x - log(1 + x), accurate near 0
};

// x > -1
FASTKD_INLINE Log1p<float> log_1p(float x) {
  const float u = 1.0f + x;
  // u = 2^e * m with m in [sqrt(1/2), sqrt(2)). With e = 0 the fraction is x itself, which 1 + x has rounded away.
  const int32_t bits = bit_cast<int32_t>(u);
  const int32_t e = (bits - 0x3f3504f3) >> 23;
  const float m = bit_cast<float>(bits - (e << 23));
  const float f = e == 0 ? x : m - 1.0f;
  float poly = 7.0376836292e-2f;
  poly = poly * f - 1.1514610310e-1f;
  poly = poly * f + 1.1676998740e-1f;
  poly = poly * f - 1.2420140846e-1f;
  poly = poly * f + 1.4249322787e-1f;
  poly = poly * f - 1.6668057665e-1f;
  poly = poly * f + 2.0000714765e-1f;
  poly = poly * f - 2.4999993993e-1f;
  poly = poly * f + 3.3333331174e-1f;
  const float tail = (0.5f - poly * f) * (f * f);
  const float value = x == x ? f - tail + static_cast<float>(e) * 0.693147181f : x;  // bits lose a NaN
  return {value, e == 0 ? tail : x - value};
}

FASTKD_INLINE Log1p<double> log_1p(double x) {
  const double value = std::log1p(x);
  const double near = x * x * (0.5 - x * (1.0 / 3 - x * (0.25 - x * (0.2 - x * (1.0 / 6 - x / 7)))));
  return {value, std::abs(x) < 2e-3 ? near : x - value};
}

// A double carried as two numbers of the working type, so that s - t + shift is exact where it matters.
template <class F>
struct Split {
  F high, low;
  FASTKD_INLINE explicit Split(double x) : high(static_cast<F>(x)), low(static_cast<F>(x - static_cast<F>(x))) {}
};

}  // namespace fastkd
