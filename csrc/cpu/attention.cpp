// attention_kl on CPUs, relation_kl as its self case: one head of one sequence at a time, in one thread.
//
// A head's queries are taken in chunks, few enough that the scores of both models stay in the second-level cache: two
// GEMMs make them, the row primitive (row_kernel.h) turns the student's into their gradient in place, two GEMMs carry
// that on to queries and keys. Padding at either end is cut off, and so are the keys that causality hides from a whole
// chunk. The GEMMs are torch's own, each in the thread that calls it. Heads of queries that share one of keys follow each
// other in a thread, and add to the gradient of its keys.
//
// B batch, A heads, Lq queries, Lk keys, d head width.
#include "../stable.h"

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "attention_arguments.h"
#include "diagonals.h"
#include "huge_pages.h"
#include "row_kernel.h"
#include "subnormals.h"

namespace fastkd {
namespace {

// ---- matrices of packed floats --------------------------------------------------------------------------------------

template <class F>
struct View {
  F* data;
  int64_t rows, columns, row_stride, column_stride = 1;

  View transposed() const { return {data, columns, rows, column_stride, row_stride}; }

  Tensor tensor() const {
    const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
    return torch::stable::from_blob(data, {sizes, 2}, {strides, 2},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), kScalarType<F>);
  }
};

// out = beta * out + alpha * a @ b
template <class F>
void gemm(const View<F>& out, const View<F>& a, const View<F>& b, double alpha, double beta) {
  const Tensor result = out.tensor(), left = a.tensor(), right = b.tensor();
  check_call(aoti_torch_cpu_addmm_out(result.get(), result.get(), left.get(), right.get(), beta, alpha), "addmm");
}

struct Span {
  int64_t begin = 0, end = 0;
  int64_t size() const { return end - begin; }
};

// From the first to the last index that is kept; empty if none is.
template <class Keep>
Span span_of(int64_t n, const Keep& keep) {
  Span span{0, n};
  while (span.begin < n && !keep(span.begin)) ++span.begin;
  while (span.end > span.begin && !keep(span.end - 1)) --span.end;
  return span;
}

// A head of x [B, L, H], where head h has the columns from h * d.
template <class F>
Matrix<F> head_of(const Tensor& x, int64_t b, int64_t h, int64_t d) {
  char* data = static_cast<char*>(x.data_ptr()) + (b * x.stride(0) + h * d * x.stride(2)) * x.element_size();
  return Matrix<F>(data, x.scalar_type(), x.stride(1), x.stride(2));
}

// ---- the bias on a row of scores, and its gradient ------------------------------------------------------------------

template <class F, class G>
FASTKD_CLONES void add_row(const F* row, int64_t n, G* target) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) target[j] += row[j];
}

// To every key's element of a contiguous gradient, or to the one that is for all keys.
template <class F, class G>
void add_row(const F* row, int64_t n, G* target, bool one_for_all) {
  if (!one_for_all) return add_row(row, n, target);
  for (int64_t j = 0; j < n; ++j) *target += row[j];
}

// gradient[b, h, query, key...] += row, for a dense bias.
template <class F>
void add_dense_gradient(const Tensor& gradient, int64_t b, int64_t h, int64_t query, int64_t key, const F* row,
                        int64_t n) {
  const auto stride = [&](int64_t i) { return gradient.size(i) == 1 ? 0 : gradient.stride(i); };
  const int64_t at = b * stride(0) + h * stride(1) + query * stride(2) + key * stride(3);
  if (gradient.scalar_type() == ScalarType::Double) {
    add_row(row, n, static_cast<double*>(gradient.data_ptr()) + at, stride(3) == 0);
  } else {
    add_row(row, n, static_cast<float*>(gradient.data_ptr()) + at, stride(3) == 0);
  }
}

template <class F>
FASTKD_CLONES void hide_masked_keys(F* row, const bool* mask, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) row[j] = mask[j] ? row[j] : -std::numeric_limits<F>::infinity();
}

// ---- one head -------------------------------------------------------------------------------------------------------

