"""relation_kl: the divergence between self-attention relations X X^T of two models; MiniLMv2's loss, and MiniEnD's.

The self case of attention_kl: queries and keys are one tensor X, whose gradient is (G + G^T) X. Queries, keys and
values of a layer are given as lists, and on a GPU go in one launch.

B batch, L length, A relation heads, Hs and Ht widths; one of each for every entry of the lists, except B and A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from .. import reference
from ..backend import backend_for, use_fused
from ..checks import (
    REDUCTIONS,
    Objective,
    as_int,
    as_normalizer,
    check_choice,
    check_flag,
    check_mask,
    check_same_device,
    check_tensor,
    numbers,
)
from ..divergence import Divergence, beta_of
from .attention_kl import empty_gradient
from .attention_kl_arguments import check_heads, row_coefficients
from .autograd import (
    Function,
    Gradient,
    GradientsAhead,
    apply,
    constant,
    differentiable,
    for_arguments,
    in_dtypes_of,
    wants_gradient,
)
from .drivers.attention_kl_cpu import Model, attend_on_cpu
from .dtypes import autocast_like_linear, without_autocast

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["RelationKL", "RelationKLPerRow", "relation_kl"]

# ---- schema ---------------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastkd", "FRAGMENT")
_library.define(
    "relation_kl(Tensor[] student, Tensor[] teacher, Tensor[] coefficient, Tensor?[] key_mask, bool[] causal, "
    "int num_heads, bool[] gradients, int divergence, Tensor beta) -> (Tensor[] loss, Tensor[] gradient)"
)

# ---- fake -----------------------------------------------------------------------------------------------------------


@torch.library.register_fake("fastkd::relation_kl", lib=_library)
def _(student, teacher, coefficient, key_mask, causal, num_heads, gradients, divergence, beta):
    losses = [torch.empty_like(c) for c in coefficient]
    return losses, [empty_gradient(x, wanted, x) for x, wanted in zip(student, gradients, strict=True)]


# ---- forward, with the gradients ------------------------------------------------------------------------------------


@without_autocast
def _relation_kl(
    student: list[Tensor],  # [B, L, Hs] each
    teacher: list[Tensor],  # [B, L, Ht] each
    coefficient: list[Tensor],  # [B, A, L] float64 each, 0 where a row is masked
    key_mask: list[Tensor | None],  # [B, L] bool each
    causal: list[bool],
    num_heads: int,
    gradients: list[bool],
    divergence: int,
    beta: Tensor,  # [1]; and a mix's weights
) -> tuple[list[Tensor], list[Tensor]]:
    number = beta_of(*beta.tolist())
    if backend_for(student[0].device)[0] == "triton":
        from ..kernels import attention as kernels

        return kernels.relation_kl(
            student, teacher, coefficient, key_mask, causal, num_heads, gradients, divergence, number
        )
    losses, results = [], []
    for x, t, weights, mask, is_causal, wanted in zip(
        student, teacher, coefficient, key_mask, causal, gradients, strict=True
    ):
        gradient = empty_gradient(x, wanted, x)
        ours, theirs = (Model(y, y, None, (y.shape[2] // num_heads) ** -0.5) for y in (x, t))
        written = (gradient if wanted else None, None, None)
        losses.append(attend_on_cpu(ours, theirs, weights, mask, is_causal, divergence, number, written, relation=True))
        results.append(gradient)
    return losses, results


_library.impl("relation_kl", _relation_kl, "CompositeExplicitAutograd")

# ---- autograd.Function ----------------------------------------------------------------------------------------------


class RelationKL(GradientsAhead):
    """The summed loss of all entries, a 0-d float64 tensor, and the gradients, which the forward pass computes.

    Arguments: causal (a tuple), num_heads, gradients (a tuple), divergence, then the student's tensors, the teacher's,
    the coefficients and the key masks of ``torch.ops.fastkd.relation_kl`` one after the other, and its numbers.
    """

    op = "relation_kl"

    @staticmethod
    def forward(causal: tuple[bool, ...], num_heads: int, gradients: tuple[bool, ...], divergence: int, *tensors):
        losses, results = torch.ops.fastkd.relation_kl(
            *_in_four(tensors[:-1]), causal, num_heads, gradients, divergence, tensors[-1]
        )
        return torch.stack([loss.sum() for loss in losses]).sum(), *results

    @staticmethod
    def of_student(arguments: Sequence[Any]) -> Sequence[int]:
        causal, *_ = arguments
        return _of_student(causal)


class RelationKLPerRow(Function):
    """Losses per row, a tuple of [B, A, L] float64; the backward pass computes scores and gradients from the inputs.

    Arguments are those of ``RelationKL``.
    """

    @staticmethod
    def forward(causal: tuple[bool, ...], num_heads: int, gradients: tuple[bool, ...], divergence: int, *tensors):
        losses, _ = torch.ops.fastkd.relation_kl(
            *_in_four(tensors[:-1]), causal, num_heads, [False] * len(causal), divergence, tensors[-1]
        )
        return tuple(losses)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.causal, ctx.num_heads, _, ctx.divergence, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *grad_losses: Tensor):
        *tensors, beta = ctx.saved_tensors
        student, teacher, coefficient, key_mask = _in_four(tensors)
        weights = [c * g for c, g in zip(coefficient, grad_losses, strict=True)]
        needed = ctx.needs_input_grad[4 : 4 + len(student)]
        constants = (ctx.causal, ctx.num_heads, needed, ctx.divergence)
        gradients = apply(_RelationKLGradient, "relation_kl", *constants, *student, *teacher, *weights, *key_mask, beta)
        return for_arguments(ctx, _of_student(ctx.causal), gradients)


class _RelationKLGradient(Gradient):
    @staticmethod
    def forward(op: str, *arguments: Any) -> tuple[Tensor, ...]:
        _, gradients = torch.ops.fastkd.relation_kl(*_in_four(arguments[4:-1]), *arguments[:4], arguments[-1])
        return in_dtypes_of(_of_student(arguments[0]), arguments, gradients)


def _of_student(causal: Sequence[bool]) -> Sequence[int]:
    """Where the student's tensors are among the arguments."""
    return range(4, 4 + len(causal))


