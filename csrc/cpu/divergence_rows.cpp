// The row primitive on CPUs.
//
// For every pair of score rows (student s, teacher t): the loss
//
//     kd_weight * tau^2 * D(softmax(t / tau), softmax(s / tau)) + ce_weight * cross_entropy(s, label)
//
// times the row's coefficient, and its gradient with respect to s. A row is walked in blocks that fit the first-level
// cache: once for the running maxima and sums of exponentials (online softmax of both models at once), once more for
// the divergences that need normalised probabilities, and once for the gradient. Rows are shared out among torch's
// threads, one row to one thread in a fixed order, so that results do not depend on the number of threads.
//
// The inner loops are plain loops over contiguous floats. Function clones compile each of them for AVX-512, AVX2 and
// the baseline; the loader picks one when the library is loaded. Rows that are strided or of another dtype are copied
// block by block into a small buffer first.
#include "../stable.h"

#include <algorithm>
#include <cmath>
#include <limits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../divergence.h"
#include "clones.h"
#include "diagonals.h"

namespace fastkd {
namespace {

constexpr int64_t kBlock = 1024;  // columns: student, teacher and gradient blocks take 12 KB of fp32 together
// Divergence, in nats, under which a row is computed with care. At 0.1 probabilities differ by some 40 %, so the plain
// difference of two that are each good to 1e-7 is still good to 1e-6.
constexpr double kNearlyEqual = 0.1;
// Divergence over which the mean of log(q / p) is refined: one so large is summed up with an error of its own last digit.
constexpr double kFarApart = 16;

// ---- rows in memory -------------------------------------------------------------------------------------------------

// A [rows, columns] tensor of any float dtype and stride, read and written one block at a time in precision F.
template <class F>
struct Matrix {
  char* data;
  ScalarType dtype;
  int64_t row_stride, column_stride;
  bool direct;  // blocks can be used where they lie

  explicit Matrix(const Tensor& x)
      : data(static_cast<char*>(x.data_ptr())), dtype(x.scalar_type()), row_stride(x.stride(0)),
        column_stride(x.stride(1)),
        direct(column_stride == 1 && dtype == (sizeof(F) == 4 ? ScalarType::Float : ScalarType::Double)) {}

  template <class T>
  T* at(int64_t row, int64_t column) const {
    return reinterpret_cast<T*>(data) + row * row_stride + column * column_stride;
  }

  template <class T>
  void gather(int64_t row, int64_t column, int64_t n, F* out) const {
    const T* x = at<const T>(row, column);
    for (int64_t j = 0; j < n; ++j) out[j] = static_cast<F>(x[j * column_stride]);
  }

  template <class T>
  void scatter(int64_t row, int64_t column, int64_t n, const F* in) const {
    T* x = at<T>(row, column);
    for (int64_t j = 0; j < n; ++j) x[j * column_stride] = static_cast<T>(in[j]);
  }

  const F* read(int64_t row, int64_t column, int64_t n, F* buffer) const {
    if (direct) return at<const F>(row, column);
    switch (dtype) {
      case ScalarType::Double: gather<double>(row, column, n, buffer); break;
      case ScalarType::Float: gather<float>(row, column, n, buffer); break;
      case ScalarType::Half: gather<torch::headeronly::Half>(row, column, n, buffer); break;
      default: gather<torch::headeronly::BFloat16>(row, column, n, buffer); break;
    }
    return buffer;
  }

  // Where to put a block of results: in place if possible, else in the buffer, which `write` then stores.
  F* target(int64_t row, int64_t column, F* buffer) const { return direct ? at<F>(row, column) : buffer; }

  void write(int64_t row, int64_t column, int64_t n, const F* buffer) const {
    if (direct) return;
    switch (dtype) {
      case ScalarType::Double: scatter<double>(row, column, n, buffer); break;
      case ScalarType::Float: scatter<float>(row, column, n, buffer); break;
      case ScalarType::Half: scatter<torch::headeronly::Half>(row, column, n, buffer); break;
      default: scatter<torch::headeronly::BFloat16>(row, column, n, buffer); break;
    }
  }

  // Asks for a block ahead of its turn: the processor's own prefetching stops where a page of memory ends.
  void prefetch(int64_t row, int64_t column, int64_t columns) const {
    if (!direct) return;
    const int64_t end = std::min(column + kBlock, columns);
    for (int64_t j = column; j < end; j += 64 / static_cast<int64_t>(sizeof(F))) __builtin_prefetch(at<F>(row, j), 0, 2);
  }

