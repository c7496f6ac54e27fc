// The row primitive of top-k teachers on CPUs (topk_row.h), on the rows of a matrix. Rows are shared out among torch's
// threads, one row to one thread, so that results do not depend on the number of threads.
#include "../stable.h"

#include <algorithm>
#include <vector>

#include "huge_pages.h"
#include "topk_row.h"

namespace fastkd {
namespace {

void topk_rows(Tensor student, Tensor ids, Tensor log_probs, std::optional<Tensor> tail_log_prob, Tensor coefficient,
               std::optional<Tensor> labels, std::optional<Tensor> loss, std::optional<Tensor> stats,
               std::optional<Tensor> gradient, std::vector<double> divergences, bool conditional, double beta,
               double temperature, double kd_weight, double ce_weight, std::optional<Tensor> metrics) {
  STD_TORCH_CHECK(student.dim() == 2 && ids.dim() == 2, "fastkd: student and ids must be matrices");
  const int64_t rows = student.size(0), columns = student.size(1), k = ids.size(1);
  check_scores(student, rows, columns, "student");
  const auto* weights = vector_of<const double>(coefficient, rows, ScalarType::Double, "coefficient");
  STD_TORCH_CHECK(loss || stats, "fastkd: stats are needed where no loss is asked for");
  STD_TORCH_CHECK(loss || !metrics, "fastkd: metrics of rows go with a loss");
  STD_TORCH_CHECK(labels || ce_weight == 0, "fastkd: labels are needed unless ce_weight is 0");
  auto* losses = vector_of<double>(loss, rows, ScalarType::Double, "loss");
  auto* row_stats = matrix_of<TailStats>(stats, rows, TailStats::kCount, ScalarType::Double, "stats");
  auto* row_metrics = matrix_of<TopKMetrics>(metrics, rows, TopKMetrics::kCount, ScalarType::Double, "metrics");
  bool in_place = false;
  if (gradient) {
    check_scores(gradient, rows, columns, "gradient");
    in_place = gradient->data_ptr() == student.data_ptr();
    if (!in_place) advise_huge_pages(*gradient);
  }
  TopKObjective objective{{}, conditional, beta, temperature, kd_weight, ce_weight};
  STD_TORCH_CHECK(divergences.size() == objective.divergences.size(), "fastkd: a weight is needed for each divergence");
  std::copy(divergences.begin(), divergences.end(), objective.divergences.begin());

  const auto run = [&]<class F>() {
    const TopKRow<F> kernel{Matrix<F>(student),
                            columns,
                            matrix_of<const int64_t>(ids, rows, k, ScalarType::Long, "ids"),
                            matrix_of<const double>(log_probs, rows, k, ScalarType::Double, "log_probs"),
                            k,
                            vector_of<const double>(tail_log_prob, rows, ScalarType::Double, "tail_log_prob"),
                            ce_weight != 0 ? vector_of<const int64_t>(labels, rows, ScalarType::Long, "labels") : nullptr,
                            labels && ce_weight != 0 && temperature != 1,
                            in_place,
                            objective,
                            Beta<double>(beta)};
    const auto target = gradient ? std::optional(Matrix<F>(*gradient)) : std::nullopt;
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns));
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      TopKScratch scratch;
      for (int64_t row = begin; row < end; ++row) {
        TailStats own;
        kernel.write(row, weights[row], losses ? losses + row : nullptr, row_stats ? row_stats[row] : own,
                     target ? &*target : nullptr, row_metrics ? row_metrics + row : nullptr, scratch);
      }
    });
  };
  student.scalar_type() == ScalarType::Double ? run.template operator()<double>() : run.template operator()<float>();
}

// ---- of shards of rows: what fastkd/ops/drivers/topk_shards.py puts together ---------------------------------------------

