// The row primitive of top-k teachers on CPUs: one row. What it computes is in fastkd/ops/drivers/topk_rows.py.
//
// The K scores, and the label's, are set aside first: the other columns' exponentials, the tail's, are summed up relative
// to their own maximum, so that a tail has all its digits however little is in it. What the K + 1 categories make of their
// masses is done in double; then every column of the tail has one exponential times one factor for a gradient, and the
// columns that were set aside are written over.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <vector>

#include "matrix.h"
#include "topk_blocks.h"
#include "topk_categories.h"

namespace fastkd {
namespace {

// Divergence, in nats, under which the tail is summed up in double: there the gradient is a small difference of masses.
constexpr double kTailWithCare = 0.1;

// Of the columns that are not set aside: the maximum of their scores, and the sums of e^((s - max) / tau) and e^(s - max).
struct TailStats {
  double max, sum, sum_1;
  static constexpr int64_t kCount = 3;
};

// A line of `metrics` [rows, 6].
struct TopKMetrics {
  double kd, cross_entropy;                 // tau^2 * D and the cross-entropy, without their weights
  double student_entropy, teacher_entropy;  // of the categories, in nats
  double agreement;                         // 1 where no score is higher than that of the teacher's likeliest id
  double student_mass;                      // of the ids, where there is a tail
  static constexpr int64_t kCount = 6;
};

struct TopKObjective {
  std::array<double, kDivergences> divergences;
  bool conditional;
  double beta, tau, kd_weight, ce_weight;
};

// What a thread needs for its rows.
struct TopKScratch {
  std::vector<int64_t> columns;  // set aside: those of the ids that count, and last the label's if it is none of them
  std::vector<double> scores;    // of these
  std::vector<double> log_p;     // of the ids
  std::vector<double> results;   // the gradient at the columns set aside
  std::vector<int64_t> starts, sorted;  // the columns set aside in the order of blocks, and where each block's start
  Categories categories;
  size_t ids;  // how many of them count
};

// The rows of one call; F is the working precision (double for double students, else float).
template <class F>
struct TopKRow {
  Matrix<F> student;
  int64_t columns;
  const int64_t* ids;
  const double* log_probs;  // absent where no id is padding but those of no column
  int64_t k;
  const double* tail_log_prob;  // absent where the teacher has no mass in the tail
  const int64_t* labels;        // absent when ce_weight is 0
  bool separate;                // whether exponentials at a temperature of 1 are summed up, too
  bool in_place;                // the gradient is written over the student, which therefore may be changed
  TopKObjective objective;
  Beta<double> beta;

  bool kd() const { return objective.kd_weight != 0; }
  bool reads_tail() const { return (kd() && !objective.conditional) || labels; }
  bool label_in_range(int64_t row) const { return labels[row] >= 0 && labels[row] < columns; }
  F log2_scale() const { return static_cast<F>(kLog2E / objective.tau); }

  // ---- what is set aside ----------------------------------------------------------------------------------------------

  void set_aside(int64_t row, TopKScratch& w) const {
    w.columns.clear(), w.scores.clear(), w.log_p.clear();
    for (int64_t i = row * k; kd() && i < (row + 1) * k; ++i) {
      if (ids[i] < 0 || ids[i] >= columns || (log_probs && log_probs[i] == kNothing)) continue;
      w.columns.push_back(ids[i]);
      if (log_probs) w.log_p.push_back(log_probs[i]);
    }
    w.ids = w.columns.size();
    if (labels && label_in_range(row) && std::find(w.columns.begin(), w.columns.end(), labels[row]) == w.columns.end()) {
      w.columns.push_back(labels[row]);
    }
    for (const int64_t column : w.columns) w.scores.push_back(student.element(row, column));
    if (!reads_tail()) return;
    if (in_place && student.direct) {
      for (const int64_t column : w.columns) *student.template at<F>(row, column) = static_cast<F>(kNothing);
    } else {
      sort_by_block(w);
    }
  }