  F element(int64_t row, int64_t column) const {
    F x;
    return *read(row, column, 1, &x);
  }
};

// A gradient written into fresh memory pays for a page fault every 4 KB, more than its arithmetic costs. Asking for huge
// pages before the first touch makes that one fault in 2 MB; where the system has none the request changes nothing.
void advise_huge_pages(const Tensor& x) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(x.data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(x.numel()) * x.element_size();
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1), last = end & ~(kHugePage - 1);
  if (x.is_contiguous() && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

// ---- inner loops, one block each ------------------------------------------------------------------------------------

template <class F>
FASTKD_CLONES F block_max(const F* x, int64_t n) {
  F top = -std::numeric_limits<F>::infinity();
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < n; ++j) top = x[j] > top ? x[j] : top;
  return top;
}

template <class F>
struct BlockMaxima {
  F student, teacher;
};

// Of both models, in halves: four maxima under way at a time, where one would wait for itself.
template <class F>
FASTKD_CLONES BlockMaxima<F> block_maxima(const F* s, const F* t, int64_t n) {
  const F lowest = -std::numeric_limits<F>::infinity();
  const int64_t half = n / 2;
  F s_0 = lowest, s_1 = lowest, t_0 = lowest, t_1 = lowest;
#pragma omp simd reduction(max : s_0, s_1, t_0, t_1)
  for (int64_t j = 0; j < half; ++j) {
    s_0 = s[j] > s_0 ? s[j] : s_0;
    s_1 = s[half + j] > s_1 ? s[half + j] : s_1;
    t_0 = t[j] > t_0 ? t[j] : t_0;
    t_1 = t[half + j] > t_1 ? t[half + j] : t_1;
  }
  if (n % 2 != 0) {
    s_0 = s[n - 1] > s_0 ? s[n - 1] : s_0;
    t_0 = t[n - 1] > t_0 ? t[n - 1] : t_0;
  }
  return {s_0 > s_1 ? s_0 : s_1, t_0 > t_1 ? t_0 : t_1};
}

template <class F>
struct BlockSums {
  F student, teacher, difference, moment, student_1;
};

// The exponentials of a row that is one block long, kept from the sums for the gradient: half of a short row's work. For a
// careful forward KL, `student` is what the student's exceed the teacher's by.
template <class F>
struct Exponentials {
  F student[kBlock], teacher[kBlock];
  bool kept = false;
};

// How the first pass sums up a block: plainly; plainly with an eye on scores of -inf; or to the accuracy of Pair. The
// moment is sum p log(p / q), or sum q log(q / p) for the student's; the careful pass sums up p log(p / q) + q - p
// instead, of second order like the divergence, and its caller takes q - p off again, exactly.
enum class Pass { kPlain, kMasked, kCareful };

// Sums over a block relative to the maxima so far, which `row` holds with sums of 1: probabilities are the plain
// exponentials. kSeparate: also the sum at temperature 1, for a cross-entropy beside a divergence at another one. kKeep:
// the exponentials are written to `kept`.
template <class F, Moment kMoment, Pass kPass, bool kSeparate, bool kKeep>
FASTKD_CLONES BlockSums<F> block_sums(const F* s, const F* t, int64_t n, const RowConstants<F>& row,
                                      Exponentials<F>* kept) {
  F* const kept_student = kKeep ? kept->student : nullptr;
  F* const kept_teacher = kKeep ? kept->teacher : nullptr;
  const RowConstants<F> r = row;
  F student = 0, teacher = 0, difference = 0, moment = 0, student_1 = 0;
#pragma omp simd reduction(+ : student, teacher, difference, moment, student_1)
  for (int64_t j = 0; j < n; ++j) {
    F p, q;
    if constexpr (kPass == Pass::kCareful) {
      const Pair<F> c(s[j], t[j], r);
      p = c.p, q = c.q;
      difference += c.difference;
      moment += kMoment == Moment::kStudent ? c.student_excess() : c.teacher_excess();
      if constexpr (kKeep) kept_student[j] = kMoment == Moment::kStudent ? c.q : c.difference, kept_teacher[j] = c.p;
    } else {
      const F top_s = (kPass == Pass::kMasked ? unmasked(s[j]) : s[j]) - r.max_s;
      const F top_t = (kPass == Pass::kMasked ? unmasked(t[j]) : t[j]) - r.max_t;
      q = exp2_nonpositive(top_s * r.log2e_over_tau), p = exp2_nonpositive(top_t * r.log2e_over_tau);
      moment += (kMoment == Moment::kStudent ? -q : p) * (top_t - top_s);
      if constexpr (kKeep) kept_student[j] = q, kept_teacher[j] = p;
    }
    student += q;
    teacher += p;
    if constexpr (kSeparate) student_1 += exp2_nonpositive((s[j] - r.max_s) * F(kLog2E));
  }
  return {student, teacher, difference, kPass == Pass::kCareful ? moment : moment * r.inv_tau, student_1};
}

template <class F>
FASTKD_CLONES F block_sum(const F* s, int64_t n, F max_s) {
  F sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += exp2_nonpositive((s[j] - max_s) * F(kLog2E));
  return sum;
}

template <class F>
FASTKD_CLONES F block_residual(const F* s, const F* t, int64_t n, const RowConstants<F>& row) {
  const RowConstants<F> r = row;
  F sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += ReverseKL::gradient<false>(s[j], t[j], r);
  return sum;
}

template <class F>
struct BlockValue {
  F value, slope, coslope;
};

template <class D, class F>
FASTKD_CLONES BlockValue<F> block_value(const F* s, const F* t, int64_t n, const RowConstants<F>& row,
                                        const Beta<F>& beta) {
  const RowConstants<F> r = row;
  const Beta<F> b = beta;
  F value = 0, slope = 0, coslope = 0;
#pragma omp simd reduction(+ : value, slope, coslope)
  for (int64_t j = 0; j < n; ++j) {
    const Pair<F> column(s[j], t[j], r);
    value += D::value(column, b);
    slope += D::slope(column, b);
    coslope += D::coslope(column, b);
  }
  return {value, slope, coslope};
}

// g may be s. All three are read and written at the same j only.
template <class D, bool kCareful, class F>
FASTKD_CLONES void block_gradient(const F* s, const F* t, F* g, int64_t n, const RowConstants<F>& row,
                                  const Beta<F>& beta, F scale) {
  const RowConstants<F> r = row;
  const Beta<F> b = beta;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) g[j] = scale * gradient_of<D, kCareful>(s[j], t[j], b, r);
}

// The same where the exponentials are at hand. surplus: the student's sum of them over the teacher's, minus 1.
template <class D, bool kCareful, class F>
FASTKD_CLONES void block_gradient_kept(const F* s, const F* t, F* g, int64_t n, const RowConstants<F>& row,
                                       const Exponentials<F>& kept, F surplus, F scale) {
  const RowConstants<F> r = row;
  const F* const student = kept.student;
  const F* const teacher = kept.teacher;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    if constexpr (kCareful && D::kMoment == Moment::kTeacher) {
      g[j] = scale * ((student[j] - surplus * teacher[j]) * r.inv_sum_s);
    } else {
      g[j] = scale * D::gradient_of_probabilities(student[j] * r.inv_sum_s, teacher[j] * r.inv_sum_t, s[j], t[j], r);
    }
  }
}

