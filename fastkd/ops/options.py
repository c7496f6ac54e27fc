"""The keywords of the losses on the vocabulary, as type checkers know them: for the overloads of `return_metrics`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypedDict

from torch import Tensor

from ..divergence import Divergence

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LinearOptions", "LogitOptions"]


class LogitOptions(TypedDict, total=False):
    """Those of `logit_kl`."""

    divergence: Divergence | Mapping[Divergence, float]
    beta: float
    temperature: float
    weight: Tensor | None
    labels: Tensor | None
    ce_weight: float
    kd_weight: float
    ignore_index: int
    reduction: str
    normalizer: float | Tensor | None
    vocab_group: ProcessGroup | None
    impl: str


class LinearOptions(LogitOptions, total=False):
    """Those of `linear_kl`."""

    student_bias: Tensor | None
    teacher_bias: Tensor | None
    student_scale: float
    teacher_scale: float
    student_softcap: float | None
    teacher_softcap: float | None
    workspace_mb: float | None
