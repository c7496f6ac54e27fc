// The row primitive on CPUs, for the translation units that run it on rows of their own.
//
// For a pair of score rows (student s, teacher t): the loss
//
//     kd_weight * tau^2 * D(softmax(t / tau), softmax(s / tau)) + ce_weight * cross_entropy(s, label)
//
// times the row's coefficient, and its gradient with respect to s. A row is walked in blocks that fit the first-level
// cache: once for the running maxima and sums of exponentials (online softmax of both models at once), once more for
// the divergences that need normalised probabilities, and once for the gradient. One thread walks a row in a fixed order.
//
// The loops over a block are in row_blocks.h and, where divergences differ, row_loops.h. Rows that are strided or of another
// dtype are copied block by block into a small buffer first.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "matrix.h"
#include "objective.h"
#include "row_blocks.h"
#include "row_metrics.h"

namespace fastkd {
namespace {

// The rows of one call; F is the working precision (double for double students, else float).
template <class F>
struct RowKernel {
  Matrix<F> student;
  std::optional<Matrix<F>> teacher;  // absent when only the cross-entropy is asked for
  const int64_t* labels;             // absent when ce_weight is 0
  int64_t columns;
  Objective objective;
  bool tells_metrics;
  Loops<F> loops = loops_of<F>(objective);
  AllConstants<F> constants = AllConstants<F>(objective.shape);

  static constexpr double kLowest = -std::numeric_limits<double>::infinity();

  // What sums of e^((x - before) / tau) are multiplied with when the running maximum moves to `now`.
  static double rescale(double before, double now, double inv_tau) {
    return before == now ? 1 : std::exp((before - now) * inv_tau);
  }

  // Pass 1: running statistics; returns D where moments give it. Rows whose models nearly agree are summed up with more
  // care: there D and the gradient are small differences of what the plain pass sums up.
  double statistics(int64_t row, RowStats& out, Exponentials<F>* kept, RowMetrics& metrics) const {
    double divergence = statistics(Pass::kPlain, row, out, kept, metrics);
    if (!teacher || out.empty()) return 0;
    if (divergence < kNearlyEqual) {
      divergence = statistics(Pass::kCareful, row, out, kept, metrics);
      out.careful = loops.moment != Moment::kNone;
    }
    if (loops.moment == Moment::kStudent) {
      out.mean = divergence;
      divergence = refined_mean(row, out);
    } else if (loops.moment == Moment::kBoth) {
      divergence = objective.shape.weight(Divergence::kForwardKL) * divergence + refined_mean(row, out);
    }
    return divergence;
  }

  RowConstants<F> row_constants(const RowStats& stats) const {
    return {stats, objective.tau, objective.shape.mean_unit()};
  }

  // The mean of u, where it is a large one of log(q / p) with the digits that were lost: by as much as sum q (u - mean)
  // falls short of its true value, zero.
  double refined_mean(int64_t row, RowStats& stats) const {
    const double unit = objective.shape.mean_unit();
    if (kFarApart * unit < stats.mean && stats.mean < kInfinite * unit) {
      F s_buffer[kBlock], t_buffer[kBlock], g_buffer[kBlock];
      const RowConstants<F> of_row = row_constants(stats);
      const auto gradient = loops.gradient[loops.moment == Moment::kNone && stats.careful];
      double sum = 0;
      for (int64_t start = 0; start < columns; start += kBlock) {
        const int64_t n = std::min(kBlock, columns - start);
        const F* s = student.read(row, start, n, s_buffer);
        gradient(s, teacher->read(row, start, n, t_buffer), g_buffer, n, of_row, constants, 1);
        sum += block_total(g_buffer, n);
      }
      stats.mean += sum;
    }
    return stats.mean;
  }

  // Whether the cross-entropy's sum of exponentials is not the divergence's own.
  bool separate_sum() const { return labels && objective.tau != 1; }

  // Whether a row's exponentials serve its gradient, too: that of a row in one block, where they are relative to its
  // maximum, and of a divergence whose gradient is made of them.
  bool worth_keeping() const { return teacher && !labels && loops.moment != Moment::kNone && columns <= kBlock; }

  // The column of a row's maximum, from 1, by the block that it is in.
  double position(const Matrix<F>& scores, int64_t row, const OwnSum& own, double max) const {
    F buffer[kBlock];
    const int64_t n = std::min(kBlock, columns - own.block);
    const F* x = scores.read(row, own.block, n, buffer);
    return static_cast<double>(own.block + block_position(x, n, static_cast<F>(max)) + 1);
  }

