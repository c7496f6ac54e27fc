"""linear_kl with a top-k teacher on a GPU: by rows, whose scores go through memory a chunk at a time.

A chunk is a GEMM into a workspace and one launch of the row primitive, which reads a row twice and writes its gradient.
Gradients of 16-bit operands are held for more tokens than scores are, and rows of both are padded, as in
linear_kl_gpu.py.

T tokens, V vocabulary, H hidden width, K ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...divergence import divergence_code
from ..dtypes import fp16_lift, score_dtype
from .chunks import padded
from .linear_kl_call import Projection
from .linear_kl_gpu import GpuGradients, multiply_, parts_of, rows_at_once
from .softcap import softcap
from .topk_call import TopKCall
from .topk_shards import topk_call_rows

__all__ = ["on_gpu"]


def _lift(student: Projection, call: TopKCall, gradients: list[bool]) -> Tensor | None:
    """What fp16 gradients of scores are multiplied by to be in range."""
    if student.weight.dtype != torch.float16 or not any(gradients):
        return None
    divergences, _, _, temperature, kd_weight, ce_weight = call.objective
    reverse = divergence_code("reverse_kl")
    of_divergences = abs(kd_weight * temperature) * sum(map(abs, divergences))
    largest = call.coefficient.abs().amax() * (of_divergences + abs(ce_weight))
    return fp16_lift(largest, reverse if divergences[reverse] != 0 else divergence_code("forward_kl"), 0.5)


def on_gpu(
    student: Projection,
    call: TopKCall,
    widest: int,  # columns of the largest shard: chunks have to be the same on all ranks
    workspace_bytes: int,
    gradients: list[bool],  # of hidden states, weight, bias
    metrics: Tensor | None,  # [T, 6], to be written
) -> tuple[Tensor, ...]:
    """Losses [T] and the three gradients."""
    hidden, weight, bias, scale, cap = student
    dtype, (vocabulary, width), tokens = score_dtype(hidden), weight.shape, call.coefficient.shape[0]
    weight_rows = vocabulary if call.group is None else widest
    stride, widest = padded(vocabulary), padded(widest)
    wanted, in_place = any(gradients), weight.dtype == dtype
    sloped = wanted and cap is not None
    gradient_row = widest * weight.itemsize if wanted and not in_place else 0
    instead = weight_rows * width * dtype.itemsize if gradients[1] and gradient_row else -1
    score_row = (1 + sloped) * widest * dtype.itemsize
    score_rows, gradient_rows = rows_at_once(tokens, score_row, gradient_row, instead, workspace_bytes)
    score_rows = min(score_rows, tokens)
    gradient_rows = min(gradient_rows, tokens) if gradient_row else score_rows

    workspace = hidden.new_empty(score_rows, stride, dtype=dtype)
    scores = workspace[:, :vocabulary]
    slopes = torch.empty_like(scores) if sloped else None
    narrow = hidden.new_empty(gradient_rows if gradient_row else 0, stride)[:, :vocabulary]
    loss, lift = torch.empty_like(call.coefficient), _lift(student, call, gradients)
    lifted = call if lift is None else call._replace(coefficient=call.coefficient * lift)
    all_tokens = gradient_rows >= tokens
    total = GpuGradients(student, call.coefficient, vocabulary, lift, call.group, all_tokens, gradients, workspace)
    for block in parts_of(tokens, gradient_rows):
        for part in parts_of(block.stop - block.start, score_rows):
            rows = slice(block.start + part.start, block.start + part.stop)
            s = scores[: part.stop - part.start]
            slope = None if slopes is None else slopes[: part.stop - part.start]
            multiply_(s, hidden[rows], weight.t(), scale)
            if bias is not None:
                s += bias
            if cap is not None:
                softcap(s, s, slope, cap)
            target = None if not wanted else s if in_place or sloped else narrow[part]
            of_part = None if metrics is None else metrics[rows]
            topk_call_rows(s, lifted.at(rows), loss[rows], None, target, of_part)
            if slope is not None:
                torch.mul(s, slope, out=s if in_place else narrow[part])  # rounded once
        if wanted:
            total.add(block, s if in_place else narrow[: block.stop - block.start])
    return loss if lift is None else loss.div_(lift), *total.results()