// Computes heads one after the other, in memory of its own.
template <class F>
class Worker {
 public:
  explicit Worker(const Arguments& a)
      : a_(a), width_{a.width(a.student), a.width(a.teacher)},
        // a part of it may go unused, and is never touched then
        memory_(new F[(a.queries() + a.keys()) * (2 * width_[0] + width_[1]) + (2 * a.rows_at_once + 1) * a.keys()]),
        partial_(a.gradients.bias && !a.gradients.dense_bias() ? a.gradients.bias->size(2) : 0) {
    F* next = memory_.get();
    const auto take = [&](int64_t n) { return std::exchange(next, next + n); };
    for (int m = 0; m < 2; ++m) q_[m] = take(a.queries() * width_[m]), k_[m] = take(a.keys() * width_[m]);
    for (F*& scores : scores_) scores = take(a.rows_at_once * a.keys());
    grad_q_ = take(a.queries() * width_[0]);
    grad_k_ = take(a.keys() * width_[0]);
    row_ = take(a.keys());
  }

  // Of heads that share one of keys, first to last.
  void run(int64_t b, int64_t h) {
    b_ = b, h_ = h;
    const int64_t group = a_.student.group();
    const int64_t first = (b * a_.heads() + h) * a_.queries();
    weights_ = static_cast<const double*>(a_.coefficient.data_ptr()) + first;
    losses_ = static_cast<double*>(a_.loss.data_ptr()) + first;
    mask_ = a_.key_mask ? static_cast<const bool*>(a_.key_mask->data_ptr()) + b * a_.keys() : nullptr;
    std::fill(losses_, losses_ + a_.queries(), 0);
    rows_ = span_of(a_.queries(), [&](int64_t i) { return has_row(i); });
    keys_ = span_of(a_.keys(), [&](int64_t j) { return has_key(j) || (a_.relation && has_row(j)); });
    if (wants_grad_k() && h % group == 0) std::fill(grad_k_, grad_k_ + keys_.size() * width_[0], F(0));
    if (rows_.size() > 0 && keys_.size() > 0) {
      pack();
      for (int64_t row = rows_.begin; row < rows_.end; row += a_.rows_at_once) {
        const Span rows{row, std::min(row + a_.rows_at_once, rows_.end)};
        const Span keys{keys_.begin, a_.causal ? std::clamp(rows.end, keys_.begin, keys_.end) : keys_.end};
        if (keys.size() > 0) chunk(rows, keys);
      }
    } else {
      rows_ = {};
    }
    write(h % group == group - 1);
  }

 private:
  const Model& model(int m) const { return m == 0 ? a_.student : a_.teacher; }
  bool has_row(int64_t i) const { return weights_[i] != 0; }
  bool has_key(int64_t j) const { return !mask_ || mask_[j]; }
  F* q(int m, int64_t row) const {
    return a_.relation ? k_[m] + (row - keys_.begin) * width_[m] : q_[m] + (row - rows_.begin) * width_[m];
  }

  // Both models' head in packed rows, which GEMMs read several times; 0 where a row or key does not take part.
  void pack() {
    has_holes_ = false;
    for (int64_t j = keys_.begin; j < keys_.end; ++j) has_holes_ |= !has_key(j);
    for (int m = 0; m < 2; ++m) {
      if (!a_.relation) pack(model(m).q, h_, m, rows_, [&](int64_t i) { return has_row(i); }, q_[m]);
      const auto keep = [&](int64_t j) { return has_key(j) || (a_.relation && has_row(j)); };
      pack(model(m).k, h_ / model(m).group(), m, keys_, keep, k_[m]);
    }
    if (a_.gradients.q) std::fill(grad_q_, grad_q_ + rows_.size() * width_[0], F(0));
  }

  template <class Keep>
  void pack(const Tensor& x, int64_t h, int m, const Span& span, const Keep& keep, F* out) {
    const Matrix<F> head = head_of<F>(x, b_, h, width_[m]);
    for (int64_t i = span.begin; i < span.end; ++i, out += width_[m]) {
      if (!keep(i)) {
        std::fill(out, out + width_[m], F(0));
      } else if (const F* row = head.read(i, 0, width_[m], out); row != out) {
        std::copy(row, row + width_[m], out);
      }
    }
  }

  bool wants_grad_k() const { return a_.gradients.k || (a_.relation && a_.gradients.q); }

