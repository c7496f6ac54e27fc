// The row primitive on a GPU: what cpu/row_kernel.h is on a CPU, whose header says what is computed.
//
// Device memory is what a row costs: with one read of both models' scores and one write of the gradient, exponentials are
// free. So a row stays in shared memory between passes, and a row too wide for one multiprocessor is shared out among the
// blocks of a cluster, which exchange their sums. Where neither is to be had, later passes read the row again, and where
// one pass is enough, nothing is kept.
//
// A row is cut into chunks of 16 bytes, aligned as the student's are. A thread owns every 256th chunk of its block: it has
// the chunk copied to shared memory, waits for no copies but its own, and later writes the chunk's gradient. So no barrier
// guards what is kept, and the gradient may overwrite the scores. It takes two chunks at a time, a step. Sums run in fp32
// over a step, in fp64 beyond, always in the same order.
//
// Passes: 1. online maxima and sums of exponentials of both models; 2. of rows whose models nearly agree, the same with
// care; 3. for divergences without a closed form, value and mean; 4. the gradient. The passes after the first depend on
// the row alone, so all threads of a row take the same ones.
#pragma once

#include "row_chunks.h"

namespace fastkd {
namespace cuda {

struct Arguments {
  const void* student;  // [rows, columns], as all matrices; columns lie side by side
  const void* teacher;  // nullptr: cross-entropy alone
  const double* coefficient;
  const int64_t* labels;  // nullptr: no cross-entropy
  double* loss;           // nullptr: stats are given
  RowStats* stats;        // nullptr: they are not kept
  void* gradient;         // nullptr: it is not wanted
  int64_t student_stride, teacher_stride, gradient_stride;
  int columns;
  double beta, tau, kd_weight, ce_weight;
  ScalarType gradient_type;
  int chunks;  // of a row, in a block: as many as whole steps of all threads have
  bool kept;   // whether a row stays in shared memory, or passes through
};

// ---- one row ----------------------------------------------------------------------------------------------------------

// Running maxima of both models, and sums of exponentials relative to them. moment is sum p log(p / q), or by the student
// sum q log(q / p), times tau; sum_1 is the cross-entropy's sum, without the label's own column.
template <bool kByStudent>
struct RunningSums {
  float log2e_over_tau, max_s = -INFINITY, max_t = -INFINITY;
  double sum_s = 0, sum_t = 0, moment = 0, sum_1 = 0;

  static __device__ __forceinline__ double rescale(float before, float now, float log2e) {
    return before == now ? 1.0f : exp2_nonpositive((before - now) * log2e);
  }

  // Moves the maxima. log(p / q) is relative to both, so its moment follows when either moves.
  __device__ __forceinline__ void move_to(float now_s, float now_t) {
    const double s_factor = rescale(max_s, now_s, log2e_over_tau), t_factor = rescale(max_t, now_t, log2e_over_tau);
    const double moved = (static_cast<double>(finite(max_t)) - finite(max_s)) - finite(now_t) + finite(now_s);
    moment = kByStudent ? s_factor * (moment - sum_s * moved) : t_factor * (moment + sum_t * moved);
    sum_s *= s_factor;
    sum_t *= t_factor;
    sum_1 *= rescale(max_s, now_s, static_cast<float>(kLog2E));
    max_s = now_s, max_t = now_t;
  }
};

// A row of one launch, as one thread sees it. D is the divergence, or void for the cross-entropy alone; T the dtype of both
// models' scores.
template <class D, class T>
struct RowKernel {
  static constexpr bool kDivergence = !std::is_void_v<D>;
  static constexpr Moment kMoment = std::conditional_t<kDivergence, D, ForwardKL>::kMoment;
  static constexpr bool kByStudent = kMoment == Moment::kStudent;
  // Whether statistics take one pass, but of rows whose models nearly agree.
  static constexpr bool kOnePass = kMoment != Moment::kNone;
  // Blocks on a multiprocessor: some compute while others wait for memory. Most divergences take a third's registers.
  static constexpr int kBeside = kOnePass ? 3 : 2;
  static constexpr int kColumns = Chunk<T>::kSize;
  using Sums = RunningSums<kByStudent>;
  using Constants = RowConstants<float>;