  // The plain pass stops after a first block whose models nearly agree: chances are that the row's do.
  double statistics(Pass pass, int64_t row, RowStats& out, Exponentials<F>* kept, RowMetrics& metrics) const {
    const bool by_student = loops.moment == Moment::kStudent, both = loops.moment == Moment::kBoth;
    const bool careful = pass == Pass::kCareful;
    if (kept) {
      kept->kept = true;
      if (!careful) pass = Pass::kMasked;  // short rows are those of attention, where masked columns are the rule
    }
    const SumLoop<F> sums = sum_loop<F>(loops.moment, pass, tells_metrics, kept != nullptr);
    F s_buffer[kBlock], t_buffer[kBlock];
    const double tau = objective.tau, inv_tau = 1 / tau;
    double max_s = kLowest, max_t = kLowest, sum_s = 0, sum_t = 0, difference = 0, sum_1 = 0, moment = 0, student_moment = 0;
    OwnSum own_s, own_t;
    const auto divergence = [&] { return divergence_of(by_student, moment, sum_s, sum_t); };
    for (int64_t start = 0; start < columns; start += kBlock) {
      const int64_t n = std::min(kBlock, columns - start);
      const double before_s = max_s, before_t = max_t;
      const F* s = student.read(row, start, n, s_buffer);
      student.prefetch(row, start + kBlock, std::min(start + 2 * kBlock, columns));
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
      teacher->prefetch(row, start + kBlock, std::min(start + 2 * kBlock, columns));
      const RowConstants<F> constants({finite(max_s), 1, finite(max_t), 1, 0, 0, 1}, tau);
      BlockSums<F> block = sums(s, t, n, constants, kept);
      if (pass == Pass::kPlain && !std::isfinite(block.moment)) {
        block = sum_loop<F>(loops.moment, Pass::kMasked, tells_metrics, false)(s, t, n, constants, nullptr);
      }
      if (separate_sum()) sum_1 += block_sum(s, n, constants.max_s);

      const double s_factor = rescale(before_s, max_s, inv_tau), t_factor = rescale(before_t, max_t, inv_tau);
      // log_ratio is relative to both maxima, so the moment follows when either moves
      const double moved = inv_tau * (finite(before_t) - finite(before_s) - finite(max_t) + finite(max_s));
      moment = (by_student ? s_factor * (moment - sum_s * moved) : t_factor * (moment + sum_t * moved)) + block.moment;
      if (careful) moment += by_student ? block.difference : -block.difference;
      if (both) {
        student_moment = s_factor * (student_moment - sum_s * moved) + block.student_moment;
        if (careful) student_moment += block.difference;
      }
      if (tells_metrics) {
        const double lower_s = inv_tau * (finite(max_s) - finite(before_s));
        const double lower_t = inv_tau * (finite(max_t) - finite(before_t));
        own_s.add(start, max_s > before_s, s_factor, sum_s, lower_s, block.student_own);
        own_t.add(start, max_t > before_t, t_factor, sum_t, lower_t, block.teacher_own);
      }
      difference = s_factor * difference + (s_factor - t_factor) * sum_t + block.difference;
      sum_t = t_factor * sum_t + block.teacher;
      // the summed difference has more digits than the difference of two sums
      sum_s = careful ? sum_t + difference : s_factor * sum_s + block.student;
      const bool only_masked = sum_s == 0 || sum_t == 0;
      const bool more = start + n < columns;
      if (!careful && start == 0 && more && !only_masked && divergence() < kNearlyEqual) break;
    }
    out = {max_s, sum_s, max_t, sum_t, 0, 0, teacher && !separate_sum() ? sum_s : sum_1};
    if (both) {
      out.mean = objective.shape.weight(Divergence::kReverseKL) * divergence_of(true, student_moment, sum_s, sum_t);
    }
    if (tells_metrics) {
      if (teacher) {  // of each model by itself: in a shard one may have a distribution where the other has none
        metrics = {0, 0, own_s.entropy(sum_s), own_t.entropy(sum_t), position(student, row, own_s, max_s),
                   position(*teacher, row, own_t, max_t)};
      }
    }
    return divergence();  // of no meaning without a teacher, or where out.empty()
  }

  // Pass 2, for divergences without a closed form: the sums that make D and the mean of u.
  BlockValue<double> values(int64_t row, const RowStats& stats) const {
    F s_buffer[kBlock], t_buffer[kBlock];
    const RowConstants<F> of_row = row_constants(stats);
    BlockValue<double> sums{0, 0, 0};
    for (int64_t start = 0; start < columns; start += kBlock) {
      const int64_t n = std::min(kBlock, columns - start);
      const F* s = student.read(row, start, n, s_buffer);
      const BlockValue<F> block = loops.value(s, teacher->read(row, start, n, t_buffer), n, of_row, constants);
      sums.value += block.value;
      sums.slope += block.slope;
      sums.coslope += block.coslope;
    }
    return sums;
  }

  // D, and the mean of u into `stats`.
  double value(int64_t row, RowStats& stats) const {
    const BlockValue<double> sums = values(row, stats);
    stats.careful = sums.coslope < sums.slope;
    stats.mean = stats.careful ? -sums.coslope : sums.slope;
    if (objective.shape.weight(Divergence::kReverseKL) != 0) refined_mean(row, stats);
    return sums.value;
  }

