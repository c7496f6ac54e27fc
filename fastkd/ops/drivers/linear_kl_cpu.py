"""linear_kl on a CPU: by rows, in a workspace that stays in cache.

T tokens, V vocabulary, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...quantized import QuantizedWeight, row_blocks
from ..dtypes import gradient_dtype, score_dtype
from .chunks import token_chunks
from .divergence_rows import METRICS
from .linear_kl_call import Call, Projection, sum_over
from .softcap import softcap

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["by_rows", "capped_", "on_cpu"]

# Low-precision weights are widened to fp32 this many rows at a time where the GEMM cannot accumulate in fp32 itself.
WIDENED_ROWS = 4096
# Rows of scores for each thread between which and their gradient little else goes through its cache.
CAPPED_ROWS = 8


def _widened(weight: Tensor | QuantizedWeight, scores: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The weight [V, H] as blocks of rows in the dtype of scores [n, columns], as far as these go.

    One block, uncopied, where it is in that dtype and not quantised.
    """
    for rows, block in row_blocks(weight, scores, None if weight.dtype == scores.dtype else WIDENED_ROWS):
        yield rows, block.to(scores.dtype)


def scores_(out: Tensor, hidden: Tensor, head: Projection) -> None:
    """out [n, V] = scale * hidden @ weight.T + bias, in out's dtype whatever that of the operands."""
    hidden = hidden.to(out.dtype)
    for columns, block in _widened(head.weight, out):
        target = out[:, columns]
        if head.bias is None:
            torch.addmm(target, hidden, block.t(), beta=0, alpha=head.scale, out=target)
        else:
            bias = head.bias[columns].to(out.dtype)
            torch.addmm(bias, hidden, block.t(), alpha=head.scale, out=target)


class _Gradients:
    """Accumulates what a chunk of score gradients adds to the gradients of hidden states, weight and bias."""

    def __init__(self, student: Projection, dtype: torch.dtype, group: ProcessGroup | None, wanted: list[bool]):
        hidden, weight, bias, self.scale, _ = student
        self.hidden, self.weight, self.dtype, self.group = hidden, weight, dtype, group
        self.written = 0  # rows of weight_grad
        want_hidden, want_weight, want_bias = wanted
        # written once, and rounded then, but for what ranks add up
        hidden_dtype = gradient_dtype(weight) if group is None else dtype
        self.hidden_grad = hidden.new_zeros(hidden.shape, dtype=hidden_dtype) if want_hidden else None
        # fp32 even for 16-bit weights: chunks add up here
        self.weight_grad = hidden.new_empty(weight.shape, dtype=dtype) if want_weight else None
        self.bias_grad = bias.new_zeros(bias.shape, dtype=dtype) if want_bias and bias is not None else None

    def add(self, rows: Tensor | slice, hidden: Tensor, scores_grad: Tensor) -> None:
        vocabulary = scores_grad.shape[1]
        if self.bias_grad is not None:
            self.bias_grad[:vocabulary] += scores_grad.sum(0)
        if self.hidden_grad is not None:
            grad = scores_grad.new_zeros(hidden.shape)
            for columns, block in _widened(self.weight, scores_grad):
                grad.addmm_(scores_grad[:, columns], block, alpha=self.scale)
            self.hidden_grad[rows] = grad.to(self.hidden_grad.dtype)
        if self.weight_grad is not None:
            target = self.weight_grad[:vocabulary]
            target.addmm_(scores_grad.t(), hidden.to(self.dtype), beta=0 if self.written == 0 else 1, alpha=self.scale)
            self.written = vocabulary

    def results(self) -> tuple[Tensor, ...]:
        """The three gradients; empty where not wanted (a tensor each: outputs of an op may not alias)."""
        if self.weight_grad is not None:
            self.weight_grad[self.written :] = 0  # beyond the shared vocabulary; all, where every token was dropped
        sum_over(self.group, self.hidden_grad)
        gradients = (self.hidden_grad, self.weight_grad, self.bias_grad)
        dtype = gradient_dtype(self.weight)
        return tuple(self.hidden.new_empty(0, dtype=dtype) if grad is None else grad.to(dtype) for grad in gradients)