template <class F>
FASTKD_CLONES void block_softmax(const F* s, F* g, int64_t n, F max_s, F scale) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) g[j] = scale * exp2_nonpositive((s[j] - max_s) * F(kLog2E));
}

template <class F>
FASTKD_CLONES void block_kd_and_softmax(const F* s, const F* kd, F* g, int64_t n, F max_s, F scale) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) g[j] = kd[j] + scale * exp2_nonpositive((s[j] - max_s) * F(kLog2E));
}

// ---- one row --------------------------------------------------------------------------------------------------------

struct Objective {
  Divergence divergence;
  double beta, tau, kd_weight, ce_weight;
};

// The rows of one call. D is the divergence, F the working precision (double for double students, else float).
template <class D, class F>
struct RowKernel {
  Matrix<F> student;
  std::optional<Matrix<F>> teacher;  // absent when only the cross-entropy is asked for
  const int64_t* labels;             // absent when ce_weight is 0
  int64_t columns;
  Objective objective;
  Beta<F> beta;

  static constexpr double kLowest = -std::numeric_limits<double>::infinity();

  Matrix<F> view(const Tensor& x) const { return Matrix<F>(x); }

  // What sums of e^((x - before) / tau) are multiplied with when the running maximum moves to `now`.
  static double rescale(double before, double now, double inv_tau) {
    return before == now ? 1 : std::exp((before - now) * inv_tau);
  }

  // The maximum as it is subtracted inside exponentials: of a row so far all -inf it must not make -inf - -inf.
  static double finite(double max) { return max == kLowest ? 0 : max; }

