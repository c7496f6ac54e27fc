// What rows_kernel (row_kernel.h) moves a row by, chunks of 16 bytes, and what its threads sum up together.
#pragma once

#include <cmath>
#include <cstdint>

#include "device.h"

namespace fastkd {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Blocks on a multiprocessor: some compute while others wait for memory. The chunks of a 16-bit row are twice as many columns
// and take the registers of a third block.
template <class T>
constexpr int kBeside = sizeof(T) == 4 ? 3 : 2;
constexpr int kAhead = 4;  // chunks of each model that a thread has under way from device memory

// ---- chunks -----------------------------------------------------------------------------------------------------------

template <class T>
struct alignas(16) Chunk {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T x[N];
};

// Chunks in shared memory that a thread goes through where rows are not kept: those under way, and the one it works on.
constexpr int kRing = kAhead + 1;

template <class P>
__device__ __forceinline__ bool is_aligned(const P* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(P) == 0;
}

// Starts to copy the columns of a row from `column` on. -inf stands for columns that do not exist.
template <class T>
__device__ __forceinline__ void fetch(Chunk<T>* to, const T* row, int column, int columns) {
  const auto* whole = reinterpret_cast<const Chunk<T>*>(row + column);
  if (column >= 0 && column + Chunk<T>::kSize <= columns && is_aligned(whole)) {
    copy_async_16(to, whole);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < Chunk<T>::kSize; ++i) {
    const int j = column + i;
    to->x[i] = j >= 0 && j < columns ? row[j] : static_cast<T>(-INFINITY);
  }
}

template <class G, int N>
__device__ __forceinline__ void store_as(void* gradient, int64_t offset, int column, int columns, const float (&g)[N]) {
  G* row = static_cast<G*>(gradient) + offset;
  auto* whole = reinterpret_cast<Pack<G, N>*>(row + column);
  if (column >= 0 && column + N <= columns && is_aligned(whole)) {
    Pack<G, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.x[i] = static_cast<G>(g[i]);
    *whole = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int j = column + i;
    if (j >= 0 && j < columns) row[j] = static_cast<G>(g[i]);
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