def capped_(
    student: Tensor,  # [n, columns]
    teacher: Tensor | None,  # [n, vocabulary]
    caps: tuple[float | None, float | None],
    wanted: bool,  # whether gradients are, written over the student's
    at_once: bool,  # as what ranks tell each other they tell of all rows
    losses_: Callable[[slice], None],
) -> None:
    """Calls losses_(rows) of scores that are yet to be capped, some rows at a time, and carries gradients through."""
    cap, teacher_cap = caps
    if cap is None and teacher_cap is None:
        losses_(slice(0, len(student)))
        return
    step = max(1, len(student) if at_once else CAPPED_ROWS * torch.get_num_threads())
    slopes = torch.empty_like(student[:step]) if wanted and cap is not None else None
    for start in range(0, len(student), step):
        rows = slice(start, start + step)
        scores, target = student[rows], None if teacher is None else teacher[rows]
        slope = None if slopes is None else slopes[: len(scores)]
        if cap is not None:
            softcap(scores, scores, slope, cap)
        if target is not None and teacher_cap is not None:
            softcap(target, target, None, teacher_cap)
        losses_(rows)
        if slope is not None:
            scores.mul_(slope)


def by_rows(
    student: Projection,
    columns: int,  # of the student that count
    widest: int,  # columns of the largest shard: chunks have to be the same on all ranks
    coefficient: Tensor,  # [T] float64
    workspace_bytes: int,
    buffers: int,  # in the workspace, [n, columns] each
    gradients: list[bool],  # of hidden states, weight, bias
    group: ProcessGroup | None,
    metrics: Tensor | None,  # [T, 6], to be written, of kept tokens alone
    losses_: Callable[[slice | Tensor, Tensor, Tensor, Tensor | None], None],
) -> tuple[Tensor, ...]:
    """Losses [T] and the three gradients, by way of the student's scores, of a chunk of tokens at a time.

    losses_(rows, workspace, loss, metrics) is given the scores in the first buffer, and writes losses and metrics of
    these rows, and over the scores, if gradients are wanted, theirs.
    """
    dtype = score_dtype(student.hidden)
    rows_at_once = max(1, workspace_bytes // (buffers * widest * dtype.itemsize))
    rows_at_once = min(rows_at_once, max(1, coefficient.shape[0]))
    workspace = student.hidden.new_empty(buffers, rows_at_once, columns, dtype=dtype)
    loss = torch.zeros_like(coefficient)
    total = _Gradients(student, dtype, group, gradients)
    for rows in token_chunks(coefficient, coefficient.shape[0], rows_at_once):
        hidden = student.hidden[rows]
        own, row_loss = workspace[:, : len(hidden)], coefficient.new_empty(len(hidden))
        told = None if metrics is None else coefficient.new_empty(len(hidden), METRICS)
        scores_(own[0], hidden, student)
        losses_(rows, own, row_loss, told)
        if any(gradients):
            total.add(rows, hidden, own[0])
        loss[rows] = row_loss
        if metrics is not None and told is not None:
            metrics[rows] = told
    return loss, *total.results()


def on_cpu(call: Call, *objective: Any) -> tuple[Tensor, ...]:
    teacher, wanted = call.teacher, any(call.gradients)

    def losses_(rows: slice | Tensor, workspace: Tensor, loss: Tensor, metrics: Tensor | None) -> None:
        scores, target = workspace[0], None
        if teacher is not None:
            target = workspace[1, :, : call.vocabulary]
            scores_(target, teacher.hidden[rows], teacher)
        coefficient, labels = call.coefficient[rows], None if call.labels is None else call.labels[rows]

        def of_some(part: slice) -> None:
            s, t = scores[part], None if target is None else target[part]
            part_labels, told = (None if x is None else x[part] for x in (labels, metrics))
            with_loss = s, t, coefficient[part], part_labels, loss[part]
            call.rows(*with_loss, s if wanted else None, *objective, metrics=told)

        caps = call.student.softcap, None if teacher is None else teacher.softcap
        capped_(scores, target, caps, wanted, call.group is not None, of_some)

    return by_rows(
        call.student, call.columns, call.widest, call.coefficient, call.workspace_bytes, 1 if teacher is None else 2,
        call.gradients, call.group, call.metrics, losses_,
    )  # fmt: skip
