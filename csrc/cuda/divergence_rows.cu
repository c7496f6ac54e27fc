// The row primitive on GPUs (row_kernel.h): what cpu/divergence_rows.cpp is on CPUs.
//
// It takes what linear_kl and logit_kl mostly give it: both models in the same dtype of at most four bytes, and columns
// that lie side by side. The Triton kernel takes the rest.
#include <algorithm>

#include "../stable.h"
#include "row_kernel.h"

#if !defined(FASTKD_DEVICE_KEY)
#define FASTKD_DEVICE_KEY CUDA
#endif

namespace fastkd {
namespace {

using namespace cuda;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kMostBlocks = 16;         // of a cluster
constexpr int kPortableBlocks = 8;      // what every device with clusters has room for
constexpr int kReserved = 1024;         // bytes of a multiprocessor's shared memory that each block costs beside its own
constexpr int64_t kMostColumns = 1 << 30;

void check_rows(const Tensor& x, const Tensor& student, const char* name) {
  check_matrix(x, student.size(0), student.size(1), name);
  STD_TORCH_CHECK(x.stride(1) == 1 || x.size(1) == 1, "fastkd: the columns of ", name, " must lie side by side");
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "fastkd: ",
                  name, " must be float32, float16 or bfloat16");
}

Arguments arguments_of(const Tensor& student, const std::optional<Tensor>& teacher, const Tensor& coefficient,
                       const std::optional<Tensor>& labels, const std::optional<Tensor>& loss,
                       const std::optional<Tensor>& stats, const std::optional<Tensor>& gradient) {
  const int64_t rows = student.size(0);
  check_rows(student, student, "student");
  STD_TORCH_CHECK(student.size(1) > 0 && student.size(1) <= kMostColumns, "fastkd: too few or too many columns");
  if (teacher) {
    check_rows(*teacher, student, "teacher");
    STD_TORCH_CHECK(teacher->scalar_type() == student.scalar_type(), "fastkd: teacher must have the student's dtype");
  }
  STD_TORCH_CHECK(loss || stats, "fastkd: stats are needed where no loss is asked for");
  if (gradient) check_rows(*gradient, student, "gradient");

  Arguments a{};
  a.student = student.data_ptr(), a.student_stride = student.stride(0);
  a.columns = static_cast<int>(student.size(1));
  a.coefficient = vector_of<const double>(coefficient, rows, ScalarType::Double, "coefficient");
  a.labels = vector_of<const int64_t>(labels, rows, ScalarType::Long, "labels");
  a.loss = vector_of<double>(loss, rows, ScalarType::Double, "loss");
  a.stats = matrix_of<RowStats>(stats, rows, RowStats::kCount, ScalarType::Double, "stats");
  if (teacher) a.teacher = teacher->data_ptr(), a.teacher_stride = teacher->stride(0);
  if (gradient) {
    a.gradient = gradient->data_ptr(), a.gradient_stride = gradient->stride(0);
    a.gradient_type = gradient->scalar_type();
  }
  return a;
}

// How a row is shared out: `blocks` of a cluster, and whether each keeps its part in shared memory.
struct Sharing {
  int blocks;
  bool kept;
};

// The chunks that fall to each of so many blocks, wherever in its first chunk a row begins: whole steps of all threads.
template <class T>
int chunks_of_block(int columns, int blocks) {
  const int n = Chunk<T>::kSize, step = kTogether * kThreads;
  return ((columns + 2 * n - 2) / n + blocks * step - 1) / (blocks * step) * step;
}

template <class T>
Launch launch_of(const Arguments& a, int64_t rows, Sharing sharing, const Device& device) {
  const int models = a.teacher == nullptr ? 1 : 2;
  const int chunks = sharing.kept ? chunks_of_block<T>(a.columns, sharing.blocks) : kRing;
  const int shared_bytes = static_cast<int>(sizeof(Exchange)) + models * chunks * 16;
  return {rows * sharing.blocks, kThreads, sharing.blocks, shared_bytes, device.shared_memory};
}

// The fewest blocks that keep a row and leave room for others beside them, as many as rows_kernel is compiled for or else
// fewer; and where even the largest cluster is too small for a row, or one pass is enough, one block that does not keep it.
template <class D, class T>
Sharing share_out(const Arguments& a, const Device& device, int blocks_asked_for) {
  if (a.loss == nullptr) return {1, false};
  if (blocks_asked_for >= 0) return {std::max(1, blocks_asked_for), blocks_asked_for > 0};
  if (a.gradient == nullptr && RowKernel<D, T>::kOnePass) return {1, false};
  const int most = device.major >= 9 ? kMostBlocks : 1;
  const auto room = [&](int blocks, int beside) {
    const Launch launch = launch_of<T>(a, 1, {blocks, true}, device);
    if (launch.shared_bytes > (device.shared_memory + kReserved) / beside - kReserved) return false;
    return blocks <= kPortableBlocks || fits(rows_kernel<D, T>, launch);
  };
  for (int beside = RowKernel<D, T>::kBeside; beside > 0; --beside) {
    for (int blocks = 1; blocks <= most; blocks *= 2) {
      if (room(blocks, beside)) return {blocks, true};
    }
  }
  return {1, false};
}

template <class D, class T>
void launch(Arguments a, const Tensor& student, int64_t blocks) {
  const int64_t rows = student.size(0);
  if (rows == 0) return;
  const DeviceGuard guard(student.get_device_index());
  const Device device = device_of(student);
  const Sharing sharing = share_out<D, T>(a, device, static_cast<int>(blocks));
  a.kept = sharing.kept;
  a.chunks = chunks_of_block<T>(a.columns, sharing.blocks);
  run(rows_kernel<D, T>, launch_of<T>(a, rows, sharing, device), student, a);
}

template <class D>
void launch(const Arguments& a, const Tensor& student, int64_t blocks) {
  switch (student.scalar_type()) {
    case ScalarType::Float: return launch<D, float>(a, student, blocks);
    case ScalarType::Half: return launch<D, Half>(a, student, blocks);
    default: return launch<D, BFloat16>(a, student, blocks);
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
  STD_TORCH_CHECK(blocks >= -1 && blocks <= kMostBlocks, "fastkd: blocks must be -1 to 16");
  if (kd_weight == 0) teacher.reset();
  if (ce_weight == 0) labels.reset();
  Arguments a = arguments_of(student, teacher, coefficient, labels, loss, stats, gradient);
  a.beta = beta, a.tau = temperature, a.kd_weight = kd_weight, a.ce_weight = ce_weight;
  if (!teacher) return launch<void>(a, student, blocks);
  switch (static_cast<Divergence>(divergence)) {
    case Divergence::kForwardKL: return launch<ForwardKL>(a, student, blocks);
    case Divergence::kReverseKL: return launch<ReverseKL>(a, student, blocks);
    case Divergence::kJSD: return launch<JSD>(a, student, blocks);
    case Divergence::kSkewKL: return launch<SkewKL>(a, student, blocks);
    case Divergence::kSkewReverseKL: return launch<SkewReverseKL>(a, student, blocks);
    case Divergence::kTVD: return launch<TVD>(a, student, blocks);
    default: STD_TORCH_CHECK(false, "fastkd: unknown divergence");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, FASTKD_DEVICE_KEY, m) {
  m.impl("divergence_rows_cuda", TORCH_BOX(&divergence_rows_cuda));
}

}  // namespace fastkd