  // Pass 1: running statistics; returns D where moments give it. Rows whose models nearly agree are summed up with more
  // care: there D and the gradient are small differences of what the plain pass sums up.
  double statistics(int64_t row, RowStats& out, Exponentials<F>* kept) const {
    double divergence = statistics<Pass::kPlain>(row, out, kept);
    if (!teacher || out.empty()) return 0;
    if (divergence < kNearlyEqual) {
      divergence = statistics<Pass::kCareful>(row, out, kept);
      out.careful = D::kMoment != Moment::kNone;
    }
    if constexpr (D::kMoment == Moment::kStudent) {
      out.mean = divergence;
      if (kFarApart < divergence && divergence < kInfinite) divergence = out.mean += mean_residual(row, out);
    }
    return divergence;
  }

  // What sum q (log(q / p) - mean) falls short of its true value, zero: the digits that a mean of a hundred nats lost.
  double mean_residual(int64_t row, const RowStats& stats) const {
    F s_buffer[kBlock], t_buffer[kBlock];
    const RowConstants<F> constants(stats, objective.tau);
    double residual = 0;
    for (int64_t start = 0; start < columns; start += kBlock) {
      const int64_t n = std::min(kBlock, columns - start);
      const F* s = student.read(row, start, n, s_buffer);
      residual += block_residual(s, teacher->read(row, start, n, t_buffer), n, constants);
    }
    return residual;
  }

  // Whether the cross-entropy's sum of exponentials is not the divergence's own.
  bool separate_sum() const { return labels && objective.tau != 1; }

  // Whether a row's exponentials serve its gradient, too: that of a row in one block, where they are relative to its
  // maximum, and of a divergence whose gradient is made of them.
  bool worth_keeping() const { return teacher && !labels && D::kMoment != Moment::kNone && columns <= kBlock; }

  template <Pass kPass>
  BlockSums<F> sums(const F* s, const F* t, int64_t n, const RowConstants<F>& constants, Exponentials<F>* kept) const {
    if constexpr (D::kMoment != Moment::kNone) {
      if (kept) {
        kept->kept = true;
        // short rows are those of attention, where masked columns are the rule
        constexpr Pass kRobust = kPass == Pass::kPlain ? Pass::kMasked : kPass;
        return block_sums<F, D::kMoment, kRobust, false, true>(s, t, n, constants, kept);
      }
    }
    return separate_sum() ? block_sums<F, D::kMoment, kPass, true, false>(s, t, n, constants, nullptr)
                          : block_sums<F, D::kMoment, kPass, false, false>(s, t, n, constants, nullptr);
  }

  // The plain pass stops after a first block whose models nearly agree: chances are that the row's do.
  template <Pass kPass>
  double statistics(int64_t row, RowStats& out, Exponentials<F>* kept) const {
    constexpr bool kByStudent = D::kMoment == Moment::kStudent;
    F s_buffer[kBlock], t_buffer[kBlock];
    const double tau = objective.tau, inv_tau = 1 / tau;
    double max_s = kLowest, max_t = kLowest, sum_s = 0, sum_t = 0, difference = 0, sum_1 = 0, moment = 0;
    const auto divergence = [&] {
      const double log_sums = std::log(sum_s / sum_t);
      return kByStudent ? moment / sum_s - log_sums : moment / sum_t + log_sums;
    };
    for (int64_t start = 0; start < columns; start += kBlock) {
      const int64_t n = std::min(kBlock, columns - start);
      const double before_s = max_s, before_t = max_t;
      const F* s = student.read(row, start, n, s_buffer);
      student.prefetch(row, start + kBlock, columns);
      if (!teacher) {
        max_s = std::max<double>(max_s, block_max(s, n));
        sum_1 *= rescale(before_s, max_s, 1);
        sum_1 += block_sum(s, n, static_cast<F>(finite(max_s)));
        continue;
      }
      const F* t = teacher->read(row, start, n, t_buffer);
      const BlockMaxima<F> maxima = block_maxima(s, t, n);
      max_s = std::max<double>(max_s, maxima.student);
      max_t = std::max<double>(max_t, maxima.teacher);
      sum_1 *= rescale(before_s, max_s, 1);
      teacher->prefetch(row, start + kBlock, columns);
      const RowConstants<F> constants({finite(max_s), 1, finite(max_t), 1, 0, 0, 1}, tau);
      BlockSums<F> block = sums<kPass>(s, t, n, constants, kept);
      if (kPass == Pass::kPlain && !kept && !std::isfinite(block.moment)) {
        block = sums<Pass::kMasked>(s, t, n, constants, nullptr);
      }

      const double s_factor = rescale(before_s, max_s, inv_tau), t_factor = rescale(before_t, max_t, inv_tau);
      // log_ratio is relative to both maxima, so the moment follows when either moves
      const double moved = inv_tau * (finite(before_t) - finite(before_s) - finite(max_t) + finite(max_s));
      moment = (kByStudent ? s_factor * (moment - sum_s * moved) : t_factor * (moment + sum_t * moved)) + block.moment;
      if (kPass == Pass::kCareful) moment += kByStudent ? block.difference : -block.difference;
      difference = s_factor * difference + (s_factor - t_factor) * sum_t + block.difference;
      sum_t = t_factor * sum_t + block.teacher;
      // the summed difference has more digits than the difference of two sums
      sum_s = kPass == Pass::kCareful ? sum_t + difference : s_factor * sum_s + block.student;
      sum_1 += block.student_1;
      const bool only_masked = sum_s == 0 || sum_t == 0;
      const bool more = start + n < columns;
      if (kPass == Pass::kPlain && start == 0 && more && !only_masked && divergence() < kNearlyEqual) break;
    }
    out = {max_s, sum_s, max_t, sum_t, 0, 0, teacher && !separate_sum() ? sum_s : sum_1};
    return divergence();  // of no meaning without a teacher, or where out.empty()
  }