  // Pass 1 over a shard of a row's columns, as if it were all of them; `mean` is the shard's own D where the sums give it.
  void shard_statistics(int64_t row, RowStats& stats, RowMetrics& metrics) const {
    const double divergence = statistics(row, stats, nullptr, metrics);
    const bool chained = loops.moment == Moment::kTeacher || loops.moment == Moment::kStudent;
    stats.mean = chained ? divergence : 0;
    if (labels && label_in_range(row)) sharpen_sum_at_label(row, stats);
  }

  // Passes 1 and 2: the row's loss, before its coefficient.
  double loss(int64_t row, RowStats& stats, RowMetrics& metrics, Exponentials<F>* kept = nullptr) const {
    double divergence = statistics(row, stats, kept, metrics);
    if (loops.moment == Moment::kNone && teacher && !stats.empty()) divergence = value(row, stats);
    if (labels && label_in_range(row)) sharpen_sum_at_label(row, stats);
    if (stats.empty()) metrics = {};
    divergence = with_infinity(divergence);
    if (loops.moment != Moment::kTeacher) stats.mean = with_infinity(stats.mean);  // the gradient becomes NaN
    double loss = teacher ? objective.kd_weight * objective.tau * objective.tau * divergence : 0;
    if (labels) loss += objective.ce_weight * (metrics.cross_entropy = cross_entropy(row, stats));
    if (teacher) metrics.kd = objective.tau * objective.tau * divergence;
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
    const RowConstants<F> of_row = row_constants(stats);
    const bool kd = teacher && !stats.empty();
    const bool ce = labels && stats.sum_1 != 0;
    const bool careful = stats.careful != 0;
    const F surplus = static_cast<F>(stats.sum_s / stats.sum_t - 1);
    const F kd_scale = static_cast<F>(coefficient * objective.kd_weight * objective.tau);
    const F ce_scale = static_cast<F>(coefficient * objective.ce_weight / stats.sum_1);
    const F at_label = ce ? label_gradient(row, stats, coefficient, of_row, kd, kd_scale) : F(0);
    for (int64_t start = 0; start < columns; start += kBlock) {
      const int64_t n = std::min(kBlock, columns - start);
      const F* s = student.read(row, start, n, s_buffer);
      student.prefetch(row, start + kBlock, std::min(start + 2 * kBlock, columns));
      F* g = gradient.target(row, start, g_buffer);
      if (kd) {
        const F* t = teacher->read(row, start, n, t_buffer);
        teacher->prefetch(row, start + kBlock, std::min(start + 2 * kBlock, columns));
        F* kd_target = ce ? g_buffer : g;  // s is needed once more where the cross-entropy adds to it
        if (kept && kept->kept) {
          loops.gradient_kept[careful](s, t, g, n, of_row, constants, *kept, surplus, kd_scale);
        } else {
          loops.gradient[careful](s, t, kd_target, n, of_row, constants, kd_scale);
        }
        if (ce) block_kd_and_softmax(s, kd_target, g, n, of_row.max_s, ce_scale);
      } else if (ce) {
        block_softmax(s, g, n, of_row.max_s, ce_scale);
      } else {
        std::fill(g, g + n, F(0));
      }
      gradient.write(row, start, n, g);
    }
    if (ce && labels[row] != kElsewhere) {
      const int64_t column = label_in_range(row) ? labels[row] : 0;
      *gradient.target(row, column, g_buffer) = at_label;
      gradient.write(row, column, 1, &at_label);
    }
  }

  // The label's own column is done apart and in double: softmax - 1 would lose every digit of a confident student. NaN for
  // a label out of range.
  F label_gradient(int64_t row, const RowStats& stats, double coefficient, const RowConstants<F>& of_row, bool kd,
                   F kd_scale) const {
    if (!label_in_range(row)) return std::numeric_limits<F>::quiet_NaN();
    const F s = student.element(row, labels[row]);
    const double exponential = std::exp(static_cast<double>(s) - stats.max_s);
    double g = coefficient * objective.ce_weight * (exponential - stats.sum_1) / stats.sum_1;
    if (kd) {
      const F t = teacher->element(row, labels[row]);
      F of_kd;
      loops.gradient[stats.careful != 0](&s, &t, &of_kd, 1, of_row, constants, kd_scale);
      g += of_kd;
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

// One row: its loss, statistics and metrics, unless they are given, and its gradient, if wanted, which may be written over
// its scores.
template <class F>
void write_row(const RowKernel<F>& kernel, int64_t row, double weight, double* loss, RowStats& stats,
               const Matrix<F>* gradient, RowMetrics* metrics = nullptr) {
  RowMetrics own;
  RowMetrics& told = metrics ? *metrics : own;
  if (weight == 0) {  // the row is not read
    if (loss) *loss = 0, stats = {}, told = {};
    if (gradient) kernel.zero(row, *gradient);
    return;
  }
  Exponentials<F> kept;
  if (loss) {
    stats = {}, told = {};
    *loss = weight * kernel.loss(row, stats, told, gradient && kernel.worth_keeping() ? &kept : nullptr);
  }
  if (gradient) kernel.gradient(row, stats, weight, *gradient, &kept);
}

}  // namespace
}  // namespace fastkd