  const Arguments& a;
  int64_t row;
  const T *student, *teacher;
  int begin, end;     // columns of this block; of the first chunk some may lie before the row
  int steps;          // of each thread
  int label;          // a column that exists; else 0, or -1 for one in another shard of the row
  bool label_exists;
  double label_score;

  __device__ __forceinline__ explicit RowKernel(const Arguments& arguments) : a(arguments) {
    row = block_index() / cluster_size();
    student = static_cast<const T*>(a.student) + row * a.student_stride;
    if constexpr (kDivergence) teacher = static_cast<const T*>(a.teacher) + row * a.teacher_stride;
    const int head = static_cast<int>(reinterpret_cast<uintptr_t>(student) % 16 / sizeof(T));
    begin = cluster_rank() * a.chunks * kColumns - head;
    end = begin + a.chunks * kColumns < a.columns ? begin + a.chunks * kColumns : a.columns;
    steps = (end - begin + kThreads * Step<T>::kSize - 1) / (kThreads * Step<T>::kSize);
  }

  __device__ __forceinline__ void read_label() {
    if (a.labels != nullptr) {
      label_exists = a.labels[row] >= 0 && a.labels[row] < a.columns;
      label = label_exists ? static_cast<int>(a.labels[row]) : a.labels[row] == kElsewhere ? -1 : 0;
      label_score = label >= 0 ? static_cast<float>(student[label]) : -INFINITY;
      block_barrier();  // every thread has read it before one overwrites it with its gradient
    }
  }

  // Where a thread's step begins.
  __device__ __forceinline__ int column_of(int step) const {
    return begin + (step * kTogether * kThreads + thread_index()) * kColumns;
  }

  // Calls body(step) for each of this thread's steps. The first time, and where they are not kept, they come from device
  // memory, and a thread works on one while the next is under way.
  template <bool kFirst, class Body>
  __device__ __forceinline__ void for_steps(const Body& body) const {
    auto* const slots = reinterpret_cast<Chunk<T>*>(shared_memory() + sizeof(Exchange)) + thread_index();
    auto* const teacher_slots = slots + (a.kept ? a.chunks : kRing);
    const bool far = kFirst || !a.kept;
    const auto slot = [&](int step) { return (a.kept ? step : step % 2) * kTogether * kThreads; };
    const auto start = [&](int step) {
      if (step < steps) {
        fetch(slots + slot(step), student, column_of(step), end);
        if constexpr (kDivergence) fetch(teacher_slots + slot(step), teacher, column_of(step), end);
      }
      commit_copies();
    };
    if (far) start(0);
#pragma unroll 1
    for (int n = 0; n < steps; ++n) {
      if (far) {
        start(n + 1);
        wait_for_all_but_latest();
      }
      Step<T> step{};
      step.column = column_of(n);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        step.s[i] = slots[slot(n) + i * kThreads];
        if constexpr (kDivergence) step.t[i] = teacher_slots[slot(n) + i * kThreads];
      }
      body(step);
    }
  }

  // ---- pass 1: statistics, and D where moments give it ----

  __device__ __forceinline__ void add(Sums& sums, const Step<T>& step) const {
    float top_s = sums.max_s, top_t = sums.max_t;
    step.for_columns([&](float s, float t, int) {
      top_s = std::fmax(top_s, s);  // NaN is in the sums
      top_t = std::fmax(top_t, t);
    });
    if (top_s > sums.max_s || top_t > sums.max_t) sums.move_to(top_s, top_t);
    top_s = finite(top_s), top_t = finite(top_t);
    float sum_s = 0, sum_t = 0, moment = 0, sum_1 = 0;
    if constexpr (kDivergence) {
      step.for_columns([&](float s, float t, int) {
        const float x = unmasked(s) - top_s, y = unmasked(t) - top_t;
        const float q = exp2_nonpositive(x * sums.log2e_over_tau), p = exp2_nonpositive(y * sums.log2e_over_tau);
        sum_s += q;
        sum_t += p;
        moment += (kByStudent ? -q : p) * (y - x);
      });
      sums.sum_s += sum_s;
      sums.sum_t += sum_t;
      sums.moment += moment;
    }
    if (a.labels != nullptr) {
      step.for_columns([&](float s, float, int i) {
        const float e = exp2_nonpositive((s - top_s) * static_cast<float>(kLog2E));
        sum_1 += step.at(i) == label ? 0.0f : e;
      });
      sums.sum_1 += sum_1;
    }
  }