def _in_four(tensors: Sequence[Any]) -> list[list[Any]]:
    quarter = len(tensors) // 4
    return [list(tensors[i : i + quarter]) for i in range(0, 4 * quarter, quarter)]


# ---- public function ------------------------------------------------------------------------------------------------


def _listed(name: str, value: Any, entries: int, several: bool) -> list[Any]:
    """One value for every entry: as listed, or the one given for all."""
    if not isinstance(value, (list, tuple)):
        return [value] * entries
    if not several:
        raise TypeError(f"{name}: expected a single one, as student is a single tensor, got {type(value).__name__}")
    if len(value) != entries:
        raise ValueError(f"{name}: expected one for each of {entries} entries, got {len(value)}")
    return list(value)


class _Entries(NamedTuple):
    """The public function's arguments that it takes one of for every entry."""

    student: list[Any]  # [B, L, Hs] each
    teacher: list[Any]  # [B, L, Ht] each
    key_mask: list[Any]  # [B, L] each, or None
    causal: list[Any]
    normalizer: list[Any]


def _entries(student: Any, teacher: Any, key_mask: Any, causal: Any, normalizer: Any) -> _Entries:
    several = isinstance(student, (list, tuple))
    students: list[Any] = list(student) if several else [student]
    if several != isinstance(teacher, (list, tuple)) or (several and len(teacher) != len(students)):
        expected = f"a list of {len(students)}, as many as student" if several else "a tensor, as student is one"
        given = f"{len(teacher)}" if isinstance(teacher, (list, tuple)) else type(teacher).__name__
        raise ValueError(f"teacher: expected {expected}, got {given}")
    if not students:
        raise ValueError("student: expected at least one tensor, got an empty list")
    others = {"key_mask": key_mask, "causal": causal, "normalizer": normalizer}
    listed = {name: _listed(name, value, len(students), several) for name, value in others.items()}
    return _Entries(students, list(teacher) if several else [teacher], **listed)


def _check(entries: _Entries, num_heads: int, several: bool, masks_listed: bool) -> None:
    """Raises unless what is given for every entry fits."""
    first = entries.student[0]
    widths: dict[str, int] = {}
    for i, (x, t, mask, is_causal, _) in enumerate(zip(*entries, strict=True)):
        at = f"[{i}]" if several else ""
        check_tensor(f"student{at}", x, shape=[None if i == 0 else first.shape[0], None, None], floating=True)
        check_tensor(f"teacher{at}", t, shape=[*x.shape[:2], None], floating=True)
        check_same_device(f"student{at}", x, first.device)
        check_same_device(f"teacher{at}", t, x.device)
        if x.dtype != first.dtype:
            raise TypeError(f"student{at}: expected dtype {first.dtype}, that of student[0], got {x.dtype}")
        widths |= {f"student{at}": x.shape[2], f"teacher{at}": t.shape[2]}
        check_flag("causal", is_causal)
        if mask is not None:
            check_mask(f"key_mask{at if masks_listed else ''}", mask, x.shape[:2], x.device)
    check_heads(num_heads, widths)


class _Options(TypedDict, total=False):
    """The keywords that what is returned does not depend on."""

    key_mask: Tensor | Sequence[Tensor | None] | None
    causal: bool | Sequence[bool]
    divergence: Divergence | Mapping[Divergence, float]
    beta: float
    normalizer: float | Tensor | Sequence[float | Tensor | None] | None
    impl: str


