"""The arguments of logit_kl: their checks, and what ranks with shards of a vocabulary tell each other of them.

V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import Objective, TokenArguments, check_same_device, check_tensor
from .vocabulary_shards import Facts

__all__ = ["Checked", "check_logits", "facts"]


class Checked(NamedTuple):
    """The public function's arguments, checked, and of this rank alone."""

    student: Tensor  # [..., Vs]
    teacher: Tensor | None  # [..., Vt]
    objective: Objective
    tokens: TokenArguments
    fused: bool


def check_logits(student: Any, teacher: Any, objective: Objective, tokens: TokenArguments, sharded: bool) -> None:
    """Checks logits [..., V] and the keywords that go with them; a shard may be of no columns."""
    check_tensor("student_logits", student, floating=True)
    if student.dim() == 0 or (student.shape[-1] == 0 and not sharded):
        raise ValueError(f"student_logits: expected shape [..., V] with V > 0, got {list(student.shape)}")
    vocabulary, leading = student.shape[-1], student.shape[:-1]
    if teacher is not None:
        check_tensor("teacher_logits", teacher, shape=[*leading, None], floating=True)
        check_same_device("teacher_logits", teacher, student.device)
        if teacher.shape[-1] == 0 and not sharded:
            raise ValueError(f"teacher_logits: expected shape [..., V] with V > 0, got {list(teacher.shape)}")
    tokens.check(objective, leading, None if sharded else vocabulary, student.device)


def facts(checked: Checked, return_metrics: bool) -> Facts:
    """What this rank tells the others that hold a shard of the vocabulary."""
    student, teacher, objective, tokens, fused = checked
    others = {
        "reduction": tokens.reduction,
        "fused": fused,
        "dtype": student.dtype,
        "device": student.device.type,
        "gradient": torch.is_grad_enabled() and student.requires_grad,
        "teacher": teacher is not None,
        "return_metrics": return_metrics,
    }
    return Facts(
        objective,
        others,
        student.shape[-1],
        None if teacher is None else teacher.shape[-1],
        tokens,
        None,
        None,
        tokens.coefficients(student.shape[:-1], student.device) != 0,
    )
