"""linear_kl with a top-k teacher on a CPU: by rows, in a workspace that stays in cache.

T tokens, V vocabulary, H hidden width, K ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import score_dtype
from .chunks import token_chunks
from .linear_kl_call import Projection
from .linear_kl_cpu import Gradients, scores_
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
    dtype, vocabulary, tokens = score_dtype(student.hidden), student.weight.shape[0], coefficient.shape[0]
    rows_at_once = min(max(1, workspace_bytes // (vocabulary * dtype.itemsize)), max(1, tokens))
    workspace = student.hidden.new_empty(rows_at_once, vocabulary, dtype=dtype)
    loss = torch.zeros_like(coefficient)
    total = Gradients(student, dtype, None, gradients)
    for rows in token_chunks(coefficient, tokens, rows_at_once):
        weights, hidden = coefficient[rows], student.hidden[rows]
        scores = workspace[: len(weights)]
        scores_(scores, hidden, student, vocabulary)
        row_labels = None if labels is None else labels[rows]
        row_loss = torch.empty_like(weights)
        target = scores if any(gradients) else None
        topk_rows(
            scores, *teacher.rows(rows), weights, row_labels, row_loss, None, target, divergences, conditional, *numbers
        )
        if any(gradients):
            total.add(rows, hidden, scores)
        loss[rows] = row_loss
    return loss, *total.results()
