"""Liger's losses of distillation under Liger's names, on fastkd's: the line that imports them changes, nothing else.

    from fastkd.integrations.liger import LigerFusedLinearJSDLoss  # was: from liger_kernel.chunked_loss import ...

Nothing of liger-kernel is imported, so that it may go. Arguments mean what they mean there: `beta` is the teacher's
share of the mixture, and 0 and 1 are forward and reverse KL; the divergence is not multiplied by the temperature
squared; labels have been shifted; averages are over those that are not `ignore_index`. docs/integrations/liger.md says
where the two differ.

T tokens (any leading shape), V vocabulary, Hs and Ht hidden widths.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checks import as_number, check_choice, check_flag, check_same_device, check_tensor, is_finite, is_positive
from ..heads import Head
from ..ops.linear_kl import linear_kl
from ..ops.logit_kl import logit_kl
from .conventions import generalized_jsd

__all__ = [
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKLDivLoss",
    "LigerJSD",
    "chunked_liger_fused_linear_jsd",
    "liger_fused_linear_jsd",
    "liger_fused_linear_kl_div",
    "liger_jsd",
]

REDUCTIONS = ("batchmean", "mean", "sum")
EPS = 1e-8
SCORES = 2**24  # of a chunk against given probabilities: 64 MiB in float32

# ---- what is refused ------------------------------------------------------------------------------------------------


def _check_temperature(temperature: float) -> None:
    as_number("temperature", temperature, "> 0", is_positive)


def _check_accumulator(dtype: torch.dtype | None) -> None:
    if dtype not in (None, torch.float32):
        raise ValueError(
            f"accum_dtype: expected None or torch.float32, in which gradients are summed up either way, got {dtype}"
        )


def _check_reduction(reduction: str, eps: float) -> None:
    if reduction == "none":
        raise ValueError(
            f'reduction: expected one of {", ".join(REDUCTIONS)}, got "none", which is of every column: '
            'fastkd.logit_kl(..., reduction="none") has that of every token'
        )
    check_choice("reduction", reduction, REDUCTIONS)
    # it adds eps / e at most for each piece of a vocabulary, and a larger one is no divergence
    as_number("eps", eps, f"in [0, {EPS:g}]", lambda x: 0 <= x <= EPS)


# ---- Jensen-Shannon, from hidden states -----------------------------------------------------------------------------


def liger_fused_linear_jsd(
    student_input: Tensor,  # [T, Hs]
    student_weight: Tensor | Head,  # [V, Hs]
    teacher_input: Tensor,  # [T, Ht]
    teacher_weight: Tensor | Head,  # [V, Ht]
    shift_labels: Tensor | None = None,  # [T]
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """What ``liger_kernel.transformers.functional`` has by this name, and ``LigerFusedLinearJSD`` as a module."""
    if jsd_beta is None or isinstance(jsd_beta, Tensor):
        raise TypeError(
            f"jsd_beta: expected a number, got {type(jsd_beta).__name__}; the function of chunked_loss, which takes "
            "biases there, is chunked_liger_fused_linear_jsd here"
        )
    _check_accumulator(accum_dtype)
    return linear_kl(
        student_input, student_weight, teacher_input, teacher_weight, labels=shift_labels, ignore_index=ignore_index,
        **generalized_jsd(jsd_beta, temperature),
    )  # fmt: skip


class LigerFusedLinearJSD(nn.Module):
    """That of ``liger_kernel.transformers``: JSD of two models from their hidden states and heads.

    Args:
        jsd_beta: the teacher's share of the mixture, in [0, 1]; 0 is forward KL, 1 reverse KL.
        ignore_index: labels that drop their token.
        temperature: > 0; the divergence is not multiplied by its square.
        accum_dtype: None or ``torch.float32``, in which gradients are summed up either way.

    Raises:
        ValueError, TypeError: for arguments that do not fit.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_accumulator(accum_dtype)
        generalized_jsd(jsd_beta, temperature)
        self.jsd_beta = jsd_beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,  # [T, Hs]
        student_weight: Tensor | Head,  # [V, Hs]
        teacher_input: Tensor,  # [T, Ht]
        teacher_weight: Tensor | Head,  # [V, Ht]
        shift_labels: Tensor | None = None,  # [T]
    ) -> Tensor:
        """The mean over tokens, 0-d."""
        return liger_fused_linear_jsd(
            student_input, student_weight, teacher_input, teacher_weight, shift_labels,
            self.jsd_beta, self.ignore_index, self.temperature, self.accum_dtype,
        )  # fmt: skip


# ---- the same with a cross-entropy ----------------------------------------------------------------------------------


