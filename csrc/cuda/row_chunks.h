// What rows_kernel (row_kernel.h) moves a row by, chunks of 16 bytes, and what its threads sum up together.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../divergence.h"
#include "device.h"

namespace fastkd {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTogether = 2;  // chunks of each model that a thread works on at a time, while as many are under way

// ---- chunks -----------------------------------------------------------------------------------------------------------

template <class T>
struct alignas(16) Chunk {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];

  __device__ __forceinline__ float at(int i) const {
    if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {  // of a pair in a register, in one instruction
      uint32_t pair;
      memcpy(&pair, x + i / 2 * 2, 4);
      return bit_cast<float>(i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
    }
    return static_cast<float>(x[i]);
  }
};

// Chunks of a model in shared memory where rows are not kept: those under way, and those that threads work on.
constexpr int kRing = 2 * kTogether * kThreads;

// What a thread works on at a time, of both models: chunks that lie kThreads chunks apart.
template <class T>
struct Step {
  static constexpr int kWidth = Chunk<T>::kSize, kSize = kTogether * kWidth;
  Chunk<T> s[kTogether], t[kTogether];
  int column;  // where the first begins

  __device__ __forceinline__ int at(int i) const { return column + i / kWidth * kThreads * kWidth + i % kWidth; }

  // Calls body(s, t, i) for every column; those that do not exist have an -inf of both models.
  template <class Body>
  __device__ __forceinline__ void for_columns(const Body& body) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) body(s[i / kWidth].at(i % kWidth), t[i / kWidth].at(i % kWidth), i);
  }
};

// Starts to copy what a row has of a step that begins at `column`. -inf stands for columns that do not exist.
template <class T>
__device__ __forceinline__ void fetch(Chunk<T>* to, const T* row, int column, int end) {
  constexpr int n = Chunk<T>::kSize, apart = kThreads * n;
  const bool aligned = reinterpret_cast<uintptr_t>(row + column) % 16 == 0;
  if (aligned && column >= 0 && column + (kTogether - 1) * apart + n <= end) {
#pragma unroll
    for (int chunk = 0; chunk < kTogether; ++chunk) copy_async_16(to + chunk * kThreads, row + column + chunk * apart);
    return;
  }
#pragma unroll 1
  for (int chunk = 0; chunk < kTogether; ++chunk, to += kThreads, column += apart) {
    if (aligned && column >= 0 && column + n <= end) {
      copy_async_16(to, row + column);
      continue;
    }
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
      const int j = column + i;
      to->x[i] = j >= 0 && j < end ? row[j] : static_cast<T>(-INFINITY);
    }
  }
}

// ---- sums over a row --------------------------------------------------------------------------------------------------

struct Add {
  __device__ __forceinline__ double operator()(double a, double b) const { return a + b; }
};
struct Max {
  __device__ __forceinline__ double operator()(double a, double b) const { return a > b ? a : b; }  // NaN is in the sums
};

constexpr int kMostSums = 4;

// The start of a block's shared memory; the kept row follows.
struct Exchange {
  double of_warp[kWarps][kMostSums];
  double of_block[kMostSums];
};

// Combines x over all threads of a row, in an order that depends on nothing but the launch.
template <int N, class Operation>
__device__ __forceinline__ void combine(double (&x)[N], Operation operation) {
  static_assert(N <= kMostSums);
  auto* exchange = reinterpret_cast<Exchange*>(shared_memory());
  const int thread = thread_index();
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) x[i] = operation(x[i], from_lane_xor(x[i], mask));
    if (thread % kWarp == 0) exchange->of_warp[thread / kWarp][i] = x[i];
  }
  block_barrier();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = exchange->of_warp[0][i];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) x[i] = operation(x[i], exchange->of_warp[warp][i]);
  }
  const int blocks = cluster_size();
  if (blocks == 1) {
    block_barrier();  // before the next call writes
    return;
  }
  if (thread == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) exchange->of_block[i] = x[i];
  }
  cluster_barrier();
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = of_block(exchange->of_block, 0)[i];
  for (int rank = 1; rank < blocks; ++rank) {
    const double* theirs = of_block(exchange->of_block, rank);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = operation(x[i], theirs[i]);
  }
  cluster_barrier();  // before the next call writes, and before a block leaves that others read
}

}  // namespace cuda
}  // namespace fastkd
