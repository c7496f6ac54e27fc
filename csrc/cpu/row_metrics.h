// What the row primitive on CPUs (row_kernel.h) tells of a row beside its loss.
#pragma once

#include <cmath>
#include <cstdint>

namespace fastkd {
namespace {

// A line of `metrics` [rows, 6]. Of a shard of a row, what is of it alone.
struct RowMetrics {
  double kd, cross_entropy;                 // tau^2 * D and the cross-entropy, without their weights
  double student_entropy, teacher_entropy;  // in nats, at tau
  double student_top, teacher_top;          // the columns, from 1, of the highest scores: of those as high the first
  static constexpr int64_t kCount = 6;
};

// Running, of one model: the sum of e log e over its exponentials e, and the block of columns that its maximum is in.
struct OwnSum {
  double sum = 0;
  int64_t block = 0;

  // A block's share. When the maximum has moved, exponentials so far, of sum `before`, are `factor` times what they were,
  // and their logarithms lower by `lower`.
  void add(int64_t start, bool moved, double factor, double before, double lower, double of_block) {
    sum = factor * (sum - before * lower) + of_block;
    if (moved) block = start;
  }

  double entropy(double exponentials) const {
    if (exponentials == 0) return 0;
    const double nats = std::log(exponentials) - sum / exponentials;
    return nats < 0 ? 0 : nats;  // NaN passes
  }
};

}  // namespace
}  // namespace fastkd