  __device__ __forceinline__ double statistics(RowStats& stats) const {
    Sums sums{static_cast<float>(kLog2E / a.tau)};
    for_steps<true>([&](const auto& step) { add(sums, step); });
    double maxima[] = {sums.max_s, sums.max_t};
    combine(maxima, Max());
    sums.move_to(static_cast<float>(maxima[0]), static_cast<float>(maxima[1]));
    double x[] = {sums.sum_s, sums.sum_t, sums.moment, sums.sum_1};
    combine(x, Add());
    stats = {finite(sums.max_s), x[0], finite(sums.max_t), x[1], 0, 0, x[3]};
    // The label's own exponential comes last and in fp64: beside it the others of a confident student would vanish.
    if (a.labels != nullptr) stats.sum_1 += std::exp(label_score - stats.max_s);
    return divergence_of(kByStudent, x[2] / a.tau, stats.sum_s, stats.sum_t);
  }

  // Sums over a row, to which body(s, t, sums) adds what a column has.
  template <int N, class Body>
  __device__ __forceinline__ void add_up(double (&x)[N], const Body& body) const {
    for_steps<false>([&](const auto& step) {
      float sums[N] = {};
      step.for_columns([&](float s, float t, int) { body(s, t, sums); });
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] += sums[i];
    });
    combine(x, Add());
  }

  // ---- pass 2: the same to the accuracy of Pair, for a row whose models nearly agree ----

  __device__ __forceinline__ double careful_statistics(RowStats& stats) const {
    const Constants constants({stats.max_s, 1, stats.max_t, 1, 0, 0, 1}, a.tau);
    double x[] = {0, 0, 0};  // sum_t, sum_s - sum_t, moment
    add_up(x, [&](float s, float t, auto& sums) {
      const Pair<float> pair(s, t, constants);
      sums[0] += pair.p;
      sums[1] += pair.difference;
      sums[2] += kByStudent ? pair.student_excess() : pair.teacher_excess();
    });
    stats.sum_t = x[0];
    stats.sum_s = x[0] + x[1];
    return divergence_of(kByStudent, kByStudent ? x[2] + x[1] : x[2] - x[1], stats.sum_s, stats.sum_t);
  }

  // What sum q (log(q / p) - mean) falls short of its true value, zero: the digits that a mean of a hundred nats lost.
  __device__ __forceinline__ double mean_residual(const RowStats& stats) const {
    const Constants constants(stats, a.tau);
    double x[] = {0};
    add_up(x, [&](float s, float t, auto& sums) { sums[0] += ReverseKL::gradient<false>(s, t, constants); });
    return x[0];
  }

  // ---- pass 3: D and the mean of u, for divergences without a closed form ----

  __device__ __forceinline__ double value(RowStats& stats) const {
    const Constants constants(stats, a.tau);
    const Beta<float> beta(a.beta);
    double x[] = {0, 0, 0};
    add_up(x, [&](float s, float t, auto& sums) {
      const Pair<float> pair(s, t, constants);
      sums[0] += D::value(pair, beta);
      sums[1] += D::slope(pair, beta);
      sums[2] += D::coslope(pair, beta);
    });
    stats.careful = x[2] < x[1];
    stats.mean = stats.careful ? -x[2] : x[1];
    return x[0];
  }

  // ---- all but the gradient ----

  __device__ __forceinline__ double divergence(RowStats& stats) const {
    double divergence = statistics(stats);
    if (!kDivergence || stats.empty()) return 0;
    if (divergence < kNearlyEqual) {
      divergence = careful_statistics(stats);
      stats.careful = kOnePass;
    }
    if constexpr (kByStudent) {
      if (kFarApart < divergence && divergence < kInfinite) {
        stats.mean = divergence;
        divergence += mean_residual(stats);
      }
      stats.mean = with_infinity(divergence);
    }
    if constexpr (!kOnePass) divergence = value(stats);
    return with_infinity(divergence);
  }

  // The row's loss, before its coefficient.
  __device__ __forceinline__ double loss(RowStats& stats) const {
    const double loss = a.kd_weight * a.tau * a.tau * divergence(stats);
    if (a.labels == nullptr) return loss;
    return loss + a.ce_weight * (label_exists ? stats.max_s - label_score + std::log(stats.sum_1) : NAN);
  }

