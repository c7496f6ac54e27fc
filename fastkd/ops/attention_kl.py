"""attention_kl: the divergence between the attention distributions of two models, without an [Lq, Lk] matrix.

On a CPU scores stay in the second-level cache (drivers/attention_kl_cpu.py), on a GPU in registers
(kernels/attention/).

As in linear_kl, a scalar loss has its gradients made in the forward pass, and losses per row run the op again.

B batch, Lq queries, Lk keys, A heads, Hs and Ht widths, d = H / A head width. Keys may have fewer heads than queries
(grouped queries), and are narrower then: how many follows from their width, and no kernel repeats them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backend import backend_for, use_fused
from ..checks import REDUCTIONS, Objective, as_int, as_normalizer, check_choice, numbers
from ..divergence import Divergence, beta_of
from ..relative_bias import RelativeBias
from .attention_kl_arguments import Inputs, as_scale, row_coefficients
from .autograd import (
    Function,
    Gradient,
    GradientsAhead,
    apply,
    constant,
    for_arguments,
    in_dtypes_of,
    wants_gradient,
)
from .drivers.attention_kl_cpu import Model, attend_on_cpu
from .dtypes import gradient_dtype, score_dtype, without_autocast

__all__ = ["AttentionKL", "AttentionKLPerRow", "attention_kl"]

# ---- schema ---------------------------------------------------------------------------------------------------------
# A bias is [B, A, Lq, Lk], where any dimension may be 1, or else the diagonals of a relative bias, [A, 2 * reach + 1]:
# that of key j for query i is diagonals[a, clamp(j - i, -reach, reach) + reach].

_library = torch.library.Library("fastkd", "FRAGMENT")
_library.define(
    "attention_kl(Tensor student_q, Tensor student_k, Tensor teacher_q, Tensor teacher_k, Tensor? student_bias, "
    "Tensor? teacher_bias, Tensor coefficient, Tensor? key_mask, bool causal, int num_heads, bool[3] gradients, "
    "int divergence, Tensor numbers) "
    "-> (Tensor loss, Tensor grad_q, Tensor grad_k, Tensor grad_bias)"
)

# ---- fake -----------------------------------------------------------------------------------------------------------


def empty_gradient(x: Tensor | None, wanted: bool, student: Tensor) -> Tensor:
    """The gradient of x, unwritten; without elements where it is not wanted."""
    shape = x.shape if wanted and x is not None else (0,)
    return student.new_empty(shape, dtype=gradient_dtype(student if x is None else x))


@torch.library.register_fake("fastkd::attention_kl", lib=_library)
def _(student_q, student_k, tq, tk, student_bias, tb, coefficient, mask, causal, num_heads, gradients, *_):
    inputs = zip((student_q, student_k, student_bias), gradients, strict=True)
    return torch.empty_like(coefficient), *(empty_gradient(x, wanted, student_q) for x, wanted in inputs)


# ---- forward, with the gradients ------------------------------------------------------------------------------------


@without_autocast
def _attention_kl(
    student_q: Tensor,  # [B, Lq, Hs]
    student_k: Tensor,  # [B, Lk, Hs]
    teacher_q: Tensor,  # [B, Lq, Ht]
    teacher_k: Tensor,  # [B, Lk, Ht]
    student_bias: Tensor | None,  # [B or 1, A or 1, Lq or 1, Lk or 1] or [A, 2 * reach + 1]
    teacher_bias: Tensor | None,
    coefficient: Tensor,  # [B, A, Lq] float64, 0 where a row is masked or has no key
    key_mask: Tensor | None,  # [B, Lk] bool
    causal: bool,
    num_heads: int,
    gradients: list[bool],  # of student_q, student_k, student_bias
    divergence: int,
    numbers: Tensor,  # [3]: beta, student_scale, teacher_scale; and a mix's weights
) -> tuple[Tensor, ...]:
    number, student_scale, teacher_scale, *weights = numbers.tolist()
    beta = beta_of(number, *weights)
    if backend_for(student_q.device)[0] == "triton":
        from ..kernels import attention as kernels

        return kernels.attention_kl(
            student_q, student_k, teacher_q, teacher_k, student_bias, teacher_bias, coefficient, key_mask, causal,
            num_heads, student_scale, teacher_scale, gradients, divergence, beta,
        )  # fmt: skip
    inputs = zip((student_q, student_k, student_bias), gradients, strict=True)
    results = [empty_gradient(x, wanted, student_q) for x, wanted in inputs]
    loss = attend_on_cpu(
        Model(student_q, student_k, student_bias, student_scale),
        Model(teacher_q, teacher_k, teacher_bias, teacher_scale),
        coefficient,
        key_mask,
        causal,
        divergence,
        beta,
        [x if wanted else None for x, wanted in zip(results, gradients, strict=True)],
    )
    return loss, *results


_library.impl("attention_kl", _attention_kl, "CompositeExplicitAutograd")

# ---- autograd.Function ----------------------------------------------------------------------------------------------


OF_STUDENT = (0, 1, 4)  # arguments that get a gradient: queries, keys and bias


class AttentionKL(GradientsAhead):
    """The summed loss, a 0-d float64 tensor, and the gradients, which the forward pass computes.

    Arguments are those of ``torch.ops.fastkd.attention_kl``.
    """

    op = "attention_kl"

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        loss, *gradients = torch.ops.fastkd.attention_kl(*arguments)
        return loss.sum(), *gradients

    @staticmethod
    def of_student(arguments: Sequence[Any]) -> Sequence[int]:
        return OF_STUDENT


class AttentionKLPerRow(Function):
    """Losses per row, [B, A, Lq] float64; the backward pass computes scores and gradients from the inputs.

    Arguments are those of ``torch.ops.fastkd.attention_kl``.
    """

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        *tensors_and_constants, _, divergence, numbers = arguments
        return torch.ops.fastkd.attention_kl(*tensors_and_constants, [False] * 3, divergence, numbers)[0]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.causal, ctx.num_heads, _, ctx.divergence, numbers = inputs
        ctx.save_for_backward(*tensors, numbers)

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        *tensors, coefficient, key_mask, numbers = ctx.saved_tensors
        needed = [ctx.needs_input_grad[i] for i in OF_STUDENT]
        gradients = apply(
            _AttentionKLGradient, "attention_kl", *tensors, coefficient * grad_loss, key_mask, ctx.causal,
            ctx.num_heads, needed, ctx.divergence, numbers,
        )  # fmt: skip
        return for_arguments(ctx, OF_STUDENT, gradients)


class _AttentionKLGradient(Gradient):
    @staticmethod
    def forward(op: str, *arguments: Any) -> tuple[Tensor, ...]:
        _, *gradients = torch.ops.fastkd.attention_kl(*arguments)
        return in_dtypes_of(OF_STUDENT, arguments, gradients)


# ---- public function ------------------------------------------------------------------------------------------------


def _for_kernel(bias: Any, dtype: torch.dtype) -> Any:
    """[B, A, Lq, Lk] with any of them 1, or [A, 2 * reach + 1] in the scores' dtype."""
    if isinstance(bias, RelativeBias):
        return bias.to(dtype).diagonals()
    return None if bias is None else bias[(None,) * (4 - bias.dim())]