  void sort_by_block(TopKScratch& w) const {
    w.starts.assign(columns / kBlock + 2, 0), w.sorted.resize(w.columns.size());
    for (const int64_t column : w.columns) ++w.starts[column / kBlock + 1];
    for (size_t i = 1; i < w.starts.size(); ++i) w.starts[i] += w.starts[i - 1];
    for (const int64_t column : w.columns) w.sorted[w.starts[column / kBlock]++] = column;
    for (size_t i = w.starts.size() - 1; i > 0; --i) w.starts[i] = w.starts[i - 1];
    w.starts[0] = 0;
  }

  // A block of the row's scores, -inf where they were set aside.
  const F* tail(int64_t row, int64_t start, int64_t n, const TopKScratch& w, F* buffer) const {
    const F* s = student.read(row, start, n, buffer);
    if (in_place && student.direct) return s;
    const int64_t begin = w.starts[start / kBlock], end = w.starts[start / kBlock + 1];
    if (begin == end) return s;
    if (s != buffer) std::memcpy(buffer, s, n * sizeof(F));
    for (int64_t i = begin; i < end; ++i) buffer[w.sorted[i] - start] = static_cast<F>(kNothing);
    return buffer;
  }

  // ---- the tail -------------------------------------------------------------------------------------------------------

  TailStats statistics(int64_t row, const TopKScratch& w) const {
    F buffer[kBlock];
    const double inv_tau = 1 / objective.tau;
    TailStats out{kNothing, 0, 0};
    for (int64_t start = 0; start < columns; start += kBlock) {
      const int64_t n = std::min(kBlock, columns - start);
      const F* s = tail(row, start, n, w, buffer);
      student.prefetch(row, start + kBlock, std::min(start + 2 * kBlock, columns));
      const double before = out.max;
      out.max = std::max<double>(before, block_max(s, n));
      if (before != out.max) {
        out.sum *= std::exp((before - out.max) * inv_tau);
        out.sum_1 *= std::exp(before - out.max);
      }
      const F max = static_cast<F>(finite(out.max));
      out.sum += block_tail(s, n, max, log2_scale());
      if (separate) out.sum_1 += block_tail(s, n, max, static_cast<F>(kLog2E));
    }
    if (objective.tau == 1) out.sum_1 = out.sum;
    return out;
  }

  double careful_sum(int64_t row, const TailStats& stats, const TopKScratch& w) const {
    F buffer[kBlock];
    double sum = 0;
    for (int64_t start = 0; start < columns; start += kBlock) {
      const int64_t n = std::min(kBlock, columns - start);
      sum += block_tail_carefully(tail(row, start, n, w, buffer), n, finite(stats.max), kLog2E / objective.tau);
    }
    return sum;
  }

  // ---- the categories -------------------------------------------------------------------------------------------------

  // log of the tail's part of e^(s / tau), the label's column included where it is no id's
  double log_tail(const TailStats& stats, const TopKScratch& w) const {
    const double others = stats.sum == 0 ? kNothing : finite(stats.max) / objective.tau + std::log(stats.sum);
    return w.columns.size() == w.ids ? others : log_add(others, w.scores.back() / objective.tau);
  }

  // The row's divergence; the gradients of the categories, of which the tail's, if it is one, is the last.
  double divergence(int64_t row, const TailStats& stats, TopKScratch& w) const {
    Categories& c = w.categories;
    c.clear();
    for (size_t i = 0; i < w.ids; ++i) c.add(w.scores[i] / objective.tau, w.log_p[i]);
    if (!objective.conditional) {
      const double of_tail = log_tail(stats, w);
      if (of_tail != kNothing) {
        c.add(of_tail, tail_log_prob ? tail_log_prob[row] : kNothing);
      } else if (tail_log_prob) {
        divide_by_sum(c.log_p);
      }
    }
    const bool masses = divide_by_sum(c.log_q);
    if (!masses || std::all_of(c.log_p.begin(), c.log_p.end(), [](double x) { return x == kNothing; })) {
      c.gradient.assign(c.log_q.size(), 0);
      return 0;
    }
    return c.divergence(objective.divergences, beta);
  }