def chunked_liger_fused_linear_jsd(
    student_input: Tensor,  # [T, Hs]
    student_weight: Tensor | Head,  # [V, Hs]
    teacher_input: Tensor,  # [T, Ht]
    teacher_weight: Tensor | Head,  # [V, Ht]
    true_labels: Tensor,  # [T]
    student_bias: Tensor | None,  # [V]
    teacher_bias: Tensor | None,  # [V]
    weight_hard_loss: float = 0.5,
    weight_soft_loss: float = 0.5,
    beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    compiled: bool = True,
    chunk_size: int = 1024,
    return_soft_hard_loss: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """What ``liger_kernel.chunked_loss.functional`` calls ``liger_fused_linear_jsd``, and its module does.

    ``compiled`` and ``chunk_size`` have no meaning: nothing is compiled, and chunks are sized by memory.
    """
    check_flag("return_soft_hard_loss", return_soft_hard_loss)
    check_tensor("true_labels", true_labels)
    how = generalized_jsd(beta, temperature)
    undone = how.pop("kd_weight")
    loss_of: Callable[..., Any] = partial(
        linear_kl, student_input, student_weight, teacher_input, teacher_weight, student_bias=student_bias,
        teacher_bias=teacher_bias, labels=true_labels, ignore_index=ignore_index, **how,
    )  # fmt: skip
    weights = {"kd_weight": weight_soft_loss * undone, "ce_weight": weight_hard_loss}
    result = loss_of(**weights, return_metrics=return_soft_hard_loss)
    if isinstance(result, Tensor):
        return result
    loss, terms = result
    with torch.no_grad():  # a term without a weight is no part of the loss, but asked for
        if "kd" not in terms:
            terms["kd"] = loss_of()
        if "ce" not in terms:
            terms["ce"] = loss_of(kd_weight=0.0, ce_weight=1.0)
    return loss, terms["kd"] * undone, terms["ce"]


class LigerFusedLinearJSDLoss(nn.Module):
    """That of ``liger_kernel.chunked_loss``: ``weight_hard_loss * CE + weight_soft_loss * JSD``.

    Args:
        weight_hard_loss: of the cross-entropy, which is at temperature 1.
        weight_soft_loss: of the divergence.
        beta: the teacher's share of the mixture, in [0, 1]; 0 is forward KL, 1 reverse KL.
        ignore_index: labels that drop their token from both terms.
        temperature: of the divergence, > 0, which is not multiplied by its square.
        compiled, chunk_size: without meaning: nothing is compiled, and chunks are sized by memory.
        return_soft_hard_loss: return (loss, divergence, cross-entropy), of which the last two have no gradient.

    Raises:
        ValueError, TypeError: for arguments that do not fit.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        generalized_jsd(beta, temperature)
        as_number("weight_soft_loss", weight_soft_loss, "that is finite", is_finite)
        as_number("weight_hard_loss", weight_hard_loss, "that is finite", is_finite)
        check_flag("return_soft_hard_loss", return_soft_hard_loss)
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,  # [T, Hs]
        student_weight: Tensor | Head,  # [V, Hs]
        teacher_input: Tensor,  # [T, Ht]
        teacher_weight: Tensor | Head,  # [V, Ht]
        true_labels: Tensor,  # [T]
        student_bias: Tensor | None = None,  # [V]
        teacher_bias: Tensor | None = None,  # [V]
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The mean over tokens, 0-d; or the three of ``return_soft_hard_loss``."""
        return chunked_liger_fused_linear_jsd(
            student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias, teacher_bias,
            self.weight_hard_loss, self.weight_soft_loss, self.beta, self.ignore_index, self.temperature,
            self.compiled, self.chunk_size, self.return_soft_hard_loss,
        )  # fmt: skip


# ---- forward KL against given probabilities -------------------------------------------------------------------------


def _kl_sum(scores: Tensor, target: Tensor, keep: Tensor) -> Tensor:
    """Of each row's sum of p (log p - log q), the sum over rows, 0-d: scores and target [T, V], keep [T].

    What p sums up to is its weight, and not 1 by itself: where it was rounded to 16 bits, or never was a distribution.
    """
    p = target.detach().to(scores.dtype)
    mass = p.sum(-1) * keep
    return logit_kl(scores, p.log(), weight=mass, reduction="sum") + torch.xlogy(mass, mass).sum()


def liger_fused_linear_kl_div(
    student_input: Tensor,  # [T, Hs]
    student_weight: Tensor,  # [V, Hs]
    target: Tensor,  # [T, V]
    shift_labels: Tensor | None = None,  # [T]
    reduction: str = "batchmean",
    ignore_index: int = -100,
    temperature: float = 1.0,
    eps: float = 1e-10,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """What ``liger_kernel.transformers.functional`` has by this name, and ``LigerFusedLinearKLDivLoss`` as a module."""
    _check_reduction(reduction, eps)
    _check_accumulator(accum_dtype)
    _check_temperature(temperature)
    check_tensor("student_input", student_input, shape=[None, None], floating=True)
    rows, device = student_input.shape[0], student_input.device
    check_tensor("student_weight", student_weight, shape=[None, student_input.shape[1]], floating=True)
    columns = student_weight.shape[0]
    check_tensor("target", target, shape=[rows, columns], floating=True)
    dtype = torch.float64 if student_input.dtype == torch.float64 else torch.float32
    keep = student_input.new_ones(rows, dtype=dtype)
    for name, x in {"student_weight": student_weight, "target": target, "shift_labels": shift_labels}.items():
        if x is not None:
            check_same_device(name, x, device)
    if shift_labels is not None:
        check_tensor("shift_labels", shift_labels, shape=[rows])
        keep = (shift_labels != ignore_index).to(dtype)
    with torch.autocast(device.type, enabled=False):
        hidden, weight = student_input.to(dtype) / temperature, student_weight.to(dtype)

        def of_some(hidden: Tensor, target: Tensor, keep: Tensor) -> Tensor:
            return _kl_sum(hidden @ weight.t(), target, keep)

        total, size = hidden.new_zeros(()), max(1, SCORES // columns)
        for part in zip(*(torch.split(x, size) for x in (hidden, target, keep)), strict=True):
            total = total + checkpoint(of_some, *part, use_reentrant=False, preserve_rng_state=False)
        count = 1 if reduction == "sum" else keep.sum().clamp_min(1) * (columns if reduction == "mean" else 1)
        return total / count


class LigerFusedLinearKLDivLoss(nn.Module):
    """That of ``liger_kernel.transformers``: forward KL of a student's hidden states and head against probabilities.

    The student's scores are there for a chunk of tokens at a time, and computed again in the backward pass.

    Args:
        reduction: ``"batchmean"``, ``"mean"`` (by columns, too) or ``"sum"``.
        ignore_index: labels that drop their token.
        temperature: of the student alone, > 0; the divergence is not multiplied by its square.
        eps: without meaning, as no logarithm of 0 is taken; at most 1e-8.
        accum_dtype: None or ``torch.float32``, in which gradients are summed up either way.

    Raises:
        ValueError, TypeError: for arguments that do not fit.
    """

    def __init__(
        self,
        reduction: str = "batchmean",
        ignore_index: int = -100,
        temperature: float = 1.0,
        eps: float = 1e-10,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_reduction(reduction, eps)
        _check_accumulator(accum_dtype)
        _check_temperature(temperature)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.eps = eps
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,  # [T, Hs]
        student_weight: Tensor,  # [V, Hs]
        target: Tensor,  # [T, V]
        shift_labels: Tensor | None = None,  # [T]
    ) -> Tensor:
        """The loss, 0-d."""
        return liger_fused_linear_kl_div(
            student_input, student_weight, target, shift_labels,
            self.reduction, self.ignore_index, self.temperature, self.eps, self.accum_dtype,
        )  # fmt: skip


# ---- from log-probabilities -----------------------------------------------------------------------------------------


def liger_jsd(
    input: Tensor,  # [T, V]
    target: Tensor,  # [T, V]
    shift_labels: Tensor | None = None,  # [T]
    beta: float = 0.5,
    ignore_index: int = -100,
) -> Tensor:
    """What ``liger_kernel.transformers.functional`` has by this name, and ``LigerJSD`` as a module."""
    loss = logit_kl(input, target, labels=shift_labels, ignore_index=ignore_index, **generalized_jsd(beta))
    return loss.to(input.dtype)


class LigerJSD(nn.Module):
    """That of ``liger_kernel.transformers``: JSD of log-probabilities, as ``log_softmax`` makes them, or of logits.

    Args:
        beta: the teacher's share of the mixture, in [0, 1]; 0 is forward KL, 1 reverse KL.
        ignore_index: labels that drop their token.

    Raises:
        ValueError, TypeError: for arguments that do not fit.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        generalized_jsd(beta)
        self.beta = beta
        self.ignore_index = ignore_index

    def forward(
        self,
        log_q: Tensor,  # [T, V]
        log_p: Tensor,  # [T, V]
        shift_labels: Tensor | None = None,  # [T]
    ) -> Tensor:
        """The mean over tokens, 0-d: ``log_q`` is the student's."""
        return liger_jsd(log_q, log_p, shift_labels, self.beta, self.ignore_index)