  // ---- pass 4: the gradient, coefficient * d loss / d s ----

  template <bool kCareful>
  __device__ __forceinline__ void gradient(const RowStats& stats, double coefficient) const {
    const bool kd = kDivergence && !stats.empty(), ce = a.labels != nullptr && stats.sum_1 != 0;
    const Constants constants(kd ? stats : RowStats{stats.max_s, 1, stats.max_t, 1, 0, 0, stats.sum_1}, a.tau);
    const Beta<float> beta(a.beta);
    const float kd_scale = kd ? static_cast<float>(coefficient * a.kd_weight * a.tau) : 0.0f;
    const double ce_scale = coefficient * a.ce_weight / stats.sum_1, max_s = stats.max_s;
    // The label's own column is done in fp64: softmax - 1 would lose every digit of a confident student.
    const float at_label =
        label_exists ? static_cast<float>(ce_scale * (std::exp(label_score - max_s) - stats.sum_1)) : NAN;
    for_steps<false>([&](const auto& step) {
      float g[Step<T>::kSize] = {};
      if constexpr (kDivergence) {
        step.for_columns([&](float s, float t, int i) {
          g[i] = kd_scale * gradient_of<D, kCareful>(s, t, beta, constants);
        });
      }
      if (ce) {
        step.for_columns([&](float s, float, int i) {
          const float softmax = exp2_nonpositive((s - constants.max_s) * static_cast<float>(kLog2E));
          g[i] += step.at(i) == label ? at_label : static_cast<float>(ce_scale) * softmax;
        });
      }
      store(step.column, g);
    });
  }

  __device__ __forceinline__ void zero_gradient() const {
    const float zero[Step<T>::kSize] = {};
    for (int n = 0; n < steps; ++n) store(column_of(n), zero);
  }

  __device__ __forceinline__ void store(int column, const float (&g)[Step<T>::kSize]) const {
    if constexpr (std::is_same_v<T, float>) {
      if (a.gradient_type == ScalarType::Half) return store_as<torch::headeronly::Half>(column, g);
      if (a.gradient_type == ScalarType::BFloat16) return store_as<torch::headeronly::BFloat16>(column, g);
    }
    store_as<T>(column, g);
  }

  template <class G>
  __device__ __forceinline__ void store_as(int column, const float (&g)[Step<T>::kSize]) const {
    G* const target = static_cast<G*>(a.gradient) + row * a.gradient_stride;
#pragma unroll
    for (int chunk = 0; chunk < kTogether; ++chunk, column += kThreads * kColumns) {
      G x[kColumns];
#pragma unroll
      for (int i = 0; i < kColumns; ++i) x[i] = static_cast<G>(g[chunk * kColumns + i]);
      const bool aligned = reinterpret_cast<uintptr_t>(target + column) % sizeof(x) == 0;
      if (aligned && column >= 0 && column + kColumns <= end) {
        store_whole(target + column, x);
        continue;
      }
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (column + i >= 0 && column + i < end) target[column + i] = x[i];
      }
    }
  }
};

template <class D, class T>
__global__ void __launch_bounds__(kThreads, RowKernel<D, T>::kBeside) rows_kernel(const Arguments a) {
  RowKernel<D, T> kernel(a);
  const double coefficient = a.coefficient[kernel.row];
  const bool reports = thread_index() == 0 && cluster_rank() == 0;
  if (coefficient == 0) {  // the row is not read
    if (a.gradient != nullptr) kernel.zero_gradient();
    if (reports && a.loss != nullptr) a.loss[kernel.row] = 0;
    if (reports && a.loss != nullptr && a.stats != nullptr) a.stats[kernel.row] = {};
    return;
  }
  kernel.read_label();
  RowStats stats;
  if (a.loss != nullptr) {
    const double loss = coefficient * kernel.loss(stats);
    if (reports) a.loss[kernel.row] = loss;
    if (reports && a.stats != nullptr) a.stats[kernel.row] = stats;
  } else {
    stats = a.stats[kernel.row];
  }
  if (a.gradient == nullptr) return;
  stats.careful ? kernel.template gradient<true>(stats, coefficient) : kernel.template gradient<false>(stats, coefficient);
}

}  // namespace cuda
}  // namespace fastkd
