"""Metrics of the losses on the vocabulary: what rows tell of themselves, averaged over the tokens that count."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import Objective, average

__all__ = ["averaged", "averaged_of_topk"]


def averaged(
    rows: Tensor,  # [tokens, 6] float64, as drivers/divergence_rows.py tells it
    weight: Tensor,  # [tokens] float64, 0 where a row is dropped
    objective: Objective,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Means by name, 0-d, of the terms that have a weight; 0 where nothing is left to average."""
    kd, cross_entropy, student_entropy, teacher_entropy, student_top, teacher_top = rows.detach().unbind(1)
    agreement = ((student_top == teacher_top) & (student_top != 0)).double()
    models = {"student_entropy": student_entropy, "teacher_entropy": teacher_entropy, "agreement": agreement}
    return _means(kd, cross_entropy, models, weight, objective, dtype)


def averaged_of_topk(
    rows: Tensor,  # [tokens, 6] float64, as drivers/topk_rows.py tells it
    teacher_mass: Tensor,  # [tokens] float64, 0 where a row is dropped
    weight: Tensor,  # [tokens] float64, 0 where a row is dropped
    objective: Objective,
    dtype: torch.dtype,
    has_student_mass: bool,
) -> dict[str, Tensor]:
    """The same of a teacher that is known by its top, with what mass its ids have in both models."""
    kd, cross_entropy, student_entropy, teacher_entropy, agreement, student_mass = rows.detach().unbind(1)
    models = {"student_entropy": student_entropy, "teacher_entropy": teacher_entropy, "agreement": agreement}
    if has_student_mass:
        models["student_mass"] = student_mass
    return _means(kd, cross_entropy, models | {"teacher_mass": teacher_mass}, weight, objective, dtype)


def _means(
    kd: Tensor,
    cross_entropy: Tensor,
    models: dict[str, Tensor],
    weight: Tensor,
    objective: Objective,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if objective.kd_weight != 0:
        found["kd"] = kd
    if objective.ce_weight != 0:
        found["ce"] = cross_entropy
    if objective.kd_weight != 0:
        found |= models
    share = average(weight, "mean", None)
    return {name: (share * x).sum().to(dtype) for name, x in found.items()}
