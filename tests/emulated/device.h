// Stands for csrc/cuda/device.h in tests: the threads of a cluster take turns on a CPU, each until it waits for others.
//
// Shared memory starts as NaN, and bytes behind its end are watched. Warps exchange through a barrier of their own, blocks of
// a cluster through addresses, as on a GPU. What cannot be seen here are races: between two barriers, threads run one after
// the other.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define FASTKD_DEVICE_KEY CPU

namespace fastkd {
namespace cuda {

namespace emulated {

constexpr int kStack = 128 * 1024, kWatched = 64;
constexpr char kFill = '\xff';

// Threads wait here until all of them do.
struct Barrier {
  int expected, arrived = 0, passed = 0;
};

struct Block {
  std::vector<char> shared;
  int rank;
  Barrier barrier;
  std::vector<Barrier> of_warp;
  std::vector<double> lanes;  // [2][threads]: what warps exchange, by turns in one half and the other

  Block(int threads, int shared_bytes, int rank)
      : shared(shared_bytes + kWatched, kFill), rank(rank), barrier{threads}, lanes(2 * threads) {
    for (int i = 0; i < threads; i += kWarp) of_warp.push_back({std::min(kWarp, threads - i)});
  }
  bool intact() const {
    for (size_t i = shared.size() - kWatched; i < shared.size(); ++i) {
      if (shared[i] != kFill) return false;
    }
    return true;
  }
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Block* block;
  int index;
  int exchanges = 0;
  bool done = false;
  std::deque<std::vector<std::pair<void*, const void*>>> copies;  // by group; the last one is not committed yet
};

inline Device device{9, 227 * 1024};
inline ucontext_t scheduler;
inline Thread* current;
inline std::function<void()> body;
inline int64_t first_block;
inline std::vector<std::unique_ptr<Block>> cluster;
inline Barrier cluster_wide;

inline void give_way() { swapcontext(&current->context, &scheduler); }

inline void wait(Barrier& barrier) {
  const int before = barrier.passed;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.passed;
  }
  while (barrier.passed == before) give_way();
}

inline void enter() {
  body();
  current->done = true;
  give_way();
}

inline void run_cluster(const Launch& launch) {
  static std::vector<std::unique_ptr<Thread>> threads;
  cluster.clear();
  for (int rank = 0; rank < launch.cluster; ++rank) {
    cluster.push_back(std::make_unique<Block>(launch.threads, launch.shared_bytes, rank));
  }
  cluster_wide = {launch.cluster * launch.threads};
  const size_t count = static_cast<size_t>(cluster_wide.expected);
  while (threads.size() < count) threads.push_back(std::make_unique<Thread>());
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = *threads[i];
    thread.block = cluster[i / launch.threads].get();
    thread.index = static_cast<int>(i) % launch.threads;
    thread.exchanges = 0;
    thread.done = false;
    thread.copies.assign(1, {});
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  for (size_t running = count; running > 0;) {
    for (size_t i = 0; i < count; ++i) {
      if (threads[i]->done) continue;
      current = threads[i].get();
      swapcontext(&scheduler, &current->context);
      running -= threads[i]->done;
    }
  }
  for (const auto& block : cluster) STD_TORCH_CHECK(block->intact(), "emulated: a write behind shared memory");
}

}  // namespace emulated

// ---- in a kernel ------------------------------------------------------------------------------------------------------

inline char* shared_memory() { return emulated::current->block->shared.data(); }
inline int thread_index() { return emulated::current->index; }
inline int64_t block_index() { return emulated::first_block + emulated::current->block->rank; }
inline void block_barrier() { emulated::wait(emulated::current->block->barrier); }

// Copies land where a thread waits for them, and not before.
inline void copy_async_16(void* to, const void* from) { emulated::current->copies.back().push_back({to, from}); }
inline void commit_copies() { emulated::current->copies.emplace_back(); }
inline void wait_for_all_but_latest() {
  auto& groups = emulated::current->copies;
  while (groups.size() > 2) {
    for (const auto& [to, from] : groups.front()) std::memcpy(to, from, 16);
    groups.pop_front();
  }
}

template <class P>
void store_whole(void* to, const P& from) {
  std::memcpy(to, &from, sizeof(P));
}

inline double from_lane_xor(double x, int mask) {
  emulated::Thread& thread = *emulated::current;
  double* half = thread.block->lanes.data() + thread.exchanges++ % 2 * thread.block->barrier.expected;
  half[thread.index] = x;
  emulated::wait(thread.block->of_warp[thread.index / kWarp]);
  return half[thread.index ^ mask];
}

inline int cluster_size() { return static_cast<int>(emulated::cluster.size()); }
inline int cluster_rank() { return emulated::current->block->rank; }
inline void cluster_barrier() { emulated::wait(emulated::cluster_wide); }

inline const double* of_block(double* shared, int rank) {
  const auto offset = reinterpret_cast<char*>(shared) - shared_memory();
  return reinterpret_cast<const double*>(emulated::cluster[rank]->shared.data() + offset);
}

// ---- on the host ------------------------------------------------------------------------------------------------------

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

inline Device device_of(const Tensor&) { return emulated::device; }

template <class Kernel>
bool fits(Kernel, const Launch& launch) {
  return launch.shared_bytes <= emulated::device.shared_memory;
}

template <class Kernel, class Arguments>
void run(Kernel kernel, const Launch& launch, const Tensor&, const Arguments& arguments) {
  STD_TORCH_CHECK(launch.shared_bytes <= emulated::device.shared_memory, "emulated: too much shared memory");
  STD_TORCH_CHECK(launch.cluster == 1 || emulated::device.major >= 9, "emulated: this device has no clusters");
  emulated::body = [&] { kernel(arguments); };
  for (emulated::first_block = 0; emulated::first_block < launch.blocks; emulated::first_block += launch.cluster) {
    emulated::run_cluster(launch);
  }
}

}  // namespace cuda
}  // namespace fastkd

// Which device is emulated: the major number of its compute capability, and the shared memory that a block can have.
extern "C" __attribute__((visibility("default"))) void fastkd_emulate(int major, int shared_memory) {
  fastkd::cuda::emulated::device = {major, shared_memory};
}
