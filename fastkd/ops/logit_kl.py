"""logit_kl: divergence (and cross-entropy) between vocabulary logits that exist already.

The forward pass reads both logits once and keeps seven numbers a row; the backward pass reads them again and writes the
gradient. Nothing else of the logits' size is ever held. Where the vocabulary is spread over the ranks of a process
group, these numbers are completed by what the ranks gather of them (vocabulary_shards.py).

T tokens (any leading shape), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from .. import reference
from ..backend import use_fused
from ..checks import Objective, check_flag
from ..divergence import Divergence, for_rows
from ..teachers import TopK
from .autograd import Gradient, Loss, apply, constant, differentiable, for_arguments
from .drivers.chunks import row_blocks
from .drivers.divergence_rows import METRICS, STATS, divergence_rows
from .drivers.whole_rows import RowBlock, known_labels, whole_row_gradient, whole_row_stats
from .dtypes import score_dtype
from .logit_kl_arguments import Checked, check_logits, facts
from .metrics import averaged
from .topk_kl import topk_logit_kl
from .vocabulary_shards import (
    NO_SHARD,
    OBJECTIVE,
    SHARD_ARGUMENTS,
    agree,
    group_by_name,
    local_tokens,
    shard_on,
    vocabulary_group,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from .options import LogitOptions

__all__ = ["LogitKL", "logit_kl"]

# ---- schema ---------------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastkd", "FRAGMENT")
_library.define(
    "logit_kl(Tensor student_logits, Tensor? teacher_logits, Tensor coefficient, Tensor? labels, "
    f"{OBJECTIVE}, {SHARD_ARGUMENTS}, bool metrics=False) -> (Tensor loss, Tensor stats, Tensor metrics)"
)
_library.define(
    "logit_kl_backward(Tensor student_logits, Tensor? teacher_logits, Tensor stats, Tensor coefficient, "
    f"Tensor? labels, {OBJECTIVE}, {SHARD_ARGUMENTS}) -> Tensor"
)

# ---- fake -----------------------------------------------------------------------------------------------------------


def _outputs(coefficient, metrics):
    """Loss, statistics and metrics, unwritten; metrics that are not asked for are empty."""
    rows = coefficient.shape[0]
    told = coefficient.new_empty(rows if metrics else 0, METRICS)
    return torch.empty_like(coefficient), coefficient.new_empty(rows, STATS), told


@torch.library.register_fake("fastkd::logit_kl", lib=_library)
def _(student_logits, teacher_logits, coefficient, labels, divergence, numbers, group="", widest=0, metrics=False):
    return _outputs(coefficient, metrics)


@torch.library.register_fake("fastkd::logit_kl_backward", lib=_library)
def _(student_logits, teacher_logits, stats, coefficient, labels, *rest):
    return student_logits.new_empty(student_logits.shape)


# ---- forward --------------------------------------------------------------------------------------------------------


def _compared(student: Tensor, teacher: Tensor | None, labels: Tensor | None, objective: Sequence[float]) -> list[Any]:
    """What the two terms are of: [student, teacher, labels], where a term of no weight asks for nothing.

    The divergence is of the columns that both models have, the cross-entropy of all that the student has.
    """
    *_, kd_weight, ce_weight = objective
    labels = labels if ce_weight != 0 else None
    if teacher is None or kd_weight == 0:
        return [student, None, labels]
    vocabulary = min(student.shape[-1], teacher.shape[-1])
    return [student if labels is not None else student[..., :vocabulary], teacher[..., :vocabulary], labels]


def _in_parts(student: Tensor, teacher: Tensor | None, group: ProcessGroup | None) -> bool:
    """Whether rows are put together from parts: shards, or a tail that the teacher has none of."""
    return group is not None or (teacher is not None and student.shape[-1] > teacher.shape[-1])


def _forward(
    student_logits,
    teacher_logits,
    coefficient,
    labels,
    divergence,
    numbers,
    vocab_group="",
    widest_shard=0,
    metrics=False,
):
    objective, group = for_rows(divergence, numbers), group_by_name(vocab_group)
    student, teacher, labels = _compared(student_logits, teacher_logits, labels, objective)
    loss, stats, told = _outputs(coefficient, metrics)
    if _in_parts(student, teacher, group):
        if labels is not None and group is None:
            labels = known_labels(labels, student.shape[-1])
        if len(loss):
            blocks = [RowBlock(rows, s, t) for rows, (s, t) in row_blocks(student, teacher)]
            whole_row_stats(
                blocks, coefficient, labels, loss, stats, group, *objective, metrics=told if metrics else None
            )
        return loss, stats, told
    for rows, (s, t) in row_blocks(student, teacher):
        row_labels = None if labels is None else labels[rows]
        row_metrics = told[rows] if metrics else None
        divergence_rows(
            s, t, coefficient[rows], row_labels, loss[rows], stats[rows], None, *objective, metrics=row_metrics
        )
    return loss, stats, told


_library.impl("logit_kl", _forward, "CompositeExplicitAutograd")

# ---- backward -------------------------------------------------------------------------------------------------------


def _backward(
    student_logits, teacher_logits, stats, coefficient, labels, divergence, numbers, vocab_group="", widest_shard=0
):
    objective, group = for_rows(divergence, numbers), group_by_name(vocab_group)
    gradient = student_logits.new_empty(student_logits.shape)
    student, teacher, labels = _compared(student_logits, teacher_logits, labels, objective)
    in_parts = _in_parts(student, teacher, group)
    if in_parts and labels is not None and group is None:
        labels = known_labels(labels, student.shape[-1])
    gradient[..., student.shape[-1] :] = 0  # columns of neither term
    target = gradient[..., : student.shape[-1]]
    for rows, (s, t, g) in row_blocks(student, teacher, target):
        row_labels = None if labels is None else labels[rows]
        if in_parts:
            whole_row_gradient(RowBlock(rows, s, t), stats[rows], coefficient[rows], row_labels, g, *objective)
        else:
            divergence_rows(s, t, coefficient[rows], row_labels, None, stats[rows], g, *objective)
    return gradient


_library.impl("logit_kl_backward", _backward, "CompositeExplicitAutograd")

# ---- autograd.Function ----------------------------------------------------------------------------------------------


class LogitKL(Loss):
    """Per-token losses [tokens] in float64, coefficient included, differentiable in the student's logits.

    Arguments are those of ``torch.ops.fastkd.logit_kl``, and so are the outputs: the second, statistics of the rows, is
    what the backward pass starts from, the third what the rows tell of themselves.
    """

    @staticmethod
    def forward(
        student_logits: Tensor,  # [T..., Vs]
        teacher_logits: Tensor | None,  # [T..., Vt]
        coefficient: Tensor,  # [tokens] float64
        labels: Tensor | None,  # [tokens] int64
        *objective: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.fastkd.logit_kl(student_logits, teacher_logits, coefficient, labels, *objective)

    @classmethod
    def keep(cls, ctx: Any, inputs: Sequence[Any], output: Sequence[Any]) -> None:
        student_logits, teacher_logits, coefficient, labels, divergence, numbers, *shard = inputs
        _, stats, _ = output
        ctx.save_for_backward(student_logits, teacher_logits, stats, coefficient, labels, numbers)
        ctx.divergence, ctx.shard = divergence, shard[:2]

    @classmethod
    def gradients(cls, ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        student_logits, teacher_logits, stats, coefficient, labels, numbers = ctx.saved_tensors
        weights = coefficient * grad_loss
        gradient = apply(
            _LogitKLGradient,
            "logit_kl",
            student_logits,
            teacher_logits,
            stats,
            weights,
            labels,
            ctx.divergence,
            numbers,
            *ctx.shard,
        )
        return for_arguments(ctx, (0,), (gradient,))


class _LogitKLGradient(Gradient):
    @staticmethod
    def forward(op: str, *arguments: Any) -> Tensor:
        return torch.ops.fastkd.logit_kl_backward(*arguments)


# ---- public function ------------------------------------------------------------------------------------------------


@overload
def logit_kl(
    student_logits: Tensor,
    teacher_logits: Tensor | TopK | None,
    *,
    return_metrics: Literal[False] = ...,
    **options: Unpack[LogitOptions],
) -> Tensor: ...
@overload
def logit_kl(
    student_logits: Tensor,
    teacher_logits: Tensor | TopK | None,
    *,
    return_metrics: Literal[True],
    **options: Unpack[LogitOptions],
) -> tuple[Tensor, dict[str, Tensor]]: ...
@overload
def logit_kl(
    student_logits: Tensor,
    teacher_logits: Tensor | TopK | None,
    *,
    return_metrics: bool,
    **options: Unpack[LogitOptions],
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...
def logit_kl(
    student_logits: Tensor,
    teacher_logits: Tensor | TopK | None,
    *,
    divergence: Divergence | Mapping[Divergence, float] = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    vocab_group: ProcessGroup | None = None,
    return_metrics: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Distillation loss between vocabulary logits, with a cross-entropy beside it if asked for.

    ``kd_weight * temperature**2 * D(p, q) + ce_weight * cross_entropy(student_logits, labels)`` for every token, with
    ``q = softmax(student_logits / temperature)`` and ``p = softmax(teacher_logits / temperature)``. The cross-entropy
    is taken at temperature 1. Hinton et al., 2015 (arXiv 1503.02531) for the temperature; ``fastkd.divergence``
    names the source of each divergence.

    Args:
        student_logits: [..., Vs], float32, float64, float16 or bfloat16, of any stride. Receives the gradient.
        teacher_logits: [..., Vt], the same leading shape; a constant. Where Vs and Vt differ, both models are compared
            over the prefix they share, renormalised there; the cross-entropy is over all Vs columns. Without it those
            beyond the prefix get a gradient of exactly 0. May be None with ``kd_weight=0``. A ``fastkd.TopK`` is a
            teacher of which some log-probabilities [..., K] are known.
        divergence: ``forward_kl``, ``reverse_kl``, ``jsd``, ``skew_kl``, ``skew_reverse_kl`` or ``tvd``; or a mapping
            of such names to weights >= 0, at least one of them > 0: the weighted sum, in one pass.
        beta: mixture weight in (0, 1) of ``jsd``, ``skew_kl`` and ``skew_reverse_kl``, of every member of a mix.
        temperature: > 0.
        weight: [...] a number for each token, or a mask of bool or integers; 0 drops it. A constant, as ``normalizer``
            is. May be negative, but the mean of weights that cancel is NaN or infinite.
        labels: [...] integers in [0, Vs) or ``ignore_index``, which drops the token from both terms.
        ce_weight, kd_weight: weights of the two terms.
        ignore_index: the label of tokens that are dropped.
        reduction: ``"mean"`` divides by the sum of weights, ``"sum"`` does not, ``"none"`` returns [...].
        normalizer: with ``"mean"``, a number or 0-d tensor that replaces the sum of weights, such as
            ``num_items_in_batch`` under gradient accumulation.
        vocab_group: a ``torch.distributed`` process group over whose ranks the vocabulary is spread, of which
            ``student_logits`` and ``teacher_logits`` are this rank's columns: contiguous, in the order of ranks, of any
            number, 0 included, and the same of both models as far as both have them. All other arguments are the same
            on all ranks, and labels count in the whole vocabulary. Every rank returns the loss of the whole vocabulary,
            and the gradient of its own columns. Logits that are DTensors, sharded along their last dimension over a
            one-dimensional mesh, need no ``vocab_group``, and get gradients that are DTensors.
        return_metrics: whether to return metrics beside the loss, of the same pass over the logits.
        impl: ``"auto"``, ``"reference"`` or ``"fused"``; see ``fastkd.doctor``.

    Returns:
        A 0-d tensor, or [...] with ``reduction="none"``; float32, or float64 for float64 students. 0 where no token is
        left to average. With ``return_metrics`` a tuple of it and a dict of 0-d tensors of its dtype, without gradient:

        - ``kd``: ``temperature**2 * D(p, q)``, as it enters the loss before ``kd_weight``;
        - ``ce``: the cross-entropy before ``ce_weight``;
        - ``student_entropy``, ``teacher_entropy``: of q and of p, over the columns that are compared, in nats;
        - ``agreement``: the share of tokens of which both models score the same of these columns highest;
        - ``student_mass``, ``teacher_mass``: of a ``TopK``, what its ids hold of both models. Its entropies are of the
          ids and the tail as one, and agreement is that no score is higher than that of its likeliest id. With the tail
          "conditional" it is among the ids, and there is no ``student_mass``.

        ``ce`` is there where ``ce_weight`` is not 0, the others where ``kd_weight`` is not. All are means over the
        tokens, weighted by ``weight``, whatever ``reduction`` and ``normalizer`` are, and 0 where no token is left.

    Raises:
        ValueError, TypeError: for arguments that do not fit, before any work.
        RuntimeError: ``impl="fused"`` where no kernel can run; and where a fused gradient is differentiated again.

    A KL is infinite where its second model has a score of -inf that its first gives a probability; then the gradient of
    reverse KL is NaN, and that of forward KL what it tends to. Kernels report one over 1e20 as infinite, too.

    With ``vocab_group`` every rank of the group has to make the call, and sends 56 bytes for every token, 24 more for
    divergences other than forward and reverse KL, 48 more for metrics (with a ``TopK``, which is the same on all ranks,
    48, and 24 for each divergence, 16 more for metrics). An error on one rank is an error on all: a
    ValueError or TypeError where it is, or where the ranks' arguments do not fit together, and a RuntimeError that
    names the rank elsewhere. For that the ranks exchange a hundred bytes first, and on a GPU this waits for the device.
    """
    if isinstance(teacher_logits, TopK):
        return topk_logit_kl(
            student_logits,
            teacher_logits,
            divergence=divergence,
            beta=beta,
            temperature=temperature,
            weight=weight,
            labels=labels,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            vocab_group=vocab_group,
            return_metrics=return_metrics,
            impl=impl,
        )
    logits = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    group = vocabulary_group(vocab_group, logits, -1)

    def check() -> Checked:
        objective = Objective(divergence, beta, temperature, kd_weight, ce_weight)
        objective.check_teacher("teacher_logits", teacher_logits)
        tokens = local_tokens(weight, labels, normalizer, ignore_index, reduction)
        student, teacher = student_logits, teacher_logits
        if group is not None:
            student, teacher = (shard_on(group, name, x, -1) for name, x in logits.items())
        student, teacher = differentiable(student), constant(teacher)
        check_logits(student, teacher, objective, tokens, group is not None)
        check_flag("return_metrics", return_metrics)
        return Checked(student, teacher, objective, tokens, use_fused(impl, student.device))

    (student, teacher, objective, tokens, fused), shard = agree(
        group, check, lambda checked: facts(checked, return_metrics)
    )

    if not fused:
        metrics: dict[str, Tensor] | None = {} if return_metrics else None
        loss = reference.logit_kl(student, teacher, shard=shard, metrics=metrics, **vars(objective), **vars(tokens))
        return loss if metrics is None else (loss, metrics)

    leading, flat_labels = student.shape[:-1], tokens.flat_labels()
    loss, _, rows = apply(
        LogitKL,
        student,
        teacher,
        tokens.coefficients(leading, student.device),
        flat_labels if shard is None or flat_labels is None else shard.local_columns(flat_labels),
        *((*objective.for_op(), *NO_SHARD) if shard is None else shard.for_op()),
        return_metrics,
    )
    loss = loss.reshape(leading) if reduction == "none" else loss.sum()
    dtype = score_dtype(student)
    if not return_metrics:
        return loss.to(dtype)
    return loss.to(dtype), averaged(rows, tokens.weights(leading, student.device), objective, dtype)