def attention_kl(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    teacher_num_kv_heads: int | None = None,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    student_bias: Tensor | RelativeBias | None = None,
    teacher_bias: Tensor | RelativeBias | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = False,
    divergence: Divergence | Mapping[Divergence, float] = "forward_kl",
    beta: float = 0.5,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Divergence between the attention distributions of teacher and student, in memory that grows with the length.

    For every head and query, ``D(p, q)`` with ``q = softmax(student_scale * student_q @ student_k.T + student_bias)``
    over the keys that are not masked, and ``p`` likewise: the first of MiniLM's two terms (Wang et al., 2020, arXiv
    2002.10957). Scores are float32 whatever the inputs' dtype (float64 for float64 students).

    Args:
        student_q, student_k: [B, Lq, Hs] and [B, Lk, Hs], float32, float64, float16 or bfloat16, as the projections
            make them; heads lie side by side in the last dimension, each Hs / num_heads wide. Receive gradients.
        teacher_q, teacher_k: [B, Lq, Ht] and [B, Lk, Ht]; constants. Ht may differ from Hs.
        num_heads: of both models; a divisor of Hs and of Ht.
        num_kv_heads: how many heads the keys of both models have, with grouped queries: a divisor of num_heads, which
            is the default. Each is for num_heads / num_kv_heads neighbouring heads of queries; keys are
            [B, Lk, num_kv_heads * d], d wide as a head of their queries is, and only ``impl="reference"`` repeats
            them.
        teacher_num_kv_heads: the teacher's, where it has another number of them than the student.
        student_scale, teacher_scale: of the scores; by default 1 / sqrt(head width). T5 has 1.
        student_bias, teacher_bias: a tensor that broadcasts to [B, A, Lq, Lk], or ``fastkd.RelativeBias``, T5's,
            which is never spread out. The student's receives a gradient, in its table if it is a RelativeBias.
        key_mask: [B, Lk] bool or integer, True or not 0 where a key takes part. Others have a probability of exactly 0.
        query_mask: [B, Lq], likewise; other rows count for nothing. So do rows that have no key left.
        causal: a query sees the keys up to its own position; needs Lq equal to Lk.
        divergence, beta: as in ``fastkd.logit_kl``.
        reduction: ``"mean"`` is over heads and over the rows that count, ``"sum"`` adds up both, ``"none"`` returns
            [B, A, Lq].
        normalizer: with ``"mean"``, a number or 0-d tensor that replaces the number of rows that count.
        impl: ``"auto"``, ``"reference"`` or ``"fused"``; see ``fastkd.doctor``.

    Returns:
        A 0-d tensor, or [B, A, Lq] with ``reduction="none"``; float32, or float64 for float64 students. 0 where no row
        is left to average.

    Raises:
        ValueError, TypeError: for arguments that do not fit, before any work.
        RuntimeError: ``impl="fused"`` where no kernel can run; and where a fused gradient is differentiated again.
    """
    objective = Objective(divergence, beta, temperature=1.0, kd_weight=1.0, ce_weight=0.0)
    check_choice("reduction", reduction, REDUCTIONS)
    normalizer, num_heads = as_normalizer(normalizer, reduction), as_int("num_heads", num_heads)
    scales = as_scale("student_scale", student_scale), as_scale("teacher_scale", teacher_scale)
    given = Inputs(
        student_q, student_k, teacher_q, teacher_k, num_heads, *scales, student_bias, teacher_bias,
        key_mask, query_mask, causal,
    )  # fmt: skip
    given.check(num_kv_heads, teacher_num_kv_heads)
    inputs = given.completed()
    device = inputs.student_q.device
    if not use_fused(impl, device):
        measure: dict[str, Any] = {"divergence": objective.divergence, "beta": objective.beta}
        return reference.attention_kl(**inputs._asdict(), **measure, reduction=reduction, normalizer=normalizer)

    dtype, keys = score_dtype(inputs.student_q), inputs.student_k.shape[1]
    bias = _for_kernel(inputs.student_bias, dtype)
    shape = (*inputs.student_q.shape[:2], keys)
    arguments = (
        *inputs[:4],
        bias,
        constant(_for_kernel(inputs.teacher_bias, dtype)),
        row_coefficients(shape, num_heads, inputs.key_mask, inputs.query_mask, causal, reduction, normalizer, device),
        inputs.key_mask,
        causal,
        num_heads,
        tuple(wants_gradient(x) for x in (inputs.student_q, inputs.student_k, bias)),
        objective.code,
        numbers(objective.beta, inputs.student_scale, inputs.teacher_scale, *objective.weights),
    )
    loss = apply(AttentionKLPerRow, *arguments) if reduction == "none" else apply(AttentionKL, *arguments)[0]
    return loss if dtype == torch.float64 else loss.float()