  // Of logarithms; false where there is nothing to divide.
  static bool divide_by_sum(std::vector<double>& logs) {
    double max = kNothing, sum = 0;
    for (const double x : logs) max = std::max(max, x);
    for (const double x : logs) sum += std::exp(x - finite(max));
    if (sum == 0) return false;
    for (double& x : logs) x -= finite(max) + std::log(sum);
    return true;
  }

  // ---- loss and gradient ----------------------------------------------------------------------------------------------

  // Leaves the categories, and their gradients, in `w`, for the row's own.
  double loss(int64_t row, TailStats& stats, TopKMetrics& metrics, TopKScratch& w) const {
    stats = reads_tail() ? statistics(row, w) : TailStats{kNothing, 0, 0};
    metrics = {};
    if (kd()) {
      double d = divergence(row, stats, w);
      if (sizeof(F) == 4 && !objective.conditional && d < kTailWithCare && stats.sum != 0) {
        stats.sum = careful_sum(row, stats, w);
        d = divergence(row, stats, w);
      }
      metrics.kd = objective.tau * objective.tau * d;
    }
    if (labels) metrics.cross_entropy = cross_entropy(row, stats, w);
    return objective.kd_weight * metrics.kd + objective.ce_weight * metrics.cross_entropy;
  }

  // What there is of categories, after `loss`: nothing where there are none.
  void tell(const TailStats& stats, const TopKScratch& w, TopKMetrics& metrics) const {
    const Categories& c = w.categories;
    if (c.q.empty()) return;
    const auto share = [](double x, double log_x) { return log_x == kNothing ? 0 : -x * log_x; };
    for (size_t i = 0; i < c.q.size(); ++i) {
      metrics.student_entropy += share(c.q[i], c.log_q[i]);
      metrics.teacher_entropy += share(std::exp(c.log_p[i]), c.log_p[i]);
      if (i < w.ids && !objective.conditional) metrics.student_mass += c.q[i];
    }
    const size_t first = std::max_element(w.log_p.begin(), w.log_p.end()) - w.log_p.begin();
    const size_t rivals = objective.conditional ? w.ids : w.scores.size();
    double highest = objective.conditional ? kNothing : stats.max;
    for (size_t i = 0; i < rivals; ++i) highest = std::max(highest, w.scores[i]);
    metrics.agreement = first < w.ids && w.scores[first] >= highest;
  }

  // log sum e^s over all columns but the label's
  double log_others(int64_t row, const TailStats& stats, const TopKScratch& w) const {
    double log_sum = stats.sum_1 == 0 ? kNothing : finite(stats.max) + std::log(stats.sum_1);
    for (size_t i = 0; i < w.columns.size(); ++i) {
      if (w.columns[i] != labels[row]) log_sum = log_add(log_sum, w.scores[i]);
    }
    return log_sum;
  }

  double label_score(int64_t row, const TopKScratch& w) const {
    return w.scores[std::find(w.columns.begin(), w.columns.end(), labels[row]) - w.columns.begin()];
  }

  double cross_entropy(int64_t row, const TailStats& stats, const TopKScratch& w) const {
    if (!label_in_range(row)) return std::numeric_limits<double>::quiet_NaN();
    const double score = label_score(row, w);
    return log_add(log_others(row, stats, w) - score, 0);
  }