  void chunk(const Span& rows, const Span& keys) {
    const int64_t n = keys.size();
    View<F> scores[2];
    for (int m = 0; m < 2; ++m) {
      const View<F> queries{q(m, rows.begin), rows.size(), width_[m], width_[m]}, k{k_[m], n, width_[m], width_[m]};
      scores[m] = {scores_[m], rows.size(), n, n};
      gemm(scores[m], queries, k.transposed(), model(m).scale, 0);
    }
    divergence(rows, keys);
    if (a_.gradients.any()) gradients(scores[0], rows, keys);
  }

  // Of these rows of scores, which become their gradient.
  void divergence(const Span& rows, const Span& keys) {
    const FlushSubnormals flush;
    const int64_t n = keys.size();
    const auto matrix = [&](int m) { return Matrix<F>(scores_[m], kScalarType<F>, n, 1); };
    const RowKernel<F> kernel{matrix(0), matrix(1), nullptr, n, a_.objective, false};
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      if (weights_[i] != 0) {
        for (int m = 0; m < 2; ++m) finish(m, scores_[m] + (i - rows.begin) * n, i, keys);
      }
      RowStats stats;
      write_row(kernel, i - rows.begin, weights_[i], losses_ + i, stats, a_.gradients.any() ? &kernel.student : nullptr);
    }
  }

  // What a row of scores lacks when a GEMM has made it.
  void finish(int m, F* row, int64_t query, const Span& keys) {
    const std::optional<Tensor>& bias = model(m).bias;
    const int64_t n = keys.size(), distance = keys.begin - query;
    if (model(m).has_dense_bias()) {
      const int64_t at = b_ * bias->stride(0) + h_ * bias->stride(1);
      char* data = static_cast<char*>(bias->data_ptr()) + at * bias->element_size();
      const Matrix<F> matrix(data, bias->scalar_type(), bias->stride(2), bias->stride(3));
      add_row(matrix.read(query, keys.begin, n, row_), n, row);
    } else if (bias) {
      add_bias(row, static_cast<const F*>(bias->data_ptr()) + h_ * bias->size(1), n, distance, a_.reach(*bias));
    }
    if (has_holes_) hide_masked_keys(row, mask_ + keys.begin, n);
    if (a_.causal) hide_later_keys(row, n, distance);
  }

  void gradients(const View<F>& g, const Span& rows, const Span& keys) {
    const int64_t d = width_[0];
    const double scale = a_.student.scale;
    if (a_.gradients.dense_bias()) {
      for (int64_t i = 0; i < g.rows; ++i) {
        add_dense_gradient(*a_.gradients.bias, b_, h_, rows.begin + i, keys.begin, g.data + i * g.columns, g.columns);
      }
    } else if (a_.gradients.bias) {
      const int64_t count = a_.gradients.bias->size(2);
      double* sums = static_cast<double*>(a_.gradients.bias->data_ptr()) + (b_ * a_.heads() + h_) * count;
      sum_diagonals(g.data, sums, g.rows, g.columns, keys.begin - rows.begin, count / 2, partial_.data());
    }
    if (a_.gradients.q) {
      const View<F> target{grad_q_ + (rows.begin - rows_.begin) * d, g.rows, d, d};
      gemm(target, g, View<F>{k_[0], g.columns, d, d}, scale, 0);
    }
    if (wants_grad_k()) {  // transposed: q.T @ g is faster than g.T @ q
      const View<F> target{grad_k_, d, g.columns, keys_.size()}, queries{q(0, rows.begin), g.rows, d, d};
      gemm(target, queries.transposed(), g, scale, 1);
    }
  }

  void write(bool keys_are_done) {
    if (a_.gradients.q) {
      write(*a_.gradients.q, h_, [&](int64_t i, F* row) {
        if (i >= rows_.begin && i < rows_.end) add(grad_q_ + (i - rows_.begin) * width_[0], 1, row);
        if (a_.relation && i >= keys_.begin && i < keys_.end) add(grad_k_ + i - keys_.begin, keys_.size(), row);
      });
    }
    if (a_.gradients.k && keys_are_done) {
      write(*a_.gradients.k, h_ / a_.student.group(), [&](int64_t j, F* row) {
        if (j >= keys_.begin && j < keys_.end) add(grad_k_ + j - keys_.begin, keys_.size(), row);
      });
    }
  }

  template <class Add>
  void write(const Tensor& gradient, int64_t h, const Add& add_to) {
    const Matrix<F> head = head_of<F>(gradient, b_, h, width_[0]);
    for (int64_t i = 0; i < gradient.size(1); ++i) {
      F* row = head.target(i, 0, row_of_gradient_.data());
      std::fill(row, row + width_[0], F(0));
      add_to(i, row);
      head.write(i, 0, width_[0], row);
    }
  }

  void add(const F* x, int64_t stride, F* row) const {
    for (int64_t c = 0; c < width_[0]; ++c) row[c] += x[c * stride];
  }

  const Arguments& a_;
  const int64_t width_[2];  // d, of the student and of the teacher
  const std::unique_ptr<F[]> memory_;
  F *q_[2], *k_[2];        // [rows, d], [keys, d], of both
  F* scores_[2];           // [rows_at_once, keys]; the student's become their gradient
  F *grad_q_, *grad_k_;    // [rows, d], [d, keys]
  F* row_;                 // [keys]
  std::vector<F> partial_;  // of the diagonals' gradient
  std::vector<F> row_of_gradient_ = std::vector<F>(width_[0]);

  int64_t b_ = 0, h_ = 0;
  const double* weights_ = nullptr;
  double* losses_ = nullptr;
  const bool* mask_ = nullptr;
  Span rows_, keys_;
  bool has_holes_ = false;  // whether a key between the first and the last is masked
};

