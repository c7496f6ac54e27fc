"""linear_kl with a top-k teacher on a GPU: by rows, whose scores go through memory a chunk at a time.

A chunk is a GEMM into a workspace and one launch of the row primitive, which reads a row twice and writes its gradient.
Gradients of 16-bit operands are held for more tokens than scores are, as in linear_kl_gpu.py. Rows of both begin at
multiples of 64 bytes or more, so that GEMMs and kernels move 16 bytes at a time whatever the vocabulary.

T tokens, V vocabulary, H hidden width, K ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...divergence import divergence_code
from ..dtypes import fp16_lift, score_dtype
from .linear_kl_call import Projection
from .linear_kl_gpu import GpuGradients, multiply_, parts_of, rows_at_once
from .topk_linear_cpu import TopKTeacher
from .topk_rows import topk_rows

__all__ = ["on_gpu"]

# Columns, to a multiple of which rows are padded.
PADDED = 32


def _lift(
    student: Projection, coefficient: Tensor, gradients: list[bool], divergences: Sequence[float], *numbers: float
) -> Tensor | None:
    """What fp16 gradients of scores are multiplied by to be in range."""
    if student.weight.dtype != torch.float16 or not any(gradients):
        return None
    _, temperature, kd_weight, ce_weight = numbers
    reverse = divergence_code("reverse_kl")
    of_divergences = abs(kd_weight * temperature) * sum(map(abs, divergences))
    largest = coefficient.abs().amax() * (of_divergences + abs(ce_weight))
    return fp16_lift(largest, reverse if divergences[reverse] != 0 else divergence_code("forward_kl"), 0.5)


def on_gpu(
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
    hidden, weight, bias, scale, _ = student
    dtype, (vocabulary, width), tokens = score_dtype(hidden), weight.shape, coefficient.shape[0]
    padded = -(-vocabulary // PADDED) * PADDED
    wanted, in_place = any(gradients), weight.dtype == dtype
    gradient_row = padded * weight.itemsize if wanted and not in_place else 0
    instead = vocabulary * width * dtype.itemsize if gradients[1] and gradient_row else -1
    score_rows, gradient_rows = rows_at_once(tokens, padded * dtype.itemsize, gradient_row, instead, workspace_bytes)
    score_rows = min(score_rows, tokens)
    gradient_rows = min(gradient_rows, tokens) if gradient_row else score_rows

    scores = hidden.new_empty(score_rows, padded, dtype=dtype)[:, :vocabulary]
    narrow = hidden.new_empty(gradient_rows if gradient_row else 0, padded)[:, :vocabulary]
    loss = torch.empty_like(coefficient)
    lift = _lift(student, coefficient, gradients, divergences, *numbers)
    lifted = coefficient if lift is None else coefficient * lift
    total = GpuGradients(student, coefficient, vocabulary, lift, None, gradient_rows >= tokens, True, gradients)
    for block in parts_of(tokens, gradient_rows):
        for part in parts_of(block.stop - block.start, score_rows):
            rows = slice(block.start + part.start, block.start + part.stop)
            s = scores[: part.stop - part.start]
            multiply_(s, hidden[rows], weight.t(), scale)
            if bias is not None:
                s += bias
            target = None if not wanted else s if in_place else narrow[part]
            row_labels = None if labels is None else labels[rows]
            topk_rows(
                s, *teacher.rows(rows), lifted[rows], row_labels, loss[rows], None, target, divergences, conditional,
                *numbers,
            )  # fmt: skip
        if wanted:
            total.add(block, slice(0, vocabulary), s if in_place else narrow[: block.stop - block.start])
    return loss if lift is None else loss.div_(lift), *total.results()
