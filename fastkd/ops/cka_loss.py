"""cka_loss: 1 - linear CKA between hidden states of two models, whose widths may differ; HSM's loss.

With centred hidden states A (student) and B (teacher), and c, s, t the Frobenius norms of B^T A, A^T A and B^T B, CKA
is c / sqrt(s t), and a loss of it has the gradient beta A (A^T A) - alpha B (B^T A) with two numbers alpha and beta.

- All three products are tiles of one symmetric matrix, (B|A)^T (B|A), of which a CPU computes the upper half, from
  chunks of tokens that are centred on their way into a workspace that every chunk reuses.
- Both terms of the gradient are one GEMM, of (B|A) with a small matrix, the factor, that the forward pass keeps. The
  backward pass is that GEMM: no gradient is held between the passes, and nothing is computed twice.
- With fewer tokens than Ds + Dt the N x N Grams A A^T and B B^T are cheaper, forward and backward: c^2 is their inner
  product, the gradient (beta A A^T - alpha B B^T) A, and the chunks are of columns.

FLOPs, with W = Ds + Dt and m = min(N, W): m N W forward, 2 m N Ds backward.

N tokens (any leading shape), Ds and Dt widths, W their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import distributed, reference
from ..backend import IMPLS, backend_for, use_fused
from ..checks import (
    as_number,
    check_choice,
    check_flag,
    check_mask,
    check_same_device,
    check_tensor,
    is_positive,
    numbers,
)
from .autograd import Gradient, Loss, apply, constant, differentiable, for_arguments, wants_gradient
from .drivers.cka_debiased_torch import EXTRA_ROWS, debiased_backward_, debiased_forward
from .drivers.cka_loss_gpu import gpu_backward_, gpu_forward
from .drivers.cka_loss_torch import torch_backward_, torch_forward
from .drivers.huge_pages import in_huge_pages
from .dtypes import autocast_like_linear, score_dtype, without_autocast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["CKA", "check_constants", "cka_loss"]

REDUCTIONS = ("sum", "mean", "none")

# ---- schema ---------------------------------------------------------------------------------------------------------

# `gradients` says for which students the factor of the gradient is made; the others' is empty.
_library = torch.library.Library("fastkd", "FRAGMENT")
_library.define(
    "cka_loss(Tensor[] student, Tensor[] teacher, Tensor?[] mask, bool[] gradients, Tensor eps, bool squared, "
    "bool debiased=False) -> (Tensor loss, Tensor[] mean, Tensor[] factor)"
)
_library.define(
    "cka_loss_backward(Tensor[] student, Tensor[] teacher, Tensor?[] mask, Tensor[] mean, Tensor[] factor, "
    "bool[] gradients, Tensor grad_loss, bool debiased=False) -> Tensor[]"
)

# ---- fake -----------------------------------------------------------------------------------------------------------


def _by_grams(tokens: int, widths: int) -> bool:
    """Whether N x N Grams take fewer FLOPs than W x W covariances: with and without gradients the same bound."""
    return tokens < widths


def _empty_mean(student: Tensor, teacher: Tensor) -> Tensor:
    return student.new_empty(student.shape[1] + teacher.shape[1], dtype=torch.float64)


def _empty_factor(student: Tensor, teacher: Tensor, wanted: bool, debiased: bool) -> Tensor:
    """What the gradient's GEMM multiplies with, unwritten: [N, N] of Grams, else [W, Ds], which is never square.

    That of a debiased loss has some rows more, in float64.
    """
    tokens, widths = student.shape[0], student.shape[1] + teacher.shape[1]
    by_grams = _by_grams(tokens, widths)
    rows = widths + (EXTRA_ROWS if debiased else 0)
    shape = (tokens, tokens) if by_grams else (rows, student.shape[1])
    dtype = torch.float64 if debiased and not by_grams else score_dtype(student)
    return student.new_empty(shape if wanted else (0,), dtype=dtype)


@torch.library.register_fake("fastkd::cka_loss", lib=_library)
def _(student, teacher, mask, gradients, eps, squared, debiased=False):
    means = [_empty_mean(x, t) for x, t in zip(student, teacher, strict=True)]
    factors = [_empty_factor(*pair, debiased) for pair in zip(student, teacher, gradients, strict=True)]
    return student[0].new_empty(len(means), dtype=torch.float64), means, factors


@torch.library.register_fake("fastkd::cka_loss_backward", lib=_library)
def _(student, teacher, mask, mean, factor, gradients, grad_loss, debiased=False):
    return [_empty_gradient(x, wanted) for x, wanted in zip(student, gradients, strict=True)]


def _empty_gradient(student: Tensor, wanted: bool) -> Tensor:
    return student.new_empty(student.shape if wanted else (0,))


# ---- forward --------------------------------------------------------------------------------------------------------


@without_autocast
def _cka_loss(
    student: Sequence[Tensor],  # [N, Ds] each
    teacher: Sequence[Tensor],  # [N, Dt] each
    mask: Sequence[Tensor | None],  # [N] bool each
    gradients: Sequence[bool],
    epsilon: Tensor,  # [1]
    squared: bool,
    debiased: bool = False,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    (eps,) = epsilon.tolist()
    by_grams = [_by_grams(x.shape[0], x.shape[1] + t.shape[1]) for x, t in zip(student, teacher, strict=True)]
    if debiased:  # on a GPU, too
        return debiased_forward(student, teacher, mask, by_grams, gradients, eps, squared, group)
    if group is None and backend_for(student[0].device)[0] == "triton":
        means = [_empty_mean(x, t) for x, t in zip(student, teacher, strict=True)]
        factors = [_empty_factor(*pair, debiased) for pair in zip(student, teacher, gradients, strict=True)]
        return gpu_forward(student, teacher, mask, means, factors, by_grams, eps, squared), means, factors
    return torch_forward(student, teacher, mask, by_grams, gradients, eps, squared, group)


_library.impl("cka_loss", _cka_loss, "CompositeExplicitAutograd")

# ---- backward -------------------------------------------------------------------------------------------------------


@without_autocast
def _cka_loss_backward(
    student: Sequence[Tensor],  # [N, Ds] each
    teacher: Sequence[Tensor],  # [N, Dt] each
    mask: Sequence[Tensor | None],  # [N] bool each
    mean: Sequence[Tensor],  # [W] each
    factor: Sequence[Tensor],  # [W, Ds] or [N, N] each, or [W + 3, Ds] if debiased
    gradients: Sequence[bool],
    grad_loss: Tensor,  # [pairs] float64
    debiased: bool = False,
) -> list[Tensor]:
    results = [in_huge_pages(_empty_gradient(x, wanted)) for x, wanted in zip(student, gradients, strict=True)]
    on_gpu = backend_for(student[0].device)[0] == "triton"
    backward_ = debiased_backward_ if debiased else gpu_backward_ if on_gpu else torch_backward_
    backward_(student, teacher, mask, mean, factor, gradients, grad_loss, results)
    return results


_library.impl("cka_loss_backward", _cka_loss_backward, "CompositeExplicitAutograd")

# ---- autograd.Function ----------------------------------------------------------------------------------------------


FIRST = 4  # argument of CKA that is a tensor


class CKA(Loss):
    """The loss of every pair, [pairs] float64, and what the backward pass starts from: means and factors.

    Arguments: gradients (a tuple), squared, debiased, a process group or None, then the student's tensors, the
    teacher's and the masks of ``torch.ops.fastkd.cka_loss`` one after the other, and eps.
    """

    @staticmethod
    def forward(gradients: tuple[bool, ...], squared: bool, debiased: bool, group: ProcessGroup | None, *tensors):
        # a process group is nothing that the schema of an op can hold
        forward = torch.ops.fastkd.cka_loss if group is None else partial(_cka_loss, group=group)
        losses, means, factors = forward(*_split(tensors[:-1], 3), gradients, tensors[-1], squared, debiased)
        return losses, *means, *factors

    @classmethod
    def keep(cls, ctx: Any, inputs: Sequence[Any], output: Sequence[Any]) -> None:
        _, *kept = output
        ctx.save_for_backward(*inputs[FIRST:-1], *kept)
        ctx.debiased = inputs[2]

    @classmethod
    def gradients(cls, ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing allows no more
        pairs = len(saved) // 5
        students = range(FIRST, FIRST + pairs)
        wanted = tuple(ctx.needs_input_grad[i] for i in students)
        gradients = apply(_CKAGradient, "cka_loss", wanted, ctx.debiased, grad_loss, *saved)
        return for_arguments(ctx, students, gradients)


class _CKAGradient(Gradient):
    @staticmethod
    def forward(op: str, gradients: tuple[bool, ...], debiased: bool, grad_losses: Tensor, *tensors):
        return tuple(torch.ops.fastkd.cka_loss_backward(*_split(tensors, 5), gradients, grad_losses, debiased))


def _split(tensors: Sequence[Any], parts: int) -> list[list[Any]]:
    size = len(tensors) // parts
    return [list(tensors[i : i + size]) for i in range(0, parts * size, size)]


# ---- public function ------------------------------------------------------------------------------------------------


def _use_fused(impl: str, device: torch.device) -> bool:
    """On a CPU this op is torch's own GEMMs, and does without the compiled extension."""
    return impl != "reference" if device.type == "cpu" else use_fused(impl, device)


