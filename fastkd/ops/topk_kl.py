"""logit_kl and linear_kl with a teacher that is known by its top: what the public functions hand a ``TopK`` over to.

The forward pass on logits reads the student's once and keeps three numbers a row; the backward pass reads them again
and writes the gradient. On hidden states, tokens are taken in chunks, as in linear_kl.py: one GEMM fills a workspace
with the student's scores, the row primitive (drivers/topk_rows.py) turns them into their gradient in place, two GEMMs
carry that on. There are no teacher's scores: 6 T V Hs FLOPs with gradients.

T tokens (any leading shape), V vocabulary, Hs hidden width, K ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backend import backend_for, use_fused
from ..checks import Objective, TokenArguments, as_number, is_finite, numbers
from ..teachers import WITHOUT_TAIL, TopK
from .autograd import (
    Function,
    Gradient,
    GradientsAhead,
    Loss,
    apply,
    differentiable,
    for_arguments,
    in_dtypes_of,
    wants_gradient,
)
from .drivers.chunks import row_blocks
from .drivers.linear_kl_call import Projection
from .drivers.topk_linear_cpu import TopKTeacher, on_cpu
from .drivers.topk_linear_gpu import on_gpu
from .drivers.topk_rows import TOPK_STATS, topk_rows, topk_rows_problem
from .dtypes import gradient_dtype, score_dtype
from .linear_kl_arguments import Inputs, as_workspace, check_inputs, flat
from .logit_kl_arguments import check_logits
from .vocabulary_shards import local_tensor, local_tokens, vocabulary_group

__all__ = ["TopKLinearKL", "TopKLinearKLPerToken", "TopKLogitKL", "topk_linear_kl", "topk_logit_kl"]

# For the scores of a chunk, of which there are one buffer and not two.
WORKSPACE_MB = {"cpu": 64, "cuda": 384}

# ---- schema ---------------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastkd", "FRAGMENT")
_TEACHER = "Tensor ids, Tensor log_probs, Tensor? tail_log_prob"
_OBJECTIVE = "bool conditional, Tensor numbers"  # beta, temperature, kd_weight, ce_weight, the divergences' weights
_library.define(
    f"topk_logit_kl(Tensor student_logits, {_TEACHER}, Tensor coefficient, Tensor? labels, {_OBJECTIVE}) "
    "-> (Tensor loss, Tensor stats)"
)
_library.define(
    f"topk_logit_kl_backward(Tensor student_logits, {_TEACHER}, Tensor stats, Tensor coefficient, Tensor? labels, "
    f"{_OBJECTIVE}) -> Tensor"
)
_library.define(
    f"topk_linear_kl(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, {_TEACHER}, "
    f"Tensor coefficient, Tensor? labels, Tensor sizes, bool[3] gradients, {_OBJECTIVE}) "
    "-> (Tensor loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)

# ---- fake -----------------------------------------------------------------------------------------------------------


@torch.library.register_fake("fastkd::topk_logit_kl", lib=_library)
def _(student_logits, ids, log_probs, tail_log_prob, coefficient, *rest):
    return torch.empty_like(coefficient), coefficient.new_empty(coefficient.shape[0], TOPK_STATS)


@torch.library.register_fake("fastkd::topk_logit_kl_backward", lib=_library)
def _(student_logits, *rest):
    return student_logits.new_empty(student_logits.shape)


def _outputs(hidden, weight, bias, coefficient, gradients):
    dtype = gradient_dtype(weight)
    wanted = zip(gradients, (hidden, weight, bias), strict=True)
    shapes = [x.shape if want and x is not None else (0,) for want, x in wanted]
    return torch.empty_like(coefficient), *(weight.new_empty(shape, dtype=dtype) for shape in shapes)


@torch.library.register_fake("fastkd::topk_linear_kl", lib=_library)
def _(hidden, weight, bias, ids, log_probs, tail_log_prob, coefficient, labels, sizes, gradients, *rest):
    return _outputs(hidden, weight, bias, coefficient, gradients)


# ---- forward and backward -------------------------------------------------------------------------------------------


def _objective(conditional: bool, numbers: Tensor) -> tuple[Any, ...]:
    """The trailing arguments of the row primitive."""
    beta, temperature, kd_weight, ce_weight, *divergences = numbers.tolist()
    return divergences, conditional, beta, temperature, kd_weight, ce_weight


def _at(rows: slice, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x[rows] for x in tensors]


def _forward(student_logits, ids, log_probs, tail_log_prob, coefficient, labels, conditional, numbers):
    objective = _objective(conditional, numbers)
    loss, stats = torch.empty_like(coefficient), coefficient.new_empty(coefficient.shape[0], TOPK_STATS)
    given = (ids, log_probs, tail_log_prob, coefficient, labels, loss, stats)
    for rows, (s,) in row_blocks(student_logits):
        topk_rows(s, *_at(rows, *given), None, *objective)  # type: ignore[arg-type]
    return loss, stats


def _backward(student_logits, ids, log_probs, tail_log_prob, stats, coefficient, labels, conditional, numbers):
    objective = _objective(conditional, numbers)
    gradient = student_logits.new_empty(student_logits.shape)
    given = (ids, log_probs, tail_log_prob, coefficient, labels, None, stats)
    for rows, (s, g) in row_blocks(student_logits, gradient):
        topk_rows(s, *_at(rows, *given), g, *objective)  # type: ignore[arg-type]
    return gradient


def _linear(
    student_hidden: Tensor,  # [T, Hs]
    student_weight: Tensor,  # [V, Hs]
    student_bias: Tensor | None,  # [V]
    ids: Tensor,  # [T, K] int64
    log_probs: Tensor,  # [T, K] float64
    tail_log_prob: Tensor | None,  # [T] float64
    coefficient: Tensor,  # [T] float64
    labels: Tensor | None,  # [T] int64
    sizes: Tensor,  # [2]: student_scale, workspace_mb
    gradients: list[bool],  # of student_hidden, student_weight, student_bias
    conditional: bool,
    numbers: Tensor,  # [10]
) -> tuple[Tensor, ...]:
    scale, workspace_mb = sizes.tolist()
    student = Projection(student_hidden, student_weight, student_bias, scale)
    teacher = TopKTeacher(ids, log_probs, tail_log_prob)
    if coefficient.shape[0] == 0:
        return tuple(x.zero_() for x in _outputs(student_hidden, student_weight, student_bias, coefficient, gradients))
    driver = on_cpu if backend_for(student_hidden.device)[0] == "cpp" else on_gpu
    workspace_bytes = int(workspace_mb * 2**20)
    return driver(student, teacher, coefficient, labels, workspace_bytes, gradients, *_objective(conditional, numbers))


_library.impl("topk_logit_kl", _forward, "CompositeExplicitAutograd")
_library.impl("topk_logit_kl_backward", _backward, "CompositeExplicitAutograd")
_library.impl("topk_linear_kl", _linear, "CompositeExplicitAutograd")

# ---- autograd.Function ----------------------------------------------------------------------------------------------


class TopKLogitKL(Loss):
    """Per-token losses [tokens] in float64, coefficient included, differentiable in the student's logits.

    Arguments are those of ``torch.ops.fastkd.topk_logit_kl``, and so are the outputs: the second, statistics of the
    rows, is what the backward pass starts from.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.fastkd.topk_logit_kl(*arguments)

    @classmethod
    def keep(cls, ctx: Any, inputs: Sequence[Any], output: Sequence[Any]) -> None:
        *tensors, ctx.conditional, numbers = inputs
        ctx.save_for_backward(*tensors, output[1], numbers)

    @classmethod
    def gradients(cls, ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        *given, coefficient, labels, stats, numbers = ctx.saved_tensors
        arguments = (*given, stats, coefficient * grad_loss, labels, ctx.conditional, numbers)
        return for_arguments(ctx, (0,), (apply(_TopKLogitKLGradient, "logit_kl", *arguments),))


class _TopKLogitKLGradient(Gradient):
    @staticmethod
    def forward(op: str, *arguments: Any) -> Tensor:
        return torch.ops.fastkd.topk_logit_kl_backward(*arguments)


OF_STUDENT = (0, 1, 2)  # arguments that get a gradient: hidden states, weight and bias


class TopKLinearKL(GradientsAhead):
    """The summed loss, a 0-d float64 tensor, and the gradients, which the forward pass computes.

    Arguments are those of ``torch.ops.fastkd.topk_linear_kl``.
    """

    op = "linear_kl"

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        loss, *gradients = torch.ops.fastkd.topk_linear_kl(*arguments)
        return loss.sum(), *gradients

    @staticmethod
    def of_student(arguments: Sequence[Any]) -> Sequence[int]:
        return OF_STUDENT


class TopKLinearKLPerToken(Function):
    """Losses per token, [T] float64; the backward pass computes scores and gradients from the inputs.

    Arguments are those of ``torch.ops.fastkd.topk_linear_kl``.
    """

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return torch.ops.fastkd.topk_linear_kl(*arguments[:9], [False] * 3, *arguments[10:])[0]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, _, ctx.conditional, numbers = inputs
        ctx.save_for_backward(*tensors, numbers)

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        *tensors, coefficient, labels, sizes, numbers = ctx.saved_tensors
        inputs = (*tensors, coefficient * grad_loss, labels, sizes, ctx.needs_input_grad[:3], ctx.conditional, numbers)
        return for_arguments(ctx, OF_STUDENT, apply(_TopKLinearKLGradient, "linear_kl", *inputs))


class _TopKLinearKLGradient(Gradient):
    @staticmethod
    def forward(op: str, *arguments: Any) -> tuple[Tensor, ...]:
        _, *gradients = torch.ops.fastkd.topk_linear_kl(*arguments)
        return in_dtypes_of(OF_STUDENT, arguments, gradients)


# ---- what the public functions hand over to -------------------------------------------------------------------------


def _check_keywords(
    teacher: TopK,
    heads: dict[str, Any],
    *,
    divergence: Any,
    beta: float,
    temperature: float,
    weight: Tensor | None,
    labels: Tensor | None,
    ce_weight: float,
    kd_weight: float,
    ignore_index: int,
    reduction: str,
    normalizer: float | Tensor | None,
    vocab_group: Any,
) -> tuple[Objective, TokenArguments]:
    """The keywords that both losses share, checked but for what depends on the student's shape."""
    dim = -1 if "student_logits" in heads else 0
    if vocabulary_group(vocab_group, heads, dim) is not None:
        raise ValueError("vocab_group: expected None, as the teacher is a TopK, whose vocabulary cannot be sharded yet")
    objective = Objective(divergence, beta, temperature, kd_weight, ce_weight)
    undefined = [name for name in objective.members if name not in WITHOUT_TAIL]
    if teacher.tail in ("ignore", "renormalize") and undefined and kd_weight != 0:
        raise ValueError(
            f"divergence: expected forward_kl or skew_kl, as the teacher's tail is {teacher.tail!r}, got "
            f"{undefined[0]!r}, which weighs what the student has in the tail by what the teacher has there; "
            'tail="bucket" and tail="conditional" serve every divergence'
        )
    return objective, local_tokens(weight, labels, normalizer, ignore_index, reduction)


def _arguments(
    teacher: TopK, objective: Objective, tokens: TokenArguments, student: Tensor, vocabulary: int
) -> tuple[list[Any], list[Any]]:
    """(teacher, coefficient and labels; the trailing arguments) of the ops"""
    ids, log_probs, tail = teacher.for_op(objective.temperature, vocabulary)
    of_teacher = [ids.contiguous(), log_probs.contiguous(), tail.contiguous() if teacher.tail == "bucket" else None]
    labels = tokens.flat_labels() if objective.ce_weight != 0 else None
    of_tokens = [tokens.coefficients(student.shape[:-1], student.device), labels]
    weights = (objective.kd_weight, objective.ce_weight, *objective.all_weights)
    trailing = [teacher.tail == "conditional", numbers(objective.beta, objective.temperature, *weights)]
    return [*of_teacher, *of_tokens], trailing


def topk_logit_kl(student_logits: Tensor, teacher: TopK, *, impl: str, **keywords: Any) -> Tensor:
    """``fastkd.logit_kl`` with a ``TopK``."""
    objective, tokens = _check_keywords(teacher, {"student_logits": student_logits}, **keywords)
    student = differentiable(student_logits)
    check_logits(student, None, replace(objective, kd_weight=0.0), tokens, False)
    leading = student.shape[:-1]
    teacher.check(leading, student.device)
    if not use_fused(impl, student.device, topk_rows_problem(student.device, teacher.indices.shape[-1])):
        return reference.logit_kl(student, teacher, **vars(objective), **vars(tokens))
    given, trailing = _arguments(teacher, objective, tokens, student, student.shape[-1])
    loss, _ = apply(TopKLogitKL, student, *given, *trailing)
    return (loss.reshape(leading) if tokens.reduction == "none" else loss.sum()).to(score_dtype(student))


def topk_linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: TopK,
    *,
    student_bias: Tensor | None,
    student_scale: float,
    workspace_mb: float | None,
    impl: str,
    **keywords: Any,
) -> Tensor:
    """``fastkd.linear_kl`` with a ``TopK``."""
    heads = {"student_weight": student_weight, "student_bias": student_bias}
    objective, tokens = _check_keywords(teacher, heads, **keywords)
    student_scale = as_number("student_scale", student_scale, "that is finite", is_finite)
    workspace_mb = as_workspace(workspace_mb)
    inputs = Inputs(local_tensor("student_hidden", student_hidden), student_weight, student_bias, None, None, None)
    hidden, weight, bias, *_ = check_inputs(inputs, replace(objective, kd_weight=0.0), tokens, False)
    teacher.check(hidden.shape[:-1], hidden.device)
    if not use_fused(impl, hidden.device, topk_rows_problem(hidden.device, teacher.indices.shape[-1])):
        return reference.linear_kl(
            hidden, weight, teacher, None, student_bias=bias, teacher_bias=None, student_scale=student_scale,
            teacher_scale=1.0, **vars(objective), **vars(tokens),
        )  # fmt: skip
    given, trailing = _arguments(teacher, objective, tokens, hidden, weight.shape[0])
    sizes = numbers(student_scale, WORKSPACE_MB[hidden.device.type] if workspace_mb is None else workspace_mb)
    wanted = tuple(wants_gradient(x) for x in (hidden, weight, bias))
    arguments = (flat(hidden), weight, bias, *given, sizes, wanted, *trailing)
    if tokens.reduction == "none":
        loss = apply(TopKLinearKLPerToken, *arguments).reshape(hidden.shape[:-1])
    else:
        loss, *_ = apply(TopKLinearKL, *arguments)
    return loss.to(score_dtype(hidden))
