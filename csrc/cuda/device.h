// What the CUDA kernels ask of the machine: shared memory, barriers, what a warp and a cluster exchange, and launches.
//
// The tests put another file in this one's place (tests/emulated/device.h), in which a GPU's threads take turns on a CPU.
// So everything that differs between the two is here, and the kernels themselves are compiled unchanged.
#pragma once

#include "../stable.h"

namespace fastkd {
namespace cuda {

constexpr int kWarp = 32;

struct Device {
  int major;          // of the compute capability
  int shared_memory;  // bytes that a block can have
};

struct Launch {
  int64_t blocks;
  int threads;
  int cluster;  // blocks that share a row; divides `blocks`
  int64_t shared_bytes;
  int most_shared;  // that a block of the device can have
};

}  // namespace cuda
}  // namespace fastkd

#if defined(FASTKD_EMULATED)
#include "emulated/device.h"
#else

#include <cooperative_groups.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <type_traits>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#define FASTKD_DEVICE_KEY CUDA

namespace fastkd {
namespace cuda {

// ---- in a kernel ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int64_t block_index() { return blockIdx.x; }
__device__ __forceinline__ void block_barrier() { __syncthreads(); }

// A thread's copies from device to shared memory: started, counted in groups, and waited for, all but the latest group.
// Written out, for CUDA's own functions let a compiler move reads before the wait: no barrier follows it here.
__device__ __forceinline__ void copy_async_16(void* to, const void* from) { __pipeline_memcpy_async(to, from, 16); }
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void wait_for_all_but_latest() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

// Stores 8 or 16 bytes at once, where a compiler takes a struct apart.
template <class P>
__device__ __forceinline__ void store_whole(void* to, const P& from) {
  using Word = std::conditional_t<sizeof(P) == 8, uint2, uint4>;
  Word word;
  memcpy(&word, &from, sizeof(P));
  *static_cast<Word*>(to) = word;
}

__device__ __forceinline__ double from_lane_xor(double x, int mask) { return __shfl_xor_sync(~0u, x, mask); }

// Blocks of a cluster (sm_90) can read each other's shared memory. Elsewhere every block is a cluster of its own.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ int cluster_size() { return cooperative_groups::this_cluster().num_blocks(); }
__device__ __forceinline__ int cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
__device__ __forceinline__ void cluster_barrier() { cooperative_groups::this_cluster().sync(); }
__device__ __forceinline__ const double* of_block(double* shared, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
}
#else
__device__ __forceinline__ int cluster_size() { return 1; }
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_barrier() { __syncthreads(); }
__device__ __forceinline__ const double* of_block(double* shared, int) { return shared; }
#endif

// ---- on the host ------------------------------------------------------------------------------------------------------

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "fastkd: ", what, ": ", cudaGetErrorString(error));
}

using DeviceGuard = torch::stable::accelerator::DeviceGuard;

inline Device device_of(const Tensor& x) {
  const int index = x.get_device_index();
  Device device{};
  check(cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index), "compute capability");
  check(cudaDeviceGetAttribute(&device.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), "shared memory");
  return device;
}

// A launch as CUDA takes it: `config` points to `cluster`.
struct Configuration {
  cudaLaunchAttribute cluster{cudaLaunchAttributeClusterDimension};
  cudaLaunchConfig_t config;

  template <class Kernel>
  Configuration(Kernel* kernel, const Launch& launch, void* stream)
      : config{dim3(launch.blocks), dim3(launch.threads), static_cast<size_t>(launch.shared_bytes),
               static_cast<cudaStream_t>(stream), &cluster, launch.cluster > 1} {
    cluster.val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
    // not what this launch needs: another thread's launch may be between here and its start
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.most_shared),
          "shared memory of a kernel");
    if (launch.cluster > 8) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster size of a kernel");
    }
  }
};

// Whether the device has room for a cluster of this kind. Some have no 16 multiprocessors side by side.
template <class Kernel>
bool fits(Kernel* kernel, const Launch& launch) {
  const Configuration configuration(kernel, launch, nullptr);
  int clusters = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &configuration.config);
  if (error != cudaSuccess) cudaGetLastError();  // it is an answer, and not to be found by a later call
  return error == cudaSuccess && clusters > 0;
}

// Starts a kernel on the current stream of the tensor's device, without waiting for anything.
template <class... Arguments>
void run(void (*kernel)(Arguments...), const Launch& launch, const Tensor& on, const Arguments&... arguments) {
  void* stream = nullptr;
  check_call(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream), "its current stream");
  const Configuration configuration(kernel, launch, stream);
  check(cudaLaunchKernelEx(&configuration.config, kernel, arguments...), "launch");
}

}  // namespace cuda
}  // namespace fastkd

#endif  // FASTKD_EMULATED
