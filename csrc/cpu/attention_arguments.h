// What attention on a CPU (attention.cpp) is given, and the checks that guard its memory.
//
// B batch, A heads, Lq queries, Lk keys, H width of a model.
#pragma once

#include <initializer_list>
#include <optional>
#include <utility>

#include "../stable.h"
#include "matrix.h"
#include "row_kernel.h"

namespace fastkd {
namespace {

struct Model {
  const Tensor &q, &k;                // [B, Lq, H], [B, Lk, H / group]
  const std::optional<Tensor>& bias;  // dense, [B, A, Lq, Lk] with any stride, or by its diagonals, [A, 2 * reach + 1]
  double scale;

  bool has_dense_bias() const { return bias && bias->dim() == 4; }
  int64_t group() const { return k.size(2) > 0 ? q.size(2) / k.size(2) : 1; }  // heads of queries for one of keys
};

struct Gradients {
  const std::optional<Tensor>&q, &k, &bias;  // the bias's: [B, A, 2 * reach + 1], or dense with a 1 where it broadcasts

  bool any() const { return q || k || bias; }
  bool dense_bias() const { return bias && bias->dim() == 4; }
};

struct Arguments {
  Model student, teacher;
  const Tensor& coefficient;              // [B, A, Lq] float64; rows of 0 are not read
  const std::optional<Tensor>& key_mask;  // [B, Lk] bool
  bool causal, relation;                  // relation: queries and keys are one tensor, and gradients.q is of both
  int64_t rows_at_once;
  Objective objective;
  const Tensor& loss;  // as coefficient
  Gradients gradients;

  int64_t batch() const { return coefficient.size(0); }
  int64_t heads() const { return coefficient.size(1); }
  int64_t queries() const { return coefficient.size(2); }
  int64_t keys() const { return student.k.size(1); }
  int64_t width(const Model& model) const { return model.q.size(2) / heads(); }
  int64_t reach(const Tensor& diagonals) const { return diagonals.size(diagonals.dim() - 1) / 2; }

  void check() const;

 private:
  void check_sides(const Model& model) const;
  void check_gradients() const;
};

bool has_sizes(const Tensor& x, std::initializer_list<int64_t> sizes) {
  if (x.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t i = 0;
  for (const int64_t size : sizes) {
    if (x.size(i++) != size) return false;
  }
  return true;
}

void Arguments::check_sides(const Model& model) const {
  const int64_t H = model.q.dim() == 3 ? model.q.size(2) : -1;
  const int64_t K = model.k.dim() == 3 ? model.k.size(2) : -1;
  STD_TORCH_CHECK(has_sizes(model.q, {batch(), queries(), H}) && has_sizes(model.k, {batch(), keys(), K}) &&
                      heads() > 0 && H % heads() == 0,
                  "fastkd: queries and keys must be [B, L, H] with heads of one width");
  STD_TORCH_CHECK(H == K || (K > 0 && H % K == 0 && heads() % (H / K) == 0 && !relation),
                  "fastkd: a head of keys must be for as many heads of queries as any other");
  STD_TORCH_CHECK(is_float(model.q.scalar_type()) && is_float(model.k.scalar_type()),
                  "fastkd: queries and keys must be of a floating dtype");
  if (!model.bias) return;
  const Tensor& bias = *model.bias;
  const ScalarType wanted = student.q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(model.has_dense_bias()
                      ? has_sizes(bias, {batch(), heads(), queries(), keys()}) && is_float(bias.scalar_type())
                      : bias.dim() == 2 && bias.size(0) == heads() && bias.size(1) % 2 == 1 && bias.is_contiguous() &&
                            bias.scalar_type() == wanted,
                  "fastkd: a bias must be [B, A, Lq, Lk], or diagonals, contiguous [A, 2 * reach + 1] in the scores' dtype");
}

void Arguments::check_gradients() const {
  for (const auto& [gradient, x] : {std::pair(&gradients.q, &student.q), std::pair(&gradients.k, &student.k)}) {
    STD_TORCH_CHECK(!*gradient || (has_sizes(**gradient, {x->size(0), x->size(1), x->size(2)}) &&
                                   is_float((*gradient)->scalar_type())),
                    "fastkd: gradients must have the shapes of queries and keys");
  }
  STD_TORCH_CHECK(!relation || (!gradients.k && queries() == keys()), "fastkd: a relation has one gradient");
  if (!gradients.bias) return;
  const Tensor& gradient = *gradients.bias;
  STD_TORCH_CHECK(student.bias && gradient.is_contiguous(), "fastkd: the bias's gradient must be contiguous");
  if (!student.has_dense_bias()) {
    STD_TORCH_CHECK(has_sizes(gradient, {batch(), heads(), student.bias->size(1)}) &&
                        gradient.scalar_type() == ScalarType::Double,
                    "fastkd: the diagonals' gradient must be float64 [B, A, 2 * reach + 1]");
    return;
  }
  STD_TORCH_CHECK(gradient.dim() == 4 && (gradient.scalar_type() == ScalarType::Float ||
                                          gradient.scalar_type() == ScalarType::Double),
                  "fastkd: a dense bias's gradient must be float32 or float64 [B, A, Lq, Lk]");
  for (int64_t i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(gradient.size(i) == 1 || gradient.size(i) == student.bias->size(i),
                    "fastkd: a dense bias's gradient must broadcast to [B, A, Lq, Lk]");
  }
}

void Arguments::check() const {
  STD_TORCH_CHECK(coefficient.dim() == 3 && coefficient.is_contiguous() &&
                      coefficient.scalar_type() == ScalarType::Double,
                  "fastkd: coefficient must be contiguous float64 [B, A, Lq]");
  STD_TORCH_CHECK(has_sizes(loss, {batch(), heads(), queries()}) && loss.is_contiguous() &&
                      loss.scalar_type() == ScalarType::Double,
                  "fastkd: loss must be contiguous float64 [B, A, Lq]");
  STD_TORCH_CHECK(student.k.dim() == 3, "fastkd: keys must be [B, Lk, H]");
  check_sides(student);
  check_sides(teacher);
  check_gradients();
  STD_TORCH_CHECK(!key_mask || (has_sizes(*key_mask, {batch(), keys()}) && key_mask->is_contiguous() &&
                                key_mask->scalar_type() == ScalarType::Bool),
                  "fastkd: key_mask must be contiguous bool [B, Lk]");
  STD_TORCH_CHECK(rows_at_once > 0, "fastkd: rows_at_once must be positive");
}

}  // namespace
}  // namespace fastkd