  // Pass 2, for divergences without a closed form: D, and the mean of u into `stats`.
  double value(int64_t row, RowStats& stats) const {
    F s_buffer[kBlock], t_buffer[kBlock];
    const RowConstants<F> constants(stats, objective.tau);
    double value = 0, mean = 0, comean = 0;
    for (int64_t start = 0; start < columns; start += kBlock) {
      const int64_t n = std::min(kBlock, columns - start);
      const F* s = student.read(row, start, n, s_buffer);
      const BlockValue<F> block = block_value<D, F>(s, teacher->read(row, start, n, t_buffer), n, constants, beta);
      value += block.value;
      mean += block.slope;
      comean += block.coslope;
    }
    stats.careful = comean < mean;
    stats.mean = stats.careful ? -comean : mean;
    return value;
  }

  // Passes 1 and 2: the row's loss, before its coefficient.
  double loss(int64_t row, RowStats& stats, Exponentials<F>* kept = nullptr) const {
    double divergence = statistics(row, stats, kept);
    if constexpr (D::kMoment == Moment::kNone) {
      if (teacher && !stats.empty()) divergence = value(row, stats);
    }
    if (labels && label_in_range(row)) sharpen_sum_at_label(row, stats);
    divergence = with_infinity(divergence);
    double loss = teacher ? objective.kd_weight * objective.tau * objective.tau * divergence : 0;
    if (labels) loss += objective.ce_weight * cross_entropy(row, stats);
    return loss;
  }

  bool label_in_range(int64_t row) const { return labels[row] >= 0 && labels[row] < columns; }

  // A student sure of its label has sum_1 = e_label + a little, and both loss and gradient are about the little, which a
  // sum in working precision has rounded away: sum it up alone.
  void sharpen_sum_at_label(int64_t row, RowStats& stats) const {
    const double at_label = std::exp(static_cast<double>(student.element(row, labels[row])) - stats.max_s);
    if (!(at_label > 0.5 * stats.sum_1)) return;
    F buffer[kBlock];
    double others = 0;
    const int64_t edges[] = {0, labels[row], labels[row] + 1, columns};
    for (int part = 0; part < 4; part += 2) {
      for (int64_t start = edges[part]; start < edges[part + 1]; start += kBlock) {
        const int64_t n = std::min(kBlock, edges[part + 1] - start);
        others += block_sum(student.read(row, start, n, buffer), n, static_cast<F>(stats.max_s));
      }
    }
    stats.sum_1 = at_label + others;
  }

  double cross_entropy(int64_t row, const RowStats& stats) const {
    if (!label_in_range(row)) return std::numeric_limits<double>::quiet_NaN();
    return stats.max_s - static_cast<double>(student.element(row, labels[row])) + std::log(stats.sum_1);
  }

