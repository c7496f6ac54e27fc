// The row primitive on CPUs (row_kernel.h), on the rows of two matrices. Rows are shared out among torch's threads, one row
// to one thread, so that results do not depend on the number of threads.
#include "../stable.h"

#include <algorithm>

#include "huge_pages.h"
#include "row_kernel.h"
#include "subnormals.h"

namespace fastkd {
namespace {

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

  RowMetrics* row_metrics(const std::optional<Tensor>& metrics) const {
    if (!metrics) return nullptr;
    check_matrix(*metrics, student.size(0), RowMetrics::kCount, "metrics");
    STD_TORCH_CHECK(metrics->is_contiguous() && metrics->scalar_type() == ScalarType::Double,
                    "fastkd: metrics must be contiguous float64");
    return static_cast<RowMetrics*>(metrics->data_ptr());
  }
};

// Calls body(kernel), with the kernel of this precision, for what to call with every (row, coefficient).
template <class F, class Body>
void for_rows(const Arguments& a, bool metrics, const Body& body) {
  const bool kd = a.teacher && a.objective.kd_weight != 0;
  const bool ce = a.labels && a.objective.ce_weight != 0;
  const RowKernel<F> kernel{Matrix<F>(a.student), kd ? std::optional(Matrix<F>(*a.teacher)) : std::nullopt,
                            ce ? static_cast<const int64_t*>(a.labels->data_ptr()) : nullptr, a.student.size(1),
                            a.objective, metrics};
  const auto on_row = body(kernel);
  const auto* coefficient = static_cast<const double*>(a.coefficient.data_ptr());
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, a.student.size(1)));
  torch::stable::parallel_for(0, a.student.size(0), grain, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    for (int64_t row = begin; row < end; ++row) on_row(row, coefficient[row]);
  });
}

template <class Body>
void for_rows(const Arguments& a, bool metrics, const Body& body) {
  a.student.scalar_type() == ScalarType::Double ? for_rows<double>(a, metrics, body) : for_rows<float>(a, metrics, body);
}

// loss [R] = coefficient * loss, and the statistics [R, 7] behind it; without a loss, the statistics are given. `gradient`
// [R, V] = coefficient * d loss / d student, in any dtype; it may be the student itself. metrics [R, 6] go with a loss. Rows
// of coefficient 0 are not read.
void divergence_rows(Tensor student, std::optional<Tensor> teacher, Tensor coefficient, std::optional<Tensor> labels,
                      std::optional<Tensor> loss, std::optional<Tensor> stats, std::optional<Tensor> gradient,
                      int64_t divergence, std::vector<double> beta, double temperature, double kd_weight, double ce_weight,
                      std::optional<Tensor> metrics) {
  const Arguments a(student, teacher, coefficient, labels,
                    make_objective(divergence, beta, temperature, kd_weight, ce_weight));
  STD_TORCH_CHECK(loss || !metrics, "fastkd: metrics go with a loss");
  STD_TORCH_CHECK(loss || stats, "fastkd: stats are needed where no loss is asked for");
  double* losses = loss ? a.row_results(*loss) : nullptr;
  RowStats* row_stats = stats ? a.row_statistics(*stats) : nullptr;
  if (gradient) {
    check_matrix(*gradient, student.size(0), student.size(1), "gradient");
    STD_TORCH_CHECK(is_float(gradient->scalar_type()), "fastkd: gradient must be of a floating dtype");
    if (gradient->data_ptr() != student.data_ptr()) advise_huge_pages(*gradient);
  }
  RowMetrics* row_metrics = a.row_metrics(metrics);
  for_rows(a, row_metrics != nullptr, [&]<class F>(const RowKernel<F>& kernel) {
    const auto target = gradient ? std::optional(Matrix<F>(*gradient)) : std::nullopt;
    return [&kernel, target, losses, row_stats, row_metrics](int64_t row, double weight) {
      RowStats own;
      write_row(kernel, row, weight, losses ? losses + row : nullptr, row_stats ? row_stats[row] : own,
                target ? &*target : nullptr, row_metrics ? row_metrics + row : nullptr);
    };
  });
}

// The same statistics of rows that are shards of longer ones, each of its shard alone: RowKernel::shard_statistics.
void divergence_shard_stats(Tensor student, std::optional<Tensor> teacher, Tensor coefficient,
                            std::optional<Tensor> labels, Tensor stats, int64_t divergence, std::vector<double> beta,
                            double temperature, double kd_weight, double ce_weight, std::optional<Tensor> metrics) {
  const Arguments a(student, teacher, coefficient, labels,
                    make_objective(divergence, beta, temperature, kd_weight, ce_weight));
  RowStats* row_stats = a.row_statistics(stats);
  RowMetrics* row_metrics = a.row_metrics(metrics);
  for_rows(a, row_metrics != nullptr, [&](const auto& kernel) {
    return [&kernel, row_stats, row_metrics](int64_t row, double weight) {
      RowMetrics own;
      RowMetrics& told = row_metrics ? row_metrics[row] : own;
      row_stats[row] = {}, told = {};
      if (weight != 0) kernel.shard_statistics(row, row_stats[row], told);
    };
  });
}

// sums [R, 3]: what a shard's columns add to the divergence, the mean of u and that of v, by the statistics of the whole row.
void divergence_shard_sums(Tensor student, std::optional<Tensor> teacher, Tensor stats, Tensor coefficient, Tensor sums,
                           int64_t divergence, std::vector<double> beta, double temperature, double kd_weight, double) {
  const Arguments a(student, teacher, coefficient, std::nullopt, make_objective(divergence, beta, temperature, kd_weight, 0));
  STD_TORCH_CHECK(teacher && kd_weight != 0, "fastkd: sums of a shard need a teacher");
  check_matrix(sums, student.size(0), 3, "sums");
  STD_TORCH_CHECK(sums.is_contiguous() && sums.scalar_type() == ScalarType::Double,
                  "fastkd: sums must be contiguous float64");
  const RowStats* row_stats = a.row_statistics(stats);
  auto* row_sums = static_cast<BlockValue<double>*>(sums.data_ptr());
  for_rows(a, false, [&](const auto& kernel) {
    return [&kernel, row_stats, row_sums](int64_t row, double weight) {
      row_sums[row] = {0, 0, 0};
      if (kernel.loops.value && weight != 0 && !row_stats[row].empty()) row_sums[row] = kernel.values(row, row_stats[row]);
    };
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("divergence_rows", TORCH_BOX(&divergence_rows));
  m.impl("divergence_shard_stats", TORCH_BOX(&divergence_shard_stats));
  m.impl("divergence_shard_sums", TORCH_BOX(&divergence_shard_sums));
}

}  // namespace fastkd