// Calls run(kernel, row, weight, scratch) for the rows of a shard, whose ids, where they are not -1, are set aside.
template <class F, class Run>
void for_shards(const Tensor& student, const Tensor& ids, const Tensor& coefficient, double temperature, bool in_place,
                const Run& run) {
  STD_TORCH_CHECK(student.dim() == 2 && ids.dim() == 2, "fastkd: student and ids must be matrices");
  const int64_t rows = student.size(0), columns = student.size(1), k = ids.size(1);
  TopKObjective objective{{}, false, 0, temperature, 1, 0};
  const auto* weights = vector_of<const double>(coefficient, rows, ScalarType::Double, "coefficient");
  const TopKRow<F> kernel{Matrix<F>(student),
                          columns,
                          matrix_of<const int64_t>(ids, rows, k, ScalarType::Long, "ids"),
                          nullptr,
                          k,
                          nullptr,
                          nullptr,
                          temperature != 1,
                          in_place,
                          objective,
                          Beta<double>(0.5)};
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    TopKScratch scratch;
    for (int64_t row = begin; row < end; ++row) run(kernel, row, weights[row], scratch);
  });
}

void topk_shard_stats(Tensor student, Tensor ids, Tensor coefficient, Tensor stats, double temperature) {
  auto* out = matrix_of<TailStats>(stats, student.size(0), TailStats::kCount, ScalarType::Double, "stats");
  const auto write = [&](const auto& kernel, int64_t row, double weight, TopKScratch& scratch) {
    if (weight == 0) {
      out[row] = {};
      return;
    }
    kernel.set_aside(row, scratch);
    out[row] = kernel.statistics(row, scratch);
    // no shard knows whether the models nearly agree
    if (out[row].sum != 0) out[row].sum = kernel.careful_sum(row, out[row], scratch);
    if (temperature == 1) out[row].sum_1 = out[row].sum;
  };
  check_scores(student, student.size(0), student.size(1), "student");
  student.scalar_type() == ScalarType::Double ? for_shards<double>(student, ids, coefficient, temperature, false, write)
                                              : for_shards<float>(student, ids, coefficient, temperature, false, write);
}

void topk_shard_gradient(Tensor student, Tensor ids, Tensor coefficient, Tensor stats, Tensor factors, Tensor at_ids,
                         Tensor gradient, double temperature) {
  const int64_t rows = student.size(0), k = ids.size(1);
  check_scores(student, rows, student.size(1), "student");
  check_scores(gradient, rows, student.size(1), "gradient");
  const auto* own = matrix_of<const TailStats>(stats, rows, TailStats::kCount, ScalarType::Double, "stats");
  const auto* both = matrix_of<const double>(factors, rows, 2, ScalarType::Double, "factors");
  const auto* values = matrix_of<const double>(at_ids, rows, k, ScalarType::Double, "at_ids");
  const auto write = [&]<class F>(const TopKRow<F>& kernel, int64_t row, double weight, TopKScratch& scratch) {
    const Matrix<F> target(gradient);
    if (weight == 0) return kernel.zero(row, target);
    kernel.set_aside(row, scratch);
    scratch.results.clear();
    for (int64_t i = row * k; i < (row + 1) * k; ++i) {
      if (kernel.ids[i] >= 0 && kernel.ids[i] < kernel.columns) scratch.results.push_back(values[i]);
    }
    kernel.write_tail(row, own[row], both[2 * row], both[2 * row + 1], target, scratch);
    kernel.write_aside(row, target, scratch);
  };
  const bool in_place = gradient.data_ptr() == student.data_ptr();
  student.scalar_type() == ScalarType::Double ? for_shards<double>(student, ids, coefficient, temperature, in_place, write)
                                              : for_shards<float>(student, ids, coefficient, temperature, in_place, write);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("topk_rows", TORCH_BOX(&topk_rows));
  m.impl("topk_shard_stats", TORCH_BOX(&topk_shard_stats));
  m.impl("topk_shard_gradient", TORCH_BOX(&topk_shard_gradient));
}

}  // namespace fastkd