  // Pass 3: coefficient * d loss / d s, written to `gradient`, which may be `student`.
  void gradient(int64_t row, const RowStats& stats, double coefficient, const Matrix<F>& gradient,
                const Exponentials<F>* kept = nullptr) const {
    F s_buffer[kBlock], t_buffer[kBlock], g_buffer[kBlock];
    const RowConstants<F> constants(stats, objective.tau);
    const bool kd = teacher && !stats.empty();
    const bool ce = labels && stats.sum_1 != 0;
    const auto kd_gradient = stats.careful ? &block_gradient<D, true, F> : &block_gradient<D, false, F>;
    const F kd_scale = static_cast<F>(coefficient * objective.kd_weight * objective.tau);
    const F ce_scale = static_cast<F>(coefficient * objective.ce_weight / stats.sum_1);
    const F at_label = ce ? label_gradient(row, stats, coefficient, constants, kd, kd_scale) : F(0);
    for (int64_t start = 0; start < columns; start += kBlock) {
      const int64_t n = std::min(kBlock, columns - start);
      const F* s = student.read(row, start, n, s_buffer);
      student.prefetch(row, start + kBlock, columns);
      F* g = gradient.target(row, start, g_buffer);
      if (kd) {
        const F* t = teacher->read(row, start, n, t_buffer);
        teacher->prefetch(row, start + kBlock, columns);
        F* kd_target = ce ? g_buffer : g;  // s is needed once more where the cross-entropy adds to it
        if (kept && kept->kept) {
          kept_gradient(s, t, g, n, stats, constants, *kept, kd_scale);
        } else {
          kd_gradient(s, t, kd_target, n, constants, beta, kd_scale);
        }
        if (ce) block_kd_and_softmax(s, kd_target, g, n, constants.max_s, ce_scale);
      } else if (ce) {
        block_softmax(s, g, n, constants.max_s, ce_scale);
      } else {
        std::fill(g, g + n, F(0));
      }
      gradient.write(row, start, n, g);
    }
    if (ce) {
      const int64_t column = label_in_range(row) ? labels[row] : 0;
      *gradient.target(row, column, g_buffer) = at_label;
      gradient.write(row, column, 1, &at_label);
    }
  }

  void kept_gradient(const F* s, const F* t, F* g, int64_t n, const RowStats& stats, const RowConstants<F>& constants,
                     const Exponentials<F>& kept, F scale) const {
    if constexpr (D::kMoment != Moment::kNone) {
      const F surplus = static_cast<F>(stats.sum_s / stats.sum_t - 1);
      const auto block = stats.careful ? &block_gradient_kept<D, true, F> : &block_gradient_kept<D, false, F>;
      block(s, t, g, n, constants, kept, surplus, scale);
    }
  }

  // The label's own column is done apart and in double: softmax - 1 would lose every digit of a confident student. NaN for
  // a label out of range.
  F label_gradient(int64_t row, const RowStats& stats, double coefficient, const RowConstants<F>& constants, bool kd,
                   F kd_scale) const {
    if (!label_in_range(row)) return std::numeric_limits<F>::quiet_NaN();
    const F s = student.element(row, labels[row]);
    const double exponential = std::exp(static_cast<double>(s) - stats.max_s);
    double g = coefficient * objective.ce_weight * (exponential - stats.sum_1) / stats.sum_1;
    if (kd) {
      const F t = teacher->element(row, labels[row]);
      g += kd_scale * (stats.careful ? gradient_of<D, true>(s, t, beta, constants)
                                     : gradient_of<D, false>(s, t, beta, constants));
    }
    return static_cast<F>(g);
  }

  void zero(int64_t row, const Matrix<F>& gradient) const {
    F buffer[kBlock];
    for (int64_t start = 0; start < columns; start += kBlock) {
      const int64_t n = std::min(kBlock, columns - start);
      F* g = gradient.target(row, start, buffer);
      std::fill(g, g + n, F(0));
      gradient.write(row, start, n, g);
    }
  }
};

// ---- one call -------------------------------------------------------------------------------------------------------

struct Arguments {
  const Tensor& student;
  const std::optional<Tensor>& teacher;
  const Tensor& coefficient;
  const std::optional<Tensor>& labels;
  Objective objective;

  Arguments(const Tensor& student, const std::optional<Tensor>& teacher, const Tensor& coefficient,
            const std::optional<Tensor>& labels, Objective objective)
      : student(student), teacher(teacher), coefficient(coefficient), labels(labels), objective(objective) {
    check_matrix(student, student.size(0), student.size(1), "student");
    STD_TORCH_CHECK(is_float(student.scalar_type()), "fastkd: student must be of a floating dtype");
    if (teacher) {
      check_matrix(*teacher, student.size(0), student.size(1), "teacher");
      STD_TORCH_CHECK(is_float(teacher->scalar_type()), "fastkd: teacher must be of a floating dtype");
    }
    check_vector(coefficient, student.size(0), ScalarType::Double, "coefficient");
    if (labels) check_vector(*labels, student.size(0), ScalarType::Long, "labels");
    STD_TORCH_CHECK(teacher || objective.kd_weight == 0, "fastkd: a teacher is needed unless kd_weight is 0");
    STD_TORCH_CHECK(labels || objective.ce_weight == 0, "fastkd: labels are needed unless ce_weight is 0");
    STD_TORCH_CHECK(objective.divergence >= Divergence::kForwardKL && objective.divergence < Divergence::kCount,
                    "fastkd: unknown divergence");
  }

