// The row primitive on GPUs (row_kernel.h): what cpu/divergence_rows.cpp is on CPUs.
//
// It takes what linear_kl and logit_kl mostly give it: both models in the same dtype of at most four bytes, the gradient in
// it or, of float32, in one of 16 bits, and columns that lie side by side. The Triton kernel takes the rest.
#include <algorithm>

#include "row_kernel.h"

namespace fastkd {
namespace {

using namespace cuda;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kMostBlocks = 16;     // of a cluster
constexpr int kPortableBlocks = 8;  // what every device with clusters has room for
constexpr int kReserved = 1024;     // bytes of a multiprocessor's shared memory that each block costs beside its own
constexpr int64_t kMostColumns = 1 << 30;

void check_rows(const std::optional<Tensor>& x, const Tensor& student, const char* name) {
  if (!x) return;
  check_matrix(*x, student.size(0), student.size(1), name);
  STD_TORCH_CHECK(x->stride(1) == 1 || x->size(1) == 1, "fastkd: the columns of ", name, " must lie side by side");
  const ScalarType dtype = x->scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "fastkd: ",
                  name, " must be float32, float16 or bfloat16");
}

// Rows shared out: `blocks` of a cluster keep each, its chunks in whole steps of all threads, or one block that keeps none
// where it is 0.
template <class T>
Launch launch_of(Arguments& a, int64_t rows, int blocks, const Device& device) {
  const int cluster = std::max(1, blocks), step = cluster * kTogether * kThreads, n = Chunk<T>::kSize;
  const int chunks = (a.columns + 2 * n - 2) / n;  // wherever in its first chunk a row begins
  a.kept = blocks > 0;
  a.chunks = (chunks + step - 1) / step * kTogether * kThreads;
  const int64_t slots = (a.teacher == nullptr ? 1 : 2) * int64_t{a.kept ? a.chunks : kRing};
  return {rows * cluster, kThreads, cluster, static_cast<int64_t>(sizeof(Exchange)) + slots * 16, device.shared_memory};
}

// The fewest blocks that keep a row and leave room for others beside them, as many as rows_kernel is compiled for or else
// fewer; and where even the largest cluster is too small for a row, or one pass is enough, one block that does not keep it.
template <class D, class T>
Launch share_out(Arguments& a, int64_t rows, int64_t blocks_asked_for, const Device& device) {
  if (a.loss == nullptr) return launch_of<T>(a, rows, 0, device);
  if (blocks_asked_for >= 0) return launch_of<T>(a, rows, static_cast<int>(blocks_asked_for), device);
  if (a.gradient == nullptr && RowKernel<D, T>::kOnePass) return launch_of<T>(a, rows, 0, device);
  const int most = device.major >= 9 ? kMostBlocks : 1;
  for (int beside = RowKernel<D, T>::kBeside; beside > 0; --beside) {
    for (int blocks = 1; blocks <= most; blocks *= 2) {
      const Launch launch = launch_of<T>(a, rows, blocks, device);
      const bool room = launch.shared_bytes <= (device.shared_memory + kReserved) / beside - kReserved;
      if (room && (blocks <= kPortableBlocks || fits(rows_kernel<D, T>, launch))) return launch;
    }
  }
  return launch_of<T>(a, rows, 0, device);
}

template <class D>
void launch(Arguments& a, const Tensor& student, int64_t blocks) {
  const auto launch_of_dtype = [&]<class T>(T) {
    run(rows_kernel<D, T>, share_out<D, T>(a, student.size(0), blocks, device_of(student)), student, a);
  };
  switch (student.scalar_type()) {
    case ScalarType::Float: return launch_of_dtype(float());
    case ScalarType::Half: return launch_of_dtype(Half());
    default: return launch_of_dtype(BFloat16());
  }
}

// loss [R] = coefficient * loss, and the statistics [R, 7] behind it; without a loss, the statistics are given. `gradient`
// [R, V] = coefficient * d loss / d student; it may be the student itself. `blocks` overrides how rows are shared out: the
// blocks of a cluster that keep one, or 0 for one block that keeps nothing; -1 leaves it to share_out.
void divergence_rows_cuda(Tensor student, std::optional<Tensor> teacher, Tensor coefficient, std::optional<Tensor> labels,
                          std::optional<Tensor> loss, std::optional<Tensor> stats, std::optional<Tensor> gradient,
                          int64_t divergence, double beta, double temperature, double kd_weight, double ce_weight,
                          int64_t blocks) {
  STD_TORCH_CHECK(teacher || kd_weight == 0, "fastkd: a teacher is needed unless kd_weight is 0");
  STD_TORCH_CHECK(labels || ce_weight == 0, "fastkd: labels are needed unless ce_weight is 0");
  STD_TORCH_CHECK(loss || stats, "fastkd: stats are needed where no loss is asked for");
  STD_TORCH_CHECK(blocks >= -1 && blocks <= kMostBlocks, "fastkd: blocks must be -1 to 16");
  STD_TORCH_CHECK(divergence >= 0 && divergence < kDivergences, "fastkd: unknown divergence");
  const int64_t rows = student.size(0), columns = student.size(1);
  STD_TORCH_CHECK(columns > 0 && columns <= kMostColumns, "fastkd: too few or too many columns");
  if (kd_weight == 0) teacher.reset();
  if (ce_weight == 0) labels.reset();
  check_rows(student, student, "student");
  check_rows(teacher, student, "teacher");
  check_rows(gradient, student, "gradient");
  const ScalarType dtype = student.scalar_type();
  STD_TORCH_CHECK(!teacher || teacher->scalar_type() == dtype, "fastkd: teacher must have the student's dtype");
  STD_TORCH_CHECK(!gradient || dtype == ScalarType::Float || gradient->scalar_type() == dtype,
                  "fastkd: gradient must have the student's dtype, unless that is float32");

  Arguments a{};
  a.student = student.data_ptr(), a.student_stride = student.stride(0), a.columns = static_cast<int>(columns);
  if (teacher) a.teacher = teacher->data_ptr(), a.teacher_stride = teacher->stride(0);
  if (gradient) {
    a.gradient = gradient->data_ptr(), a.gradient_stride = gradient->stride(0);
    a.gradient_type = gradient->scalar_type();
  }
  a.coefficient = vector_of<const double>(coefficient, rows, ScalarType::Double, "coefficient");
  a.labels = vector_of<const int64_t>(labels, rows, ScalarType::Long, "labels");
  a.loss = vector_of<double>(loss, rows, ScalarType::Double, "loss");
  a.stats = matrix_of<RowStats>(stats, rows, RowStats::kCount, ScalarType::Double, "stats");
  a.beta = beta, a.tau = temperature, a.kd_weight = kd_weight, a.ce_weight = ce_weight;
  if (rows == 0) return;
  const DeviceGuard guard(student.get_device_index());
  if (!teacher) return launch<void>(a, student, blocks);
  with_divergence(divergence, [&](auto member) { launch<decltype(member)>(a, student, blocks); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, FASTKD_DEVICE_KEY, m) {
  m.impl("divergence_rows_cuda", TORCH_BOX(&divergence_rows_cuda));
}

}  // namespace fastkd
