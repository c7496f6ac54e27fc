"""linear_kl with a top-k teacher on a CPU: by rows, in a workspace that stays in cache.

T tokens, V vocabulary, H hidden width, K ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .linear_kl_call import Projection
from .linear_kl_cpu import by_rows
from .topk_rows import topk_rows

__all__ = ["TopKTeacher", "on_cpu"]


class TopKTeacher(NamedTuple):
    """What the row primitive takes of a top-k teacher."""

    ids: Tensor  # [T, K] int64
    log_probs: Tensor  # [T, K] float64
    tail_log_prob: Tensor | None  # [T] float64

    def rows(self, rows: slice | Tensor) -> TopKTeacher:
        return TopKTeacher(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


def on_cpu(
    student: Projection,
    teacher: TopKTeacher,
    coefficient: Tensor,  # [T] float64
    labels: Tensor | None,  # [T] int64
    workspace_bytes: int,
    gradients: list[bool],  # of hidden states, weight, bias
    divergences: Sequence[float],  # [6]
    conditional: bool,
    *numbers: float,  # beta, temperature, kd_weight, ce_weight
) -> tuple[Tensor, ...]:
    vocabulary = student.weight.shape[0]

    def losses_(rows: slice | Tensor, workspace: Tensor, loss: Tensor) -> None:
        scores = workspace[0]
        topk_rows(
            scores, *teacher.rows(rows), coefficient[rows], None if labels is None else labels[rows], loss, None,
            scores if any(gradients) else None, divergences, conditional, *numbers,
        )  # fmt: skip

    return by_rows(student, vocabulary, vocabulary, coefficient, workspace_bytes, 1, gradients, None, losses_)