  double* row_results(const Tensor& loss) const {
    check_vector(loss, student.size(0), ScalarType::Double, "loss");
    return static_cast<double*>(loss.data_ptr());
  }

  RowStats* row_statistics(const Tensor& stats) const {
    check_matrix(stats, student.size(0), RowStats::kCount, "stats");
    STD_TORCH_CHECK(stats.is_contiguous() && stats.scalar_type() == ScalarType::Double,
                    "fastkd: stats must be contiguous float64");
    return static_cast<RowStats*>(stats.data_ptr());
  }
};

// Calls body(kernel, row, coefficient) for every row, with the kernel of this divergence and precision.
template <class D, class F, class Body>
void run(const Arguments& a, const Body& body) {
  const bool kd = a.teacher && a.objective.kd_weight != 0;
  const bool ce = a.labels && a.objective.ce_weight != 0;
  const RowKernel<D, F> kernel{Matrix<F>(a.student), kd ? std::optional(Matrix<F>(*a.teacher)) : std::nullopt,
                               ce ? static_cast<const int64_t*>(a.labels->data_ptr()) : nullptr, a.student.size(1),
                               a.objective, Beta<F>(a.objective.beta)};
  const auto* coefficient = static_cast<const double*>(a.coefficient.data_ptr());
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, a.student.size(1)));
  torch::stable::parallel_for(0, a.student.size(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(kernel, row, coefficient[row]);
  });
}

template <class D, class Body>
void for_precision(const Arguments& a, const Body& body) {
  if (a.student.scalar_type() == ScalarType::Double) {
    run<D, double>(a, body);
  } else {
    run<D, float>(a, body);
  }
}

template <class Body>
void for_rows(const Arguments& a, const Body& body) {
  switch (a.objective.divergence) {
    case Divergence::kForwardKL: return for_precision<ForwardKL>(a, body);
    case Divergence::kReverseKL: return for_precision<ReverseKL>(a, body);
    case Divergence::kJSD: return for_precision<JSD>(a, body);
    case Divergence::kSkewKL: return for_precision<SkewKL>(a, body);
    case Divergence::kSkewReverseKL: return for_precision<SkewReverseKL>(a, body);
    default: return for_precision<TVD>(a, body);
  }
}

Objective objective(int64_t divergence, double beta, double temperature, double kd_weight, double ce_weight) {
  return {static_cast<Divergence>(divergence), beta, temperature, kd_weight, ce_weight};
}

// One row's loss; its scores become their gradient.
template <class D, class F>
double loss_and_gradient_(const RowKernel<D, F>& kernel, int64_t row, double weight) {
  if (weight == 0) {
    kernel.zero(row, kernel.student);
    return 0;
  }
  RowStats stats;
  Exponentials<F> kept;
  const double loss = weight * kernel.loss(row, stats, kernel.worth_keeping() ? &kept : nullptr);
  kernel.gradient(row, stats, weight, kernel.student, &kept);
  return loss;
}

// loss [R] = coefficient * loss; `student` becomes its gradient. Rows of coefficient 0 are not read.
void divergence_rows_(Tensor student, std::optional<Tensor> teacher, Tensor coefficient, std::optional<Tensor> labels,
                      Tensor loss, int64_t divergence, double beta, double temperature, double kd_weight,
                      double ce_weight) {
  const Arguments a(student, teacher, coefficient, labels,
                    objective(divergence, beta, temperature, kd_weight, ce_weight));
  double* losses = a.row_results(loss);
  for_rows(a, [&](const auto& kernel, int64_t row, double weight) {
    losses[row] = loss_and_gradient_(kernel, row, weight);
  });
}

// One model's scores, on which attention has yet to put a bias by its diagonals and causality.
struct Unfinished {
  const Tensor& scores;
  const std::optional<Tensor>& diagonals;