@overload
def relation_kl(
    student: Tensor, teacher: Tensor, *, num_heads: int, reduction: str = ..., **options: Unpack[_Options]
) -> Tensor: ...
@overload
def relation_kl(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    num_heads: int,
    reduction: Literal["mean", "sum"] = ...,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def relation_kl(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    num_heads: int,
    reduction: Literal["none"],
    **options: Unpack[_Options],
) -> tuple[Tensor, ...]: ...
@overload
def relation_kl(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    num_heads: int,
    reduction: str = ...,
    **options: Unpack[_Options],
) -> Tensor | tuple[Tensor, ...]: ...
def relation_kl(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    num_heads: int,
    key_mask: Tensor | Sequence[Tensor | None] | None = None,
    causal: bool | Sequence[bool] = False,
    divergence: Divergence | Mapping[Divergence, float] = "forward_kl",
    beta: float = 0.5,
    reduction: str = "mean",
    normalizer: float | Tensor | Sequence[float | Tensor | None] | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Divergence between self-attention relations of teacher and student, in memory that grows with the length.

    A relation is ``softmax(X X.T / sqrt(d))`` in each of ``num_heads`` heads, where X are the projected queries, keys
    or values of a layer and d is the head width; ``D(p, q)`` is taken between the teacher's rows and the student's.
    MiniLMv2 (Wang et al., 2021, arXiv 2012.15828); for encoder-decoders MiniEnD (Zhang et al., 2024, arXiv 2305.12330).
    The relation heads need not be the models' attention heads. Scores are float32 whatever the inputs' dtype.

    Args:
        student: [B, L, Hs], float32, float64, float16 or bfloat16, or a list of them; receive gradients. L and Hs may
            differ between entries, the dtype may not.
        teacher: [B, L, Ht], or as many of them, each as long as the student's; constants. Ht may differ from Hs.
        num_heads: a divisor of every Hs and Ht.
        key_mask: [B, L] bool or integer, True or not 0 where a position takes part, in rows and columns: others have a
            probability of exactly 0, and no row of their own. With lists, one for all entries or a list of them.
        causal: a position sees those up to its own. Likewise.
        divergence, beta: as in ``fastkd.logit_kl``.
        reduction: ``"mean"`` is over heads, over the positions that take part, and over entries (every entry weighs the
            same); ``"sum"`` adds up everything; ``"none"`` returns [B, A, L], of lists a tuple.
        normalizer: with ``"mean"``, a number or 0-d tensor that replaces the number of positions that take part, such
            as ``num_items_in_batch`` under gradient accumulation. One for all entries or a list of them.
        impl: ``"auto"``, ``"reference"`` or ``"fused"``; see ``fastkd.doctor``.

    Returns:
        A 0-d tensor, or what ``reduction="none"`` says; float32, or float64 for float64 students. 0 where no position
        is left to average.

    Raises:
        ValueError, TypeError: for arguments that do not fit, before any work.
        RuntimeError: ``impl="fused"`` where no kernel can run; and where a fused gradient is differentiated again.

    Examples:
        >>> relation_kl([q_s, k_s, v_s], [q_t, k_t, v_t], num_heads=32, key_mask=mask, causal=True)  # doctest: +SKIP
    """
    objective = Objective(divergence, beta, temperature=1.0, kd_weight=1.0, ce_weight=0.0)
    check_choice("reduction", reduction, REDUCTIONS)
    several = isinstance(student, (list, tuple))
    entries = _entries(student, teacher, key_mask, causal, normalizer)
    entries = entries._replace(normalizer=[as_normalizer(x, reduction) for x in entries.normalizer])
    num_heads = as_int("num_heads", num_heads)
    _check(entries, num_heads, several, isinstance(key_mask, (list, tuple)))
    students = [differentiable(x) for x in autocast_like_linear(*entries.student)]
    teachers = [constant(t) for t in autocast_like_linear(*entries.teacher)]
    masks = [None if mask is None else differentiable(mask.bool()) for mask in entries.key_mask]

    device = students[0].device
    if not use_fused(impl, device):
        losses = reference.relation_kl(
            students,
            teachers,
            num_heads=num_heads,
            key_mask=masks,
            causal=entries.causal,
            divergence=objective.divergence,
            beta=objective.beta,
            reduction=reduction,
            normalizer=entries.normalizer,
        )
        if reduction == "none":
            return tuple(losses) if several else losses[0]
        total = torch.stack(losses)
        return total.mean() if reduction == "mean" else total.sum()

    coefficients = [
        row_coefficients((*x.shape[:2], x.shape[1]), num_heads, mask, mask, is_causal, reduction, denominator, device)
        for x, mask, is_causal, denominator in zip(students, masks, entries.causal, entries.normalizer, strict=True)
    ]
    if reduction == "mean":
        coefficients = [c / len(students) for c in coefficients]
    wanted = tuple(wants_gradient(x) for x in students)
    constants = (tuple(entries.causal), num_heads, wanted, objective.code)
    arguments = (*constants, *students, *teachers, *coefficients, *masks, numbers(objective.beta, *objective.weights))
    if reduction != "none":
        loss, *_ = apply(RelationKL, *arguments)
        return loss if loss.dtype == students[0].dtype else loss.float()
    rows = apply(RelationKLPerRow, *arguments)
    rows = tuple(loss if students[0].dtype == torch.float64 else loss.float() for loss in rows)
    return rows if several else rows[0]