// ---- the op ---------------------------------------------------------------------------------------------------------

// Heads that add to the same elements of a gradient, of keys or a dense bias, are one group, and go to one thread in a
// fixed order.
struct Groups {
  int64_t batch, heads;                // of a group
  int64_t across_batch, across_heads;  // how many groups there are

  explicit Groups(const Arguments& a)
      : batch(shared(a, 0) ? a.batch() : 1),
        heads(shared(a, 1) ? a.heads() : a.gradients.k ? a.student.group() : 1),
        across_batch(a.batch() / std::max<int64_t>(1, batch)), across_heads(a.heads() / heads) {}

  static bool shared(const Arguments& a, int64_t dimension) {
    return a.gradients.dense_bias() && a.gradients.bias->size(dimension) == 1;
  }
  int64_t count() const { return across_batch * across_heads; }

  template <class Body>
  void each(int64_t group, const Body& body) const {
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t h = 0; h < heads; ++h) body(group / across_heads * batch + b, group % across_heads * heads + h);
    }
  }
};

// loss [B, A, Lq] = coefficient * loss, and the gradients that are given: queries' and keys' are overwritten, the bias's
// is added to. Each thread takes the next group of heads when it has done one, since sequences differ in length.
void attention_heads_(Tensor student_q, Tensor student_k, Tensor teacher_q, Tensor teacher_k,
                      std::optional<Tensor> student_bias, std::optional<Tensor> teacher_bias, Tensor coefficient,
                      std::optional<Tensor> key_mask, bool causal, bool relation, double student_scale,
                      double teacher_scale, int64_t rows_at_once, int64_t divergence, std::vector<double> beta, Tensor loss,
                      std::optional<Tensor> grad_q, std::optional<Tensor> grad_k, std::optional<Tensor> grad_bias) {
  const Objective objective = make_objective(divergence, beta, 1, 1, 0);
  const Arguments a{{student_q, student_k, student_bias, student_scale},
                    {teacher_q, teacher_k, teacher_bias, teacher_scale},
                    coefficient, key_mask, causal, relation, rows_at_once, objective, loss,
                    {grad_q, grad_k, grad_bias}};
  a.check();
  for (const auto* gradient : {&grad_q, &grad_k}) {
    if (*gradient) advise_huge_pages(**gradient);
  }
  const Groups groups(a);
  const int64_t threads = std::min<int64_t>(groups.count(), torch::stable::get_num_threads());
  std::atomic<int64_t> next = 0;
  const auto run = [&]<class F>() {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread) {
        Worker<F> worker(a);
        for (int64_t group; (group = next++) < groups.count();) {
          groups.each(group, [&](int64_t b, int64_t h) { worker.run(b, h); });
        }
      }
    });
  };
  student_q.scalar_type() == ScalarType::Double ? run.template operator()<double>() : run.template operator()<float>();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("attention_heads_", TORCH_BOX(&attention_heads_)); }

}  // namespace fastkd
