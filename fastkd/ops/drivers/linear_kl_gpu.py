"""linear_kl on a GPU: scores of some tokens in fp32, straight from the GEMM, and the row primitive.

An element of the scores costs 8 bytes to write and 8 to read for both models, and 2 to write the gradient for 16-bit
operands: one launch makes the loss and it, and reads again what it did not keep. Written over the scores, 4 bytes, the
gradient would take another pass to be narrowed. Gradients of wider operands stay where they are. Rows of both begin at
multiples of 32 bytes or more, so that GEMMs and kernels move 16 bytes at a time whatever the vocabulary.

T tokens, V vocabulary, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...quantized import QuantizedWeight, row_blocks
from ..dtypes import fp16_lift, gradient_dtype, score_dtype
from .chunks import padded
from .linear_kl_call import Call, Projection, sum_over
from .softcap import softcap

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["GpuGradients", "multiply_", "on_gpu", "parts_of", "rows_at_once"]

# A GPU's GEMM has tiles of so many rows.
GEMM_ROWS = 128


def multiply_(out: Tensor, a: Tensor, b: Tensor, scale: float, add: bool = False) -> None:
    """out = scale * a @ b, plus what out holds if `add`: summed up in fp32 or better, of operands as they are."""
    beta = 1 if add else 0
    if a.shape[1] == 0:  # a shard without columns
        if not add:
            out.zero_()
    elif not out.is_cuda:  # Triton's interpreter, in tests
        dtype = torch.promote_types(out.dtype, torch.float32)
        out.copy_(torch.addmm(out.to(dtype), a.to(dtype), b.to(dtype), beta=beta, alpha=scale))
    elif a.dtype == b.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, alpha=scale, out=out)
    elif a.dtype == b.dtype and a.itemsize == 2 and out.dtype == torch.float32:
        # tensor cores multiply 16-bit operands, accumulate in fp32 and write that
        if add and out.shape[0] == 1:  # torch takes one row for a bias then, and leaves it out
            out.add_(torch.mm(a, b, out_dtype=out.dtype), alpha=scale)
        else:
            torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=scale, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=scale, out=out)


def multiply_and_round_(out: Tensor, a: Tensor, b: Tensor, scale: float, workspace: Tensor) -> None:
    """The same into an `out` narrower than its sums: these are made in `workspace`, of their dtype, and rounded once.

    A GEMM that writes bf16 itself may divide long sums, and add up the parts in bf16.
    """
    (count, width), wide = out.shape, workspace.view(-1)
    if wide.numel() < min(count, GEMM_ROWS) * width:
        wide = wide.new_empty(min(count, GEMM_ROWS) * width)
    for rows in parts_of(count, max(1, wide.numel() // max(1, width))):
        sums = wide[: (rows.stop - rows.start) * width].view(-1, width)
        multiply_(sums, a[rows], b, scale)
        out[rows] = sums


class GpuGradients:
    """Multiplies gradients of scores into those of hidden states, weight and bias, a block of tokens at a time.

    Blocks write their tokens' gradients once and add up the weight's. What is added up is fp32, what is written once is
    not: one block of all tokens writes the weight's once, too. Its sums are over tokens, and too short to be divided.
    """

    def __init__(
        self,
        student: Projection,
        coefficient: Tensor,  # [T]
        vocabulary: int,
        lift: Tensor | None,  # what gradients of scores have been multiplied by
        group: ProcessGroup | None,
        all_tokens: bool,  # in one block
        wanted: list[bool],  # of hidden states, weight, bias
        workspace: Tensor,  # of any shape; what it holds is lost, but of wide operands
    ):
        self.workspace = workspace
        self.student, self.lift, self.group, self.narrow = student, lift, group, gradient_dtype(student.weight)
        self.vocabulary = vocabulary
        self.hidden_grad: Tensor | None = None
        self.weight_grad: Tensor | None = None
        self.bias_grad: Tensor | None = None
        wide = score_dtype(student.hidden)
        if wanted[0]:
            once = group is None and not isinstance(student.weight, QuantizedWeight)
            self.hidden_grad = torch.empty_like(
                student.hidden,
                dtype=self.narrow if once else wide,
                memory_format=torch.contiguous_format,
            )
        if wanted[1]:
            self.weight_grad = student.hidden.new_empty(student.weight.shape, dtype=self.narrow if all_tokens else wide)
            self.weight_grad[vocabulary:] = 0
            # what dropped tokens hold may not reach the weight's gradient, as 0 * NaN
            self.student = student._replace(hidden=student.hidden.masked_fill((coefficient == 0).unsqueeze(1), 0))
        if wanted[2] and student.bias is not None:
            self.bias_grad = student.bias.new_zeros(student.bias.shape, dtype=wide)

    def add(self, rows: slice, scores_grad: Tensor) -> None:
        """A block's gradient of scores [rows, vocabulary], in the dtype of the operands."""
        hidden, weight, _, scale, _ = self.student
        if self.bias_grad is not None:
            self.bias_grad[: self.vocabulary] += scores_grad.sum(0, dtype=self.bias_grad.dtype)
        if self.hidden_grad is not None:
            shared = weight if isinstance(weight, QuantizedWeight) else weight[: self.vocabulary]
            out, summed = self.hidden_grad[rows], self.hidden_grad.dtype == self.workspace.dtype
            for part, block in row_blocks(shared, scores_grad):
                if summed:
                    multiply_(out, scores_grad[:, part], block, scale, add=part.start > 0)
                else:  # there is one part
                    multiply_and_round_(out, scores_grad, block, scale, self.workspace)
        if self.weight_grad is not None:
            multiply_(self.weight_grad[: self.vocabulary], scores_grad.t(), hidden[rows], scale, add=rows.start > 0)

    def results(self) -> Iterator[Tensor]:
        """The three gradients; empty where not wanted (a tensor each: outputs of an op may not alias)."""
        sum_over(self.group, self.hidden_grad)
        for grad in (self.hidden_grad, self.weight_grad, self.bias_grad):
            if grad is None:
                yield self.student.hidden.new_empty(0, dtype=self.narrow)
            else:
                yield (grad if self.lift is None else grad.div_(self.lift)).to(self.narrow)