  // coefficient * d loss / d s, written to `gradient`, which may be `student`; after `loss`, or after `divergence`.
  void gradient(int64_t row, const TailStats& stats, double coefficient, const Matrix<F>& gradient, TopKScratch& w) const {
    const Categories& c = w.categories;
    const bool has_tail = kd() && c.gradient.size() > w.ids;
    const double kd_scale = coefficient * objective.kd_weight * objective.tau;
    w.results.assign(w.columns.size(), 0);
    if (kd()) {
      for (size_t i = 0; i < w.ids; ++i) w.results[i] = kd_scale * c.gradient[i];
    }
    double factor = 0, factor_1 = 0;
    if (has_tail) {
      const double of_tail = log_tail(stats, w), tail_gradient = kd_scale * c.gradient.back();
      factor = tail_gradient * std::exp(finite(stats.max) / objective.tau - of_tail);
      if (stats.sum == 0) factor = 0;
      if (w.columns.size() > w.ids) w.results.back() = tail_gradient * std::exp(w.scores.back() / objective.tau - of_tail);
    }
    if (labels) factor_1 = add_cross_entropy(row, stats, coefficient * objective.ce_weight, w);
    write_tail(row, stats, factor, factor_1, gradient, w);
    write_aside(row, gradient, w);
    if (labels && !label_in_range(row)) put(row, 0, std::numeric_limits<double>::quiet_NaN(), gradient);
  }

  void write_aside(int64_t row, const Matrix<F>& gradient, const TopKScratch& w) const {
    for (size_t i = 0; i < w.columns.size(); ++i) put(row, w.columns[i], w.results[i], gradient);
  }

  static void put(int64_t row, int64_t column, double x, const Matrix<F>& gradient) {
    F buffer;
    *gradient.target(row, column, &buffer) = static_cast<F>(x);
    gradient.write(row, column, 1, &buffer);
  }

  // Adds the cross-entropy's to the columns set aside, and returns its factor of the others' e^(s - max).
  double add_cross_entropy(int64_t row, const TailStats& stats, double scale, TopKScratch& w) const {
    const double others = log_others(row, stats, w);
    const double log_sum = label_in_range(row) ? log_add(others, label_score(row, w)) : others;
    if (log_sum == kNothing) return 0;
    for (size_t i = 0; i < w.columns.size(); ++i) {
      w.results[i] += scale * (w.columns[i] == labels[row] ? -std::exp(others - log_sum) : std::exp(w.scores[i] - log_sum));
    }
    return scale * std::exp(finite(stats.max) - log_sum);
  }

  void write_tail(int64_t row, const TailStats& stats, double factor, double factor_1, const Matrix<F>& gradient,
                  const TopKScratch& w) const {
    F buffer[kBlock], g_buffer[kBlock];
    const bool zero = !reads_tail() || (factor == 0 && factor_1 == 0);
    const bool both = objective.tau != 1 && factor != 0 && factor_1 != 0;
    const bool at_1 = objective.tau == 1 || factor == 0;
    const F max = static_cast<F>(finite(stats.max)), scale = at_1 ? static_cast<F>(kLog2E) : log2_scale();
    for (int64_t start = 0; start < columns; start += kBlock) {
      const int64_t n = std::min(kBlock, columns - start);
      F* g = gradient.target(row, start, g_buffer);
      if (zero) {
        std::fill(g, g + n, F(0));
      } else {
        const F* s = tail(row, start, n, w, buffer);
        student.prefetch(row, start + kBlock, std::min(start + 2 * kBlock, columns));
        if (both) {
          block_tail_gradients(s, g, n, max, scale, static_cast<F>(factor), static_cast<F>(factor_1));
        } else {
          block_tail_gradient(s, g, n, max, scale, static_cast<F>(factor + factor_1));
        }
      }
      gradient.write(row, start, n, g);
    }
  }

  // One row: its loss and statistics, unless they are given, and if wanted its gradient and metrics.
  void write(int64_t row, double weight, double* loss, TailStats& stats, const Matrix<F>* target, TopKMetrics* metrics,
             TopKScratch& w) const {
    if (weight == 0) {  // the row is not read
      if (loss) *loss = 0, stats = {};
      if (metrics) *metrics = {};
      if (target) zero(row, *target);
      return;
    }
    set_aside(row, w);
    if (loss) {
      TopKMetrics own;
      *loss = weight * this->loss(row, stats, own, w);
      if (metrics && kd()) tell(stats, w, own);
      if (metrics) *metrics = own;
    } else if (kd()) {
      divergence(row, stats, w);
    }
    if (target) gradient(row, stats, weight, *target, w);
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

}  // namespace
}  // namespace fastkd
