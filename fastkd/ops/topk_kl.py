"""logit_kl and linear_kl with a teacher that is known by its top: what the public functions hand a ``TopK`` over to.

The forward pass on logits reads the student's once and keeps three numbers a row; the backward pass reads them again
and writes the gradient. On hidden states, tokens are taken in chunks, as in linear_kl.py: one GEMM fills a workspace
with the student's scores, the row primitive (drivers/topk_rows.py) turns them into their gradient in place, two GEMMs
carry that on. There are no teacher's scores: 6 T V Hs FLOPs with gradients.

T tokens (any leading shape), V vocabulary, Hs hidden width, K ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backend import backend_for
from ..checks import check_flag, numbers
from ..heads import Head
from ..quantized import QuantizedWeight
from ..teachers import TopK
from .autograd import Gradient, Loss, apply, differentiable, for_arguments, wants_gradient
from .drivers.chunks import row_blocks
from .drivers.divergence_rows import METRICS
from .drivers.linear_kl_call import Projection
from .drivers.topk_call import TopKCall
from .drivers.topk_linear_cpu import on_cpu
from .drivers.topk_linear_gpu import on_gpu
from .drivers.topk_rows import TOPK_STATS
from .drivers.topk_shards import WHOLE_STATS, topk_call_rows, topk_whole_stats
from .dtypes import gradient_dtype, without_autocast
from .linear_kl_arguments import as_head, checked, flat, tensors_of
from .linear_kl_functions import TopKLinearKL, TopKLinearKLPerToken
from .logit_kl_arguments import check_logits
from .topk_kl_arguments import Checked, Result, check_teacher, objective_for
from .vocabulary_shards import (
    SHARD_ARGUMENTS,
    agree,
    group_by_name,
    local_tokens,
    shard_on,
    vocabulary_group,
)

__all__ = ["TopKLogitKL", "topk_linear_kl", "topk_logit_kl"]

# For the scores of a chunk, of which there are one buffer and not two.
WORKSPACE_MB = {"cpu": 64, "cuda": 384}

# ---- schema ---------------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastkd", "FRAGMENT")
_TEACHER = "Tensor ids, Tensor log_probs, Tensor? tail_log_prob"
_OBJECTIVE = "bool conditional, Tensor numbers"  # beta, temperature, kd_weight, ce_weight, the divergences' weights
_SHARD = SHARD_ARGUMENTS  # of a shard, ids are as labels are
_library.define(
    f"topk_logit_kl(Tensor student_logits, {_TEACHER}, Tensor coefficient, Tensor? labels, {_OBJECTIVE}, {_SHARD}, "
    "bool metrics=False) -> (Tensor loss, Tensor stats, Tensor metrics)"
)
_library.define(
    f"topk_logit_kl_backward(Tensor student_logits, {_TEACHER}, Tensor stats, Tensor coefficient, Tensor? labels, "
    f"{_OBJECTIVE}, {_SHARD}) -> Tensor"
)
_library.define(
    f"topk_linear_kl(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, {_TEACHER}, "
    f"Tensor coefficient, Tensor? labels, Tensor sizes, bool[3] gradients, {_OBJECTIVE}, {_SHARD}, bool metrics=False) "
    "-> (Tensor loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor metrics)"
)

# ---- fake -----------------------------------------------------------------------------------------------------------


def _rows(coefficient, group, metrics):
    """Loss, statistics and metrics, unwritten; metrics that are not asked for are empty."""
    rows = coefficient.shape[0]
    stats = coefficient.new_empty(rows, WHOLE_STATS if group else TOPK_STATS)
    return torch.empty_like(coefficient), stats, coefficient.new_empty(rows if metrics else 0, METRICS)


@torch.library.register_fake("fastkd::topk_logit_kl", lib=_library)
def _(
    student_logits, ids, log_probs, tail_log_prob, coefficient, labels, conditional, numbers, group="", widest=0,
    metrics=False,
):  # fmt: skip
    return _rows(coefficient, group, metrics)


@torch.library.register_fake("fastkd::topk_logit_kl_backward", lib=_library)
def _(student_logits, *rest):
    return student_logits.new_empty(student_logits.shape)


def _outputs(hidden, weight, bias, coefficient, gradients, metrics):
    dtype = gradient_dtype(weight)
    wanted = zip(gradients, (hidden, weight, bias), strict=True)
    shapes = [x.shape if want and x is not None else (0,) for want, x in wanted]
    told = coefficient.new_empty(coefficient.shape[0] if metrics else 0, METRICS)
    return torch.empty_like(coefficient), *(weight.new_empty(shape, dtype=dtype) for shape in shapes), told


@torch.library.register_fake("fastkd::topk_linear_kl", lib=_library)
def _(
    hidden, weight, bias, ids, log_probs, tail_log_prob, coefficient, labels, sizes, gradients, conditional, numbers,
    group="", widest=0, metrics=False,
):  # fmt: skip
    return _outputs(hidden, weight, bias, coefficient, gradients, metrics)


# ---- forward and backward -------------------------------------------------------------------------------------------


def _objective(conditional: bool, numbers: Tensor) -> tuple[Any, ...]:
    """The trailing arguments of the row primitive."""
    beta, temperature, kd_weight, ce_weight, *divergences = numbers.tolist()
    return divergences, conditional, beta, temperature, kd_weight, ce_weight


def _forward(
    student_logits, ids, log_probs, tail_log_prob, coefficient, labels, conditional, numbers, vocab_group="",
    widest_shard=0, metrics=False,
):  # fmt: skip
    group = group_by_name(vocab_group)
    call = TopKCall(ids, log_probs, tail_log_prob, coefficient, labels, group, _objective(conditional, numbers))
    loss, stats, told = _rows(coefficient, vocab_group, metrics)
    blocks = [(rows, s) for rows, (s,) in row_blocks(student_logits)]
    if group is not None:
        if len(loss):
            stats = topk_whole_stats(blocks, call, loss, told if metrics else None)
        return loss, stats, told
    for rows, s in blocks:
        topk_call_rows(s, call.at(rows), loss[rows], stats[rows], None, told[rows] if metrics else None)
    return loss, stats, told


def _backward(
    student_logits, ids, log_probs, tail_log_prob, stats, coefficient, labels, conditional, numbers, vocab_group="",
    widest_shard=0,
):  # fmt: skip
    objective, group = _objective(conditional, numbers), group_by_name(vocab_group)
    call = TopKCall(ids, log_probs, tail_log_prob, coefficient, labels, group, objective)
    gradient = student_logits.new_empty(student_logits.shape)
    for rows, (s, g) in row_blocks(student_logits, gradient):
        topk_call_rows(s, call.at(rows), None, stats[rows], g)
    return gradient


@without_autocast
def _linear(
    student_hidden: Tensor,  # [T, Hs]
    student_weight: Tensor,  # [V, Hs]
    student_bias: Tensor | None,  # [V]
    ids: Tensor,  # [T, K] int64
    log_probs: Tensor,  # [T, K] float64
    tail_log_prob: Tensor | None,  # [T] float64
    coefficient: Tensor,  # [T] float64
    labels: Tensor | None,  # [T] int64
    sizes: Tensor,  # [3]: student_scale, student_softcap (0: none), workspace_mb
    gradients: list[bool],  # of student_hidden, student_weight, student_bias
    conditional: bool,
    numbers: Tensor,  # [10]
    vocab_group: str = "",
    widest_shard: int = 0,
    metrics: bool = False,
) -> tuple[Tensor, ...]:
    scale, softcap, workspace_mb = sizes.tolist()
    student = Projection(student_hidden, student_weight, student_bias, scale, softcap or None)
    objective, group = _objective(conditional, numbers), group_by_name(vocab_group)
    call = TopKCall(ids, log_probs, tail_log_prob, coefficient, labels, group, objective)
    if coefficient.shape[0] == 0:
        outputs = _outputs(student_hidden, student_weight, student_bias, coefficient, gradients, metrics)
        return tuple(x.zero_() for x in outputs)
    told = coefficient.new_zeros(coefficient.shape[0] if metrics else 0, METRICS)
    driver = on_cpu if backend_for(student_hidden.device)[0] == "cpp" else on_gpu
    widest = student_weight.shape[0] if group is None else widest_shard
    workspace_bytes = int(workspace_mb * 2**20)
    return *driver(student, call, widest, workspace_bytes, gradients, told if metrics else None), told


_library.impl("topk_logit_kl", _forward, "CompositeExplicitAutograd")
_library.impl("topk_logit_kl_backward", _backward, "CompositeExplicitAutograd")
_library.impl("topk_linear_kl", _linear, "CompositeExplicitAutograd")

# ---- autograd.Function: linear_kl's are in linear_kl_functions.py ----------------------------------------------------


class TopKLogitKL(Loss):
    """Per-token losses [tokens] in float64, coefficient included, differentiable in the student's logits.

    Arguments are those of ``torch.ops.fastkd.topk_logit_kl``, and so are the outputs: the second, statistics of the
    rows, is what the backward pass starts from, the third what the rows tell of themselves.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.fastkd.topk_logit_kl(*arguments)

    @classmethod
    def keep(cls, ctx: Any, inputs: Sequence[Any], output: Sequence[Any]) -> None:
        *tensors, ctx.conditional, numbers = inputs[:8]
        ctx.save_for_backward(*tensors, output[1], numbers)
        ctx.shard = inputs[8:10]

    @classmethod
    def gradients(cls, ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        *given, coefficient, labels, stats, numbers = ctx.saved_tensors
        arguments = (*given, stats, coefficient * grad_loss, labels, ctx.conditional, numbers, *ctx.shard)
        return for_arguments(ctx, (0,), (apply(_TopKLogitKLGradient, "logit_kl", *arguments),))


class _TopKLogitKLGradient(Gradient):
    @staticmethod
    def forward(op: str, *arguments: Any) -> Tensor:
        return torch.ops.fastkd.topk_logit_kl_backward(*arguments)


# ---- what the public functions hand over to -------------------------------------------------------------------------


def topk_logit_kl(
    student_logits: Tensor,
    teacher: TopK,
    *,
    divergence: Any,
    beta: float,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    vocab_group: Any,
    return_metrics: bool,
    impl: str,
    **of_tokens: Any,
) -> Result:
    """``fastkd.logit_kl`` with a ``TopK``."""
    group = vocabulary_group(vocab_group, {"student_logits": student_logits}, -1)

    def check() -> Checked:
        objective = objective_for(teacher, divergence, beta, temperature, kd_weight, ce_weight)
        tokens = local_tokens(**of_tokens)
        check_flag("return_metrics", return_metrics)
        student = student_logits if group is None else shard_on(group, "student_logits", student_logits, -1)
        student = differentiable(student)
        check_logits(student, None, objective, tokens, group is not None)
        its, fused = check_teacher(teacher, student.shape[:-1], student.device, tokens, impl, group is not None)
        keywords = {"return_metrics": return_metrics}
        return Checked((student,), student.shape[-1], its, objective, tokens, keywords, fused)

    call, shard = agree(group, check, Checked.facts)
    if not call.fused:
        return call.of_reference(shard, reference.logit_kl, *call.tensors, call.teacher)
    given, trailing, tail = call.for_op(shard)
    loss, _, rows = apply(TopKLogitKL, *call.tensors, *given, *trailing)
    return call.result(loss, rows, tail)


def topk_linear_kl(
    student_hidden: Tensor,
    head: Head,
    teacher: TopK,
    *,
    workspace_mb: float | None,
    divergence: Any,
    beta: float,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    vocab_group: Any,
    return_metrics: bool,
    impl: str,
    **of_tokens: Any,
) -> Result:
    """``fastkd.linear_kl`` with a ``TopK``."""
    if isinstance(head.weight, QuantizedWeight):
        raise TypeError(
            "student_weight: a quantised one does not go with a TopK: dequantise it, or give logit_kl the logits"
        )
    none = as_head("teacher", None, None, 1.0, None)
    group = vocabulary_group(vocab_group, tensors_of(head, none), 0)

    def check() -> Checked:
        objective = objective_for(teacher, divergence, beta, temperature, kd_weight, ce_weight)
        tokens = local_tokens(**of_tokens)
        hidden = {"student_hidden": student_hidden, "teacher_hidden": None}
        found = checked(hidden, head, none, group, objective, tokens, workspace_mb, return_metrics, impl)
        student = found.inputs.student_hidden
        its, fused = check_teacher(teacher, student.shape[:-1], student.device, tokens, impl, group is not None)
        columns = found.inputs.student_weight.shape[0]
        return Checked(found.inputs[:3], columns, its, objective, tokens, found.keywords, fused)

    call, shard = agree(group, check, Checked.facts)
    hidden, weight, bias = call.tensors
    scale, _, softcap, _, workspace, _ = call.keywords.values()
    if not call.fused:
        more = {"student_bias": bias, "teacher_bias": None, "student_scale": scale, "teacher_scale": 1.0}
        return call.of_reference(
            shard, reference.linear_kl, hidden, weight, call.teacher, None, student_softcap=softcap, **more
        )
    given, trailing, tail = call.for_op(shard)
    sizes = numbers(scale, softcap or 0.0, WORKSPACE_MB[hidden.device.type] if workspace is None else workspace)
    wanted = tuple(wants_gradient(x) for x in call.tensors)
    function = TopKLinearKLPerToken if call.tokens.reduction == "none" else TopKLinearKL
    loss, *_, rows = apply(function, flat(hidden), weight, bias, *given, sizes, wanted, *trailing)
    return call.result(loss, rows, tail)