def parts_of(count: int, at_most: int) -> Iterator[slice]:
    """A range in nearly equal parts of whole tiles of a GEMM."""
    parts = -(-count // at_most)
    step = min(at_most, -(-count // (parts * GEMM_ROWS)) * GEMM_ROWS)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _whole_tiles(count: int) -> int:
    return max(1, count if count < GEMM_ROWS else count - count % GEMM_ROWS)


def rows_at_once(tokens: int, score_row: int, gradient_row: int, instead: int, workspace: int) -> tuple[int, int]:
    """How many tokens' scores, and how many tokens' gradients of scores, are held at a time: of so many bytes each.

    Gradients are held for more tokens than scores are. Each block of them reads the weight once, and reads and writes
    its fp32 gradient, 10 bytes a number in all, where a block of scores reads two weights, 4 bytes: sizes in a
    proportion of three make the sum about least. Those of all tokens need no accumulator, and may take its place.
    """
    if tokens * gradient_row <= instead:
        return _whole_tiles(workspace // score_row), tokens
    score_rows = _whole_tiles(workspace // (score_row + 3 * gradient_row))
    gradient_rows = (workspace - score_rows * score_row) // max(1, gradient_row)
    return score_rows, max(score_rows, _whole_tiles(gradient_rows))


def _lift(call: Call, *objective: Any) -> Tensor | None:
    """What fp16 gradients of scores are multiplied by to be in range."""
    divergence, beta, temperature, kd_weight, ce_weight = objective
    if call.student.weight.dtype != torch.float16 or not any(call.gradients):
        return None
    largest = call.coefficient.abs().amax() * (abs(kd_weight * temperature) + abs(ce_weight))
    return fp16_lift(largest, int(divergence), beta)


def on_gpu(call: Call, *objective: Any) -> tuple[Tensor, ...]:
    """Losses [T] and the three gradients."""
    student, teacher, coefficient, labels, gradients = (
        call.student, call.teacher, call.coefficient, call.labels, call.gradients,
    )  # fmt: skip
    hidden, weight, columns = student.hidden, student.weight, call.columns
    stride, widest = padded(columns), padded(call.widest)
    tokens, dtype = coefficient.shape[0], score_dtype(hidden)
    buffers, in_place, wanted = 1 if teacher is None else 2, weight.dtype == dtype, any(gradients)
    gradient_row = 0 if in_place or not wanted else widest * hidden.itemsize
    sloped = wanted and student.softcap is not None
    score_row = (buffers + sloped) * widest * dtype.itemsize
    weight_rows = weight.shape[0] if call.group is None else call.widest
    instead = weight_rows * weight.shape[1] * dtype.itemsize if gradients[1] and gradient_row else -1
    score_rows, gradient_rows = rows_at_once(tokens, score_row, gradient_row, instead, call.workspace_bytes)
    if gradient_row == 0:
        gradient_rows = score_rows
    score_rows, gradient_rows = min(score_rows, tokens), min(gradient_rows, tokens)

    workspace = hidden.new_empty(buffers, score_rows, stride, dtype=dtype)
    scores = workspace[..., :columns]
    narrow = hidden.new_empty(gradient_rows if gradient_row else 0, stride)[:, :columns]
    slopes = workspace.new_empty(score_rows if sloped else 0, stride)[:, :columns]
    loss = torch.empty_like(coefficient)
    lift = _lift(call, *objective)
    lifted = coefficient if lift is None else coefficient * lift
    all_tokens = gradient_rows >= tokens
    total = GpuGradients(student, coefficient, columns, lift, call.group, all_tokens, gradients, workspace)
    for block in parts_of(tokens, gradient_rows):
        for part in parts_of(block.stop - block.start, score_rows):
            rows = slice(block.start + part.start, block.start + part.stop)
            both = [scores[0, : part.stop - part.start]]
            if teacher is not None:
                both.append(scores[1, : part.stop - part.start, : call.vocabulary])
            slope = slopes[: part.stop - part.start] if sloped else None
            for made, head in zip(both, (student, teacher), strict=False):
                assert head is not None
                for vocabulary, weights in row_blocks(head.weight, made):
                    multiply_(made[:, vocabulary], head.hidden[rows], weights.t(), head.scale)
                if head.bias is not None:
                    made += head.bias[: made.shape[1]]
                if head.softcap is not None:
                    softcap(made, made, slope if head is student else None, head.softcap)
            target = None if not wanted else both[0] if in_place or sloped else narrow[part]
            call.rows(
                both[0], None if teacher is None else both[1], lifted[rows], None if labels is None else labels[rows],
                loss[rows], target, *objective, metrics=None if call.metrics is None else call.metrics[rows],
            )  # fmt: skip
            if slope is not None:
                torch.mul(both[0], slope, out=both[0] if in_place else narrow[part])  # rounded once
        if wanted:
            grad = both[0] if in_place else narrow[: block.stop - block.start]
            total.add(block, grad)
    return loss if lift is None else loss.div_(lift), *total.results()
