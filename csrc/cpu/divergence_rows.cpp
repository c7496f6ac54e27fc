// The row primitive on CPUs (row_kernel.h), on the rows of two matrices. Rows are shared out among torch's threads, one row
// to one thread, so that results do not depend on the number of threads.
#include "../stable.h"

#include <algorithm>

#include "huge_pages.h"
#include "row_kernel.h"
#include "subnormals.h"

namespace fastkd {
namespace {

// What is given of loss [R], statistics [R, 7], gradient [R, V], metrics [R, 6] and sums [R, 3] is written, but statistics
// are read where there is no loss. With nothing but statistics and metrics, these are of shards of rows, each of its shard
// alone. The gradient has any float dtype, and may be the student itself. Rows of coefficient 0 are not read.
void divergence_rows(Tensor student, std::optional<Tensor> teacher, Tensor coefficient, std::optional<Tensor> labels,
                     std::optional<Tensor> loss, std::optional<Tensor> stats, std::optional<Tensor> gradient,
                     int64_t divergence, std::vector<double> beta, double temperature, double kd_weight, double ce_weight,
                     std::optional<Tensor> metrics, std::optional<Tensor> sums) {
  const Objective objective = make_objective(divergence, beta, temperature, kd_weight, ce_weight);
  const int64_t rows = student.size(0), columns = student.size(1);
  const bool kd = kd_weight != 0, ce = ce_weight != 0, shard = !loss && !gradient && !sums;
  STD_TORCH_CHECK(teacher || !kd, "fastkd: a teacher is needed unless kd_weight is 0");
  STD_TORCH_CHECK(labels || !ce, "fastkd: labels are needed unless ce_weight is 0");
  STD_TORCH_CHECK(loss || stats, "fastkd: stats are needed where no loss is asked for");
  STD_TORCH_CHECK(loss || shard || !metrics, "fastkd: metrics go with a loss, or with the statistics of shards");
  STD_TORCH_CHECK(!sums || (kd && !loss), "fastkd: sums of a shard need a teacher and statistics of the whole row");
  check_scores(student, rows, columns, "student");
  check_scores(teacher, rows, columns, "teacher");
  check_scores(gradient, rows, columns, "gradient");
  const auto* weights = vector_of<const double>(coefficient, rows, ScalarType::Double, "coefficient");
  const auto* row_labels = vector_of<const int64_t>(labels, rows, ScalarType::Long, "labels");
  auto* losses = vector_of<double>(loss, rows, ScalarType::Double, "loss");
  auto* row_stats = matrix_of<RowStats>(stats, rows, RowStats::kCount, ScalarType::Double, "stats");
  auto* row_metrics = matrix_of<RowMetrics>(metrics, rows, RowMetrics::kCount, ScalarType::Double, "metrics");
  auto* row_sums = matrix_of<BlockValue<double>>(sums, rows, 3, ScalarType::Double, "sums");
  if (gradient && gradient->data_ptr() != student.data_ptr()) advise_huge_pages(*gradient);

  const auto run = [&]<class F>() {
    const RowKernel<F> kernel{Matrix<F>(student), kd ? std::optional(Matrix<F>(*teacher)) : std::nullopt,
                              ce ? row_labels : nullptr, columns, objective, metrics.has_value()};
    const auto target = gradient ? std::optional(Matrix<F>(*gradient)) : std::nullopt;
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns));
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      const FlushSubnormals flush;
      for (int64_t row = begin; row < end; ++row) {
        RowStats own;
        RowMetrics own_metrics;
        RowStats& of_row = row_stats ? row_stats[row] : own;
        RowMetrics& told = row_metrics ? row_metrics[row] : own_metrics;
        if (shard) {
          of_row = {}, told = {};
          if (weights[row] != 0) kernel.shard_statistics(row, of_row, told);
        }
        if (row_sums) {
          const bool any = kernel.loops.value && weights[row] != 0 && !of_row.empty();
          row_sums[row] = any ? kernel.values(row, of_row) : BlockValue<double>{0, 0, 0};
        }
        if (losses || target) {
          write_row(kernel, row, weights[row], losses ? losses + row : nullptr, of_row, target ? &*target : nullptr, &told);
        }
      }
    });
  };
  student.scalar_type() == ScalarType::Double ? run.template operator()<double>() : run.template operator()<float>();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("divergence_rows", TORCH_BOX(&divergence_rows));
}

}  // namespace fastkd