def check_constants(eps: Any, squared: Any, debiased: Any, reduction: Any, group: Any, impl: Any) -> float:
    """eps as a float; raises unless all of them fit."""
    eps = as_number("eps", eps, "> 0", is_positive)
    check_flag("squared", squared)
    check_flag("debiased", debiased)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("impl", impl, IMPLS)
    if group is not None:
        distributed.check_group(group)
        if impl == "reference":
            raise ValueError('impl: expected auto or fused, because a group is given, got "reference"')
    return eps


def _as_lists(student: Any, teacher: Any, mask: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Student, teacher and mask with one entry per pair."""
    if not isinstance(student, (list, tuple)):
        for name, value in (("teacher", teacher), ("mask", mask)):
            if isinstance(value, (list, tuple)):
                raise TypeError(f"{name}: expected a single one, as student is a single tensor, got a list")
        return [student], [teacher], [mask]
    if not student:
        raise ValueError("student: expected at least one tensor, got an empty list")
    if not isinstance(mask, (list, tuple)):
        mask = [mask] * len(student)
    for name, value in (("teacher", teacher), ("mask", mask)):
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name}: expected a list of {len(student)}, as student is one, got {type(value).__name__}")
        if len(value) != len(student):
            raise ValueError(f"{name}: expected a list of {len(student)}, as many as student, got {len(value)}")
    return list(student), list(teacher), list(mask)


def _check_hidden(name: str, x: Any, leading: Any) -> None:
    check_tensor(name, x, shape=None if leading is None else [*leading, None], floating=True)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape [..., d] with d > 0, got {list(x.shape)}")


def _check_pairs(students: list[Any], teachers: list[Any], masks: list[Any], several: bool, masks_listed: bool) -> None:
    for i, (x, t, valid) in enumerate(zip(students, teachers, masks, strict=True)):
        at = f"[{i}]" if several else ""
        _check_hidden(f"student{at}", x, None)
        _check_hidden(f"teacher{at}", t, x.shape[:-1])
        check_same_device(f"student{at}", x, students[0].device)
        check_same_device(f"teacher{at}", t, x.device)
        if x.dtype != students[0].dtype:
            raise TypeError(f"student{at}: expected dtype {students[0].dtype}, that of student[0], got {x.dtype}")
        if valid is not None:
            check_mask(f"mask{at if masks_listed else ''}", valid, x.shape[:-1], x.device)


def cka_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    mask: Tensor | Sequence[Tensor | None] | None = None,
    eps: float = 1e-8,
    squared: bool = False,
    debiased: bool = False,
    reduction: str = "sum",
    group: ProcessGroup | None = None,
    impl: str = "auto",
) -> Tensor:
    """1 - CKA of hidden states of two models, whose widths may differ: no projection is learned.

    Centred kernel alignment compares what two representations say about how tokens relate; rotating or scaling either
    one changes nothing. With A and B the student's and the teacher's hidden states [N, d] less their means over all
    valid tokens of the batch, the loss of a pair is ``1 - |B^T A| / sqrt((|A^T A| + eps) (|B^T B| + eps))`` with
    Frobenius norms; hidden state matching (Dasgupta and Cohn, ICLR 2025) adds it up over matched layers. Standard
    linear CKA (Kornblith et al., 2019) is the square of that ratio, with ``squared=True``.

    The estimate is biased: with few tokens beside their widths, independent hidden states look alike. Of width 768 they
    have a loss of 0.02 at 32 tokens, 0.34 at 1024 and 0.81 at 20,000 (0.04, 0.57 and 0.96 with ``squared=True``).
    Compare losses of equal numbers of tokens only, and give it many; or take ``debiased=True``, whose loss is about 1
    for independent hidden states however few they are.

    Fewer than two valid tokens have nothing to compare: loss 0, zero gradients. Hidden states that are the same for
    every valid token, in either model, have nothing in common with any others: loss 1, zero gradients.

    Args:
        student: [..., ds], float32, float64, float16 or bfloat16, or a list of them, such as the hidden states of some
            layers; receive gradients. Widths and leading shapes may differ between pairs.
        teacher: [..., dt], or as many of them, each with its student's leading shape; constants.
        mask: [...] bool or integer, True or not 0 where a token is valid. The others may hold anything, NaN included;
            their gradient is exactly 0. One for all pairs, or a list of one (or None) for each.
        eps: keeps the norms of constant hidden states off zero. Beside the norms of others, which grow with the number
            of tokens, it is nothing.
        squared: take the squared ratio, which is standard linear CKA.
        debiased: estimate CKA without bias, by HSIC_1 of Song et al. (2012), which leaves the diagonals out of the
            Grams A A^T and B B^T. The ratio is then in [-1, 1] and the loss in [0, 2]: what is in common by chance is
            as often less than nothing. Without ``squared`` the root keeps the ratio's sign, and within 1e-4 of 0 goes
            over into a line, so that gradients stay finite. Fewer than four valid tokens have a loss of 0. Hidden
            states that are the same for all tokens, or all but one, have a loss of 1; both have zero gradients. On a
            GPU this is torch's operations and no kernel in Triton. Where tokens are more than ds + dt, and with
            ``group``, products are in float64, and take twice as long on a CPU.
        reduction: over pairs: ``"sum"``, ``"mean"``, or ``"none"`` for a tensor [pairs], 0-d of a single pair.
        group: a ``torch.distributed`` process group, such as ``torch.distributed.group.WORLD``, over which the tokens
            of the batch are spread. Every process then returns the loss of the whole batch. Gradients come multiplied
            by the number of processes: DistributedDataParallel divides by it, and leaves the parameter gradients that
            one process would have had. Every process of the group has to make the call, with pairs of the same widths;
            it may have no valid token. Not under ``torch.compile(fullgraph=True)``.
        impl: ``"auto"``, ``"reference"`` or ``"fused"``; see ``fastkd.doctor``. On a CPU "fused" needs no extension.

    Returns:
        float32, or float64 for float64 students, whatever the inputs' dtype; ``torch.autocast`` casts the inputs as it
        does those of ``F.linear``.

    Raises:
        ValueError, TypeError: for arguments that do not fit, before any work.
        RuntimeError: ``impl="fused"`` where no kernel can run; and where a fused gradient is differentiated again.

    Examples:
        >>> hsm = cka_loss(student_layers, teacher_layers, mask=attention_mask)  # doctest: +SKIP
    """
    eps = check_constants(eps, squared, debiased, reduction, group, impl)
    several = isinstance(student, (list, tuple))
    students, teachers, masks = _as_lists(student, teacher, mask)
    _check_pairs(students, teachers, masks, several, isinstance(mask, (list, tuple)))
    masks = [None if valid is None else differentiable(valid.bool()) for valid in masks]
    students = [differentiable(x) for x in autocast_like_linear(*students)]
    teachers = [constant(t) for t in autocast_like_linear(*teachers)]

    if _use_fused(impl, students[0].device):
        flat = [x.reshape(-1, x.shape[-1]) for x in (*students, *teachers)]
        flat_masks = [None if valid is None else valid.reshape(-1) for valid in masks]
        wanted = tuple(wants_gradient(x) for x in students)
        losses, *_ = apply(CKA, wanted, squared, debiased, group, *flat, *flat_masks, numbers(eps))
        losses = losses if students[0].dtype == torch.float64 else losses.float()
    elif group is not None:
        use_fused("fused", students[0].device)  # says why it cannot
    else:
        options: dict[str, Any] = {"eps": eps, "squared": squared, "debiased": debiased}
        losses = torch.stack(reference.cka_loss(students, teachers, mask=masks, **options))
    if reduction == "none":
        return losses if several else losses[0]
    return losses.sum() if reduction == "sum" else losses.mean()
