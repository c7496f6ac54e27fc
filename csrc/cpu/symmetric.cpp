// x + x^T of square matrices in place, on CPUs: relation KL's gradient is (G + G^T) X, one GEMM instead of two.
//
// Tiles are taken in pairs that mirror each other, through a small buffer, so that memory is read and written along rows.
#include "../stable.h"

#include <algorithm>

#include "clones.h"

namespace fastkd {
namespace {

constexpr int64_t kTile = 16;

// a and b are tiles [height, width] and [width, height] of a matrix with rows of n elements, or one tile.
// kWhole: both are kTile, which the compiler then knows.
template <class F, bool kWhole>
FASTKD_CLONES void add_mirrored(F* a, F* b, int64_t some_height, int64_t some_width, int64_t n) {
  const int64_t height = kWhole ? kTile : some_height, width = kWhole ? kTile : some_width;
  F sum[kTile][kTile];
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t j = 0; j < height; ++j) sum[j][i] = b[i * n + j];
  }
  for (int64_t i = 0; i < height; ++i) {
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) sum[i][j] += a[i * n + j];
  }
  for (int64_t i = 0; i < height; ++i) {
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) a[i * n + j] = sum[i][j];
  }
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t j = 0; j < height; ++j) b[i * n + j] = sum[j][i];
  }
}

// Asks for a tile ahead of its turn: every row of it is on another page, where the processor's own prefetching stops.
template <class F>
void prefetch_tile(const F* x, int64_t height, int64_t n) {
  for (int64_t i = 0; i < height; ++i) __builtin_prefetch(x + i * n, 1, 3);
}

template <class F>
void symmetrize(F* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kTile) {
    for (int64_t j = i; j < n; j += kTile) {
      const int64_t next = j + kTile;
      if (next < n) {
        prefetch_tile(x + i * n + next, std::min(kTile, n - i), n);
        prefetch_tile(x + next * n + i, std::min(kTile, n - next), n);
      }
      const auto add = j + kTile <= n ? add_mirrored<F, true> : add_mirrored<F, false>;
      add(x + i * n + j, x + j * n + i, std::min(kTile, n - i), std::min(kTile, n - j), n);
    }
  }
}

template <class F>
void symmetrize_all(const Tensor& x) {
  F* data = static_cast<F*>(x.data_ptr());
  const int64_t n = x.size(1);
  torch::stable::parallel_for(0, x.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t a = begin; a < end; ++a) symmetrize(data + a * n * n, n);
  });
}

// x [A, n, n] += its transpose.
void symmetrize_(Tensor x) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(1) == x.size(2) && x.is_contiguous(), "fastkd: x must be contiguous [A, n, n]");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "fastkd: x must be float32 or float64");
  x.scalar_type() == ScalarType::Double ? symmetrize_all<double>(x) : symmetrize_all<float>(x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("symmetrize_", TORCH_BOX(&symmetrize_)); }

}  // namespace fastkd
