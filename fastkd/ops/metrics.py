"""Metrics of the losses on the vocabulary: what rows tell of themselves, averaged over the tokens that count."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import Objective, check_flag

__all__ = ["averaged", "check_no_metrics"]


def check_no_metrics(wanted: object) -> None:
    """Of teachers that are known by their top."""
    check_flag("return_metrics", wanted)
    if wanted:
        raise ValueError(
            "return_metrics: expected False, as the teacher is a TopK, of which no metrics are told, got True"
        )


def averaged(
    rows: Tensor,  # [tokens, 6] float64, as drivers/divergence_rows.py tells it
    weight: Tensor,  # [tokens] float64, 0 where a row is dropped
    objective: Objective,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Means by name, 0-d, of the terms that have a weight; 0 where nothing is left to average."""
    kd, cross_entropy, student_entropy, teacher_entropy, student_top, teacher_top = rows.detach().unbind(1)
    agreement = ((student_top == teacher_top) & (student_top != 0)).double()
    found: dict[str, Tensor] = {}
    if objective.kd_weight != 0:
        found["kd"] = kd
    if objective.ce_weight != 0:
        found["ce"] = cross_entropy
    if objective.kd_weight != 0:
        found |= {"student_entropy": student_entropy, "teacher_entropy": teacher_entropy, "agreement": agreement}
    total = weight.sum()
    share = torch.where(total == 0, 0, weight / torch.where(total == 0, 1, total))
    return {name: (share * x).sum().to(dtype) for name, x in found.items()}