  Unfinished(const Tensor& scores, const std::optional<Tensor>& diagonals, int64_t heads)
      : scores(scores), diagonals(diagonals) {
    STD_TORCH_CHECK(scores.is_contiguous() && (scores.scalar_type() == ScalarType::Float ||
                                               scores.scalar_type() == ScalarType::Double),
                    "fastkd: scores must be contiguous float32 or float64");
    if (!diagonals) return;
    STD_TORCH_CHECK(diagonals->dim() == 2 && diagonals->is_contiguous() && diagonals->size(0) == heads &&
                        diagonals->size(1) % 2 == 1 && diagonals->scalar_type() == scores.scalar_type(),
                    "fastkd: diagonals must be contiguous [A, 2 * reach + 1] in the scores' dtype");
  }

  template <class F>
  void finish(int64_t row, int64_t head, int64_t first, bool causal) const {
    const int64_t n = scores.size(1);
    F* x = static_cast<F*>(scores.data_ptr()) + row * n;
    if (diagonals) {
      const int64_t count = diagonals->size(1);
      add_bias(x, static_cast<const F*>(diagonals->data_ptr()) + head * count, n, first, count / 2);
    }
    if (causal) hide_later_keys(x, n, first);
  }
};

// divergence_rows_ of a chunk of attention, [A * R, n]: R queries of each head, the first of them `offset` before the
// first key. Both models' relative biases, and causality, are put on each row just before it is read.
void attention_rows_(Tensor student, Tensor teacher, Tensor coefficient, Tensor loss,
                     std::optional<Tensor> student_diagonals, std::optional<Tensor> teacher_diagonals, int64_t heads,
                     int64_t offset, bool causal, int64_t divergence, double beta) {
  const std::optional<Tensor> given(teacher), labels;
  const Arguments a(student, given, coefficient, labels, objective(divergence, beta, 1, 1, 0));
  STD_TORCH_CHECK(heads > 0 && student.size(0) % heads == 0, "fastkd: there must be as many rows for every head");
  STD_TORCH_CHECK(student.scalar_type() == teacher.scalar_type(), "fastkd: both models' scores must have one dtype");
  const Unfinished both[] = {{student, student_diagonals, heads}, {teacher, teacher_diagonals, heads}};
  const int64_t queries = std::max<int64_t>(1, student.size(0) / heads);
  double* losses = a.row_results(loss);
  for_rows(a, [&]<class D, class F>(const RowKernel<D, F>& kernel, int64_t row, double weight) {
    if (weight != 0) {
      for (const Unfinished& model : both) model.finish<F>(row, row / queries, offset - row % queries, causal);
    }
    losses[row] = loss_and_gradient_(kernel, row, weight);
  });
}

// loss [R] = coefficient * loss, and the statistics [R, 7] from which divergence_gradient starts.
void divergence_stats(Tensor student, std::optional<Tensor> teacher, Tensor coefficient, std::optional<Tensor> labels,
                      Tensor loss, Tensor stats, int64_t divergence, double beta, double temperature, double kd_weight,
                      double ce_weight) {
  const Arguments a(student, teacher, coefficient, labels,
                    objective(divergence, beta, temperature, kd_weight, ce_weight));
  double* losses = a.row_results(loss);
  RowStats* row_stats = a.row_statistics(stats);
  for_rows(a, [&](const auto& kernel, int64_t row, double weight) {
    row_stats[row] = {};
    losses[row] = weight == 0 ? 0 : weight * kernel.loss(row, row_stats[row]);
  });
}

// gradient [R, V] = coefficient * d loss / d student, in any dtype.
void divergence_gradient(Tensor student, std::optional<Tensor> teacher, Tensor stats, Tensor coefficient,
                         std::optional<Tensor> labels, Tensor gradient, int64_t divergence, double beta,
                         double temperature, double kd_weight, double ce_weight) {
  const Arguments a(student, teacher, coefficient, labels,
                    objective(divergence, beta, temperature, kd_weight, ce_weight));
  check_matrix(gradient, student.size(0), student.size(1), "gradient");
  STD_TORCH_CHECK(is_float(gradient.scalar_type()), "fastkd: gradient must be of a floating dtype");
  const RowStats* row_stats = a.row_statistics(stats);
  advise_huge_pages(gradient);
  for_rows(a, [&](const auto& kernel, int64_t row, double weight) {
    const auto target = kernel.view(gradient);
    weight == 0 ? kernel.zero(row, target) : kernel.gradient(row, row_stats[row], weight, target);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("divergence_rows_", TORCH_BOX(&divergence_rows_));
  m.impl("attention_rows_", TORCH_BOX(&attention_rows_));
  m.impl("divergence_stats", TORCH_BOX(&divergence_stats));
  m.impl("divergence_gradient", TORCH_BOX(&divergence_gradient));
}

}  // namespace fastkd
