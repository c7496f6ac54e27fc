"""attention_kl and relation_kl on a CPU.

csrc/cpu/attention.cpp takes one head of one sequence in one thread, in chunks of queries whose scores stay in the
second-level cache.

B batch, Lq queries, Lk keys, A heads, Hs and Ht widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import score_dtype

__all__ = ["Model", "attend_on_cpu"]

# For the scores of both models in a chunk: half of a usual second-level cache, where they then stay.
WORKSPACE_BYTES_PER_THREAD = 512 * 2**10
# Fewer queries in a chunk would make its GEMMs slow, whatever their scores need; more leave nothing to gain.
CHUNK_ROWS = (64, 256)

# The gradients of q and k are overwritten, in any floating dtype; the bias's is added to: [B, A, Lq, Lk] with a 1 where
# the bias has one, or its diagonals', [B, A, 2 * reach + 1] float64.
# relation: queries and keys are one tensor, grad_q is of both, and masked positions have a coefficient of 0.
_library = torch.library.Library("fastkd", "FRAGMENT")
_library.define(
    "attention_heads_(Tensor student_q, Tensor student_k, Tensor teacher_q, Tensor teacher_k, Tensor? student_bias, "
    "Tensor? teacher_bias, Tensor coefficient, Tensor? key_mask, bool causal, bool relation, float student_scale, "
    "float teacher_scale, int rows_at_once, int divergence, float[1] beta, Tensor(a!) loss, Tensor(b!)? grad_q, "
    "Tensor(c!)? grad_k, Tensor(d!)? grad_bias) -> ()"
)
torch.library.register_fake("fastkd::attention_heads_", lambda *_: None, lib=_library)


class Model(NamedTuple):
    """What one model's scores are made of."""

    q: Tensor  # [B, Lq, H]
    k: Tensor  # [B, Lk, H]
    bias: Tensor | None  # [B or 1, A or 1, Lq or 1, Lk or 1] or [A, 2 * reach + 1]
    scale: float


def _bias_for_heads(bias: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """[B, A, Lq, Lk], or diagonals in the scores' dtype."""
    if bias is None:
        return None
    return bias.expand(shape) if bias.dim() == 4 else bias.to(dtype).contiguous()


def _zeros_like_bias(bias: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that the bias's gradient is added to."""
    if bias.dim() == 2:
        return bias.new_zeros((*shape[:2], bias.shape[1]), dtype=torch.float64)
    # of a bias for every key, or every query, elements are sums over a whole matrix
    return bias.new_zeros(bias.shape, dtype=torch.float64 if 1 in bias.shape[2:] else dtype)


def attend_on_cpu(
    student: Model,
    teacher: Model,
    coefficient: Tensor,  # [B, A, Lq] float64
    key_mask: Tensor | None,  # [B, Lk] bool
    causal: bool,
    divergence: int,
    beta: float | Sequence[float],
    gradients: Sequence[Tensor | None],  # of the student's q, k and bias, to be written; of a relation's q and k as q
    *,
    relation: bool = False,
) -> Tensor:
    """The losses [B, A, Lq], times their coefficients; writes the gradients that are given."""
    grad_q, grad_k, grad_bias = gradients
    keys, dtype = student.k.shape[1], score_dtype(student.q)
    fit = WORKSPACE_BYTES_PER_THREAD // max(1, 2 * keys * dtype.itemsize)
    rows_at_once = min(max(CHUNK_ROWS[0], fit), CHUNK_ROWS[1])
    coefficient, shape = coefficient.contiguous(), (*coefficient.shape, keys)
    loss, sums = torch.empty_like(coefficient), None
    if grad_bias is not None and student.bias is not None:
        sums = _zeros_like_bias(student.bias, shape, dtype)
    biases = [_bias_for_heads(model.bias, shape, dtype) for model in (student, teacher)]
    torch.ops.fastkd.attention_heads_(
        student.q, student.k, teacher.q, teacher.k, *biases, coefficient,
        None if key_mask is None else key_mask.contiguous(), causal, relation, student.scale, teacher.scale,
        rows_at_once, divergence, beta, loss, grad_q, grad_k, sums,
    )  # fmt: skip
    if grad_bias is not None and sums is not None:
        grad_bias.copy_(sums.sum(0) if sums.dim() == 3 else sums)
    return loss
