// The row primitive of top-k teachers on CPUs (topk_row.h), on the rows of a matrix. Rows are shared out among torch's
// threads, one row to one thread, so that results do not depend on the number of threads.
#include "../stable.h"

#include <algorithm>
#include <vector>

#include "huge_pages.h"
#include "topk_row.h"

namespace fastkd {
namespace {

template <class T>
T* vector_of(const std::optional<Tensor>& x, int64_t rows, ScalarType dtype, const char* name) {
  if (!x) return nullptr;
  check_vector(*x, rows, dtype, name);
  return static_cast<T*>(x->data_ptr());
}

template <class T>
T* matrix_of(const Tensor& x, int64_t rows, int64_t columns, ScalarType dtype, const char* name) {
  check_matrix(x, rows, columns, name);
  STD_TORCH_CHECK(x.is_contiguous() && x.scalar_type() == dtype, "fastkd: ", name,
                  " must be contiguous and of its dtype");
  return static_cast<T*>(x.data_ptr());
}

void topk_rows(Tensor student, Tensor ids, Tensor log_probs, std::optional<Tensor> tail_log_prob, Tensor coefficient,
               std::optional<Tensor> labels, std::optional<Tensor> loss, std::optional<Tensor> stats,
               std::optional<Tensor> gradient, std::vector<double> divergences, bool conditional, double beta,
               double temperature, double kd_weight, double ce_weight) {
  STD_TORCH_CHECK(student.dim() == 2 && ids.dim() == 2, "fastkd: student and ids must be matrices");
  const int64_t rows = student.size(0), columns = student.size(1), k = ids.size(1);
  STD_TORCH_CHECK(is_float(student.scalar_type()), "fastkd: student must be of a floating dtype");
  const auto* weights = vector_of<const double>(coefficient, rows, ScalarType::Double, "coefficient");
  STD_TORCH_CHECK(loss || stats, "fastkd: stats are needed where no loss is asked for");
  STD_TORCH_CHECK(labels || ce_weight == 0, "fastkd: labels are needed unless ce_weight is 0");
  auto* losses = vector_of<double>(loss, rows, ScalarType::Double, "loss");
  auto* row_stats =
      stats ? matrix_of<TailStats>(*stats, rows, TailStats::kCount, ScalarType::Double, "stats") : nullptr;
  bool in_place = false;
  if (gradient) {
    check_matrix(*gradient, rows, columns, "gradient");
    STD_TORCH_CHECK(is_float(gradient->scalar_type()), "fastkd: gradient must be of a floating dtype");
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
                     target ? &*target : nullptr, scratch);
      }
    });
  };
  student.scalar_type() == ScalarType::Double ? run.template operator()<double>() : run.template operator()<float>();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("topk_rows", TORCH_BOX(&topk_rows)); }

}  // namespace fastkd
