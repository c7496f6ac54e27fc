"""The specification: every op in plain torch, differentiated by autograd, in fp32 (fp64 for fp64 students).

Nothing here is fused or saves memory; everything here is meant to be read. ``impl="reference"`` calls these functions,
and the tests compare every other implementation with them in fp64. Arguments are those of the public functions, which
have checked them.

T tokens (any leading shape), V vocabulary, H hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .divergence import DIVERGENCES

__all__ = ["linear_kl", "logit_kl"]


def _token_weights(x: Tensor, weight: Tensor | None, labels: Tensor | None, ignore_index: int) -> Tensor:
    """Every token's weight [T...], 0 where it is dropped, for tensors x [T..., *] in x's dtype."""
    weight = x.new_ones(x.shape[:-1]) if weight is None else weight.detach().to(x.dtype)
    return weight if labels is None else weight.masked_fill(labels.long() == ignore_index, 0)


def logit_kl(
    student_logits: Tensor,  # [T..., Vs]
    teacher_logits: Tensor | None,  # [T..., Vt]
    *,
    divergence: str,
    beta: float,
    temperature: float,
    weight: Tensor | None,  # [T...]
    labels: Tensor | None,  # [T...]
    ce_weight: float,
    kd_weight: float,
    ignore_index: int,
    reduction: str,
    normalizer: float | Tensor | None,
) -> Tensor:
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    with torch.autocast(student_logits.device.type, enabled=False):
        scores = student_logits.to(dtype)
        weight = _token_weights(scores, weight, labels, ignore_index)  # [T...]
        dropped = (weight == 0).unsqueeze(-1)
        scores = scores.masked_fill(dropped, 0)  # whatever a dropped token holds, NaN included, it counts for nothing

        loss = scores.new_zeros(scores.shape[:-1])  # [T...]
        if teacher_logits is not None:
            vocabulary = min(scores.shape[-1], teacher_logits.shape[-1])
            scores = scores[..., :vocabulary]
            target = teacher_logits.detach()[..., :vocabulary].to(dtype).masked_fill(dropped, 0)
            if kd_weight != 0:
                # a row of nothing but -inf has no distribution: it counts as masked
                empty = (scores == -torch.inf).all(-1) | (target == -torch.inf).all(-1)  # [T...]
                log_q, log_p = (  # [T..., V]
                    F.log_softmax(x.masked_fill(empty.unsqueeze(-1), 0) / temperature, -1) for x in (scores, target)
                )
                loss = kd_weight * temperature**2 * DIVERGENCES[divergence](log_p, log_q, beta).masked_fill(empty, 0)
        if labels is not None and ce_weight != 0:
            index = labels.long().masked_fill(dropped.squeeze(-1), 0).unsqueeze(-1)
            loss = loss - ce_weight * F.log_softmax(scores, -1).gather(-1, index).squeeze(-1)

        loss = loss * weight
        if reduction == "none":
            return loss
        if reduction == "sum":
            return loss.sum()
        denominator = torch.as_tensor(weight.sum() if normalizer is None else normalizer, dtype=dtype)
        denominator = denominator.detach().to(loss.device)
        return torch.where(denominator == 0, 0, loss.sum() / torch.where(denominator == 0, 1, denominator))


def linear_kl(
    student_hidden: Tensor,  # [T..., Hs]
    student_weight: Tensor,  # [Vs, Hs]
    teacher_hidden: Tensor | None,  # [T..., Ht]
    teacher_weight: Tensor | None,  # [Vt, Ht]
    *,
    student_bias: Tensor | None,  # [Vs]
    teacher_bias: Tensor | None,  # [Vt]
    student_scale: float,
    teacher_scale: float,
    **options,
) -> Tensor:
    dtype = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        return F.linear(scale * hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    with torch.autocast(student_hidden.device.type, enabled=False):
        # what a dropped token holds, NaN included, counts for nothing, in the weight's gradient too
        kept = (
            _token_weights(student_hidden.to(dtype), options["weight"], options["labels"], options["ignore_index"]) != 0
        )
        student_hidden = student_hidden.masked_fill(~kept.unsqueeze(-1), 0)
        student_logits = logits(student_hidden, student_weight, student_bias, student_scale)
        teacher_logits = None
        if teacher_hidden is not None and teacher_weight is not None:
            with torch.no_grad():
                teacher_logits = logits(teacher_hidden, teacher_weight, teacher_bias, teacher_scale)
        return logit_kl(student_logits, teacher_logits, **options)
