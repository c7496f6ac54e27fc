"""linear_kl: the vocabulary projections of both models and the divergence between their logits, in one op.

Tokens are taken in chunks. A chunk's logits go into a workspace that every chunk reuses: two GEMMs fill it, the row
primitive turns student logits into their gradient in place, two GEMMs carry that on to the hidden states and the
weight. The [T, V] logits never exist, and nothing is computed twice: 2 T V (Ht + 3 Hs) FLOPs with gradients,
2 T V (Ht + Hs) without.

A scalar loss fixes every token's coefficient before the pass, so the gradients are made in the forward pass and scaled
by the upstream gradient in the backward pass. Per-token losses do not know theirs: their backward runs the op again.

On a GPU there are two ways. By rows, as above, the scores of a chunk go through memory; by tiles (kernels/linear_kl.py)
they never leave the multiprocessor, at the price of multiplying twice where gradients are wanted. `_by_tiles` chooses.

A vocabulary may be spread over the ranks of a process group (vocabulary_shards.py). Each rank multiplies its shards of
the heads, and a chunk's rows are completed by what the ranks gather of them. Such calls go by rows.

T tokens, V vocabulary, Hs and Ht hidden widths.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..backend import backend_for, use_fused
from ..checks import Objective, TokenArguments, check_number, check_same_device, check_tensor, is_finite, numbers
from ..distributed import sum_
from ..divergence import divergence_code
from .autograd import Function, Gradient, Scaled, apply, constant, differentiable, wants_gradient
from .chunks import token_chunks
from .divergence_rows import (
    STATS,
    divergence_gradient,
    divergence_rows_,
    divergence_shard_gradient,
    divergence_stats,
    gpu_row_kernels,
)
from .dtypes import autocast_like_linear, fp16_lift, gradient_dtype, score_dtype
from .vocabulary_shards import (
    OBJECTIVE,
    SHARD_ARGUMENTS,
    Facts,
    RowBlock,
    agree,
    group_by_name,
    local_tensor,
    shard_on,
    vocabulary_group,
    whole_row_stats,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LinearKL", "LinearKLPerToken", "linear_kl"]

# For the two score buffers of a chunk: enough rows in flight for the GEMMs to run at full speed. On a GPU, in bf16, T
# 8192, V 128256, Hs 4096 take 788 MB for scores of 768 tokens, 134 MB for the hidden states' gradient and a copy of
# them without dropped tokens, and 2.1 GB for the gradients of all scores, which is what accumulating the weight's
# gradient in fp32 would take. At T 1024 the last are 263 MB, and the scores are those of 512 tokens.
WORKSPACE_MB = {"cpu": 128, "cuda": 768}
# Low-precision weights are widened to fp32 this many rows at a time where the GEMM cannot accumulate in fp32 itself.
WIDENED_ROWS = 4096
# A GPU's GEMM has tiles of so many rows.
GEMM_ROWS = 128

# ---- schema ---------------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastkd", "FRAGMENT")
_library.define(
    "linear_kl(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? teacher_hidden, "
    "Tensor? teacher_weight, Tensor? teacher_bias, Tensor coefficient, Tensor? labels, Tensor sizes, "
    f"bool[3] gradients, {OBJECTIVE}, {SHARD_ARGUMENTS}) "
    "-> (Tensor loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)

# ---- fake -----------------------------------------------------------------------------------------------------------


def _outputs(student_hidden, student_weight, student_bias, coefficient, gradients):
    """Loss and gradients, unwritten; a gradient that is not asked for is empty."""
    wanted = zip(gradients, (student_hidden, student_weight, student_bias), strict=True)
    dtype = gradient_dtype(student_weight)
    shapes = [x.shape if want and x is not None else (0,) for want, x in wanted]
    return torch.empty_like(coefficient), *(student_weight.new_empty(shape, dtype=dtype) for shape in shapes)


@torch.library.register_fake("fastkd::linear_kl", lib=_library)
def _(student_hidden, student_weight, student_bias, th, tw, tb, coefficient, labels, sizes, gradients, *rest):
    return _outputs(student_hidden, student_weight, student_bias, coefficient, gradients)


class _Head(NamedTuple):
    """One model's vocabulary projection and what goes into it."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    scale: float


class _Call(NamedTuple):
    """What every way of computing the op is given, but for the objective."""

    student: _Head
    teacher: _Head | None  # None: cross-entropy alone
    vocabulary: int  # that both models share; of a shard its columns
    coefficient: Tensor  # [T] float64
    labels: Tensor | None  # [T] int64
    workspace_bytes: int
    gradients: list[bool]  # of hidden states, weight, bias
    group: ProcessGroup | None  # over whose ranks the vocabulary is spread
    widest: int  # columns of the largest shard, or `vocabulary`: chunks have to be the same on all ranks


def _sum_over(group: ProcessGroup | None, hidden_grad: Tensor | None) -> None:
    """Makes a shard's gradient of the hidden states the whole vocabulary's."""
    if group is not None and hidden_grad is not None:
        sum_(hidden_grad, group)


# ---- forward, with the gradients: on a CPU --------------------------------------------------------------------------


def _widened(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight [V, H] as blocks of rows in the scores' dtype; one block, uncopied, where it is in that dtype."""
    step = max(1, weight.shape[0]) if weight.dtype == dtype else WIDENED_ROWS
    for start in range(0, weight.shape[0], step):
        rows = slice(start, min(start + step, weight.shape[0]))
        yield rows, weight[rows].to(dtype)


def _scores_(out: Tensor, hidden: Tensor, head: _Head, vocabulary: int) -> None:
    """out [n, V] = scale * hidden @ weight.T + bias, in out's dtype whatever that of the operands."""
    hidden = hidden.to(out.dtype)
    for columns, block in _widened(head.weight[:vocabulary], out.dtype):
        target = out[:, columns]
        if head.bias is None:
            torch.addmm(target, hidden, block.t(), beta=0, alpha=head.scale, out=target)
        else:
            bias = head.bias[:vocabulary][columns].to(out.dtype)
            torch.addmm(bias, hidden, block.t(), alpha=head.scale, out=target)


class _Gradients:
    """Accumulates what a chunk of score gradients adds to the gradients of hidden states, weight and bias."""

    def __init__(self, student: _Head, dtype: torch.dtype, group: ProcessGroup | None, wanted: list[bool]):
        hidden, weight, bias, self.scale = student
        self.weight, self.dtype, self.group = weight, dtype, group
        self.written = 0  # rows of weight_grad
        want_hidden, want_weight, want_bias = wanted
        # written once, and rounded then, but for what ranks add up
        hidden_dtype = gradient_dtype(weight) if group is None else dtype
        self.hidden_grad = hidden.new_zeros(hidden.shape, dtype=hidden_dtype) if want_hidden else None
        # fp32 even for 16-bit weights: chunks add up here
        self.weight_grad = weight.new_empty(weight.shape, dtype=dtype) if want_weight else None
        self.bias_grad = bias.new_zeros(bias.shape, dtype=dtype) if want_bias and bias is not None else None

    def add(self, rows: Tensor | slice, hidden: Tensor, scores_grad: Tensor) -> None:
        vocabulary = scores_grad.shape[1]
        if self.bias_grad is not None:
            self.bias_grad[:vocabulary] += scores_grad.sum(0)
        if self.hidden_grad is not None:
            grad = scores_grad.new_zeros(hidden.shape)
            for columns, block in _widened(self.weight[:vocabulary], self.dtype):
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
        _sum_over(self.group, self.hidden_grad)
        gradients = (self.hidden_grad, self.weight_grad, self.bias_grad)
        dtype = gradient_dtype(self.weight)
        return tuple(self.weight.new_empty(0, dtype=dtype) if grad is None else grad.to(dtype) for grad in gradients)


def _stats(
    group: ProcessGroup | None,
    student: Tensor,  # [n, V]
    teacher: Tensor | None,  # [n, V]
    coefficient: Tensor,  # [n]
    labels: Tensor | None,  # [n]
    loss: Tensor,  # [n]
    stats: Tensor,  # [n, 7]
    *objective: float,
) -> None:
    """`divergence_stats` of rows, or of the rows that the group's shards are of."""
    if group is None:
        divergence_stats(student, teacher, coefficient, labels, loss, stats, *objective)
    else:
        block = RowBlock(slice(0, len(loss)), student, teacher)
        whole_row_stats([block], coefficient, labels, loss, stats, group, *objective)


def _on_cpu(call: _Call, *objective: float) -> tuple[Tensor, ...]:
    student, teacher, vocabulary, coefficient, labels, workspace_bytes, gradients, group, widest = call
    dtype = score_dtype(student.hidden)
    buffers = 1 if teacher is None else 2
    rows_at_once = max(1, workspace_bytes // (buffers * widest * dtype.itemsize))
    rows_at_once = min(rows_at_once, max(1, coefficient.shape[0]))
    workspace = student.hidden.new_empty(buffers, rows_at_once, vocabulary, dtype=dtype)
    loss = torch.zeros_like(coefficient)
    total = _Gradients(student, dtype, group, gradients)
    for rows in token_chunks(coefficient, coefficient.shape[0], rows_at_once):
        weights = coefficient[rows]
        scores, teacher_scores = workspace[0, : len(weights)], None
        hidden = student.hidden[rows]
        _scores_(scores, hidden, student, vocabulary)
        if teacher is not None:
            teacher_scores = workspace[1, : len(weights)]
            _scores_(teacher_scores, teacher.hidden[rows], teacher, vocabulary)
        row_labels = None if labels is None else labels[rows]
        row_loss = torch.empty_like(weights)
        if any(gradients) and group is None:
            divergence_rows_(scores, teacher_scores, weights, row_labels, row_loss, *objective)
        else:
            stats = weights.new_empty(len(weights), STATS)
            _stats(group, scores, teacher_scores, weights, row_labels, row_loss, stats, *objective)
            if any(gradients):
                divergence_shard_gradient(scores, teacher_scores, stats, weights, row_labels, scores, *objective)
        if any(gradients):
            total.add(rows, hidden, scores)
        loss[rows] = row_loss
    return loss, *total.results()


# ---- forward, with the gradients: on a GPU --------------------------------------------------------------------------


def _multiply_(out: Tensor, a: Tensor, b: Tensor, scale: float, add: bool = False) -> None:
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


class _GpuGradients:
    """Multiplies gradients of scores into those of hidden states, weight and bias, block by block.

    A block is some tokens by some of the vocabulary. Blocks of all columns write their tokens' gradients once and add
    up the weight's; blocks of all tokens the other way round. What is added up is fp32, what is written once is not.
    """

    def __init__(
        self,
        student: _Head,
        coefficient: Tensor,  # [T]
        vocabulary: int,
        lift: Tensor | None,  # what gradients of scores have been multiplied by
        group: ProcessGroup | None,
        all_tokens: bool,
        all_columns: bool,
        wanted: list[bool],  # of hidden states, weight, bias
    ):
        self.student, self.lift, self.group, self.narrow = student, lift, group, gradient_dtype(student.weight)
        self.hidden_grad: Tensor | None = None
        self.weight_grad: Tensor | None = None
        self.bias_grad: Tensor | None = None
        wide = score_dtype(student.hidden)
        if wanted[0]:
            self.hidden_grad = torch.empty_like(
                student.hidden,
                dtype=self.narrow if all_columns and group is None else wide,
                memory_format=torch.contiguous_format,
            )
        if wanted[1]:
            self.weight_grad = torch.empty_like(
                student.weight, dtype=self.narrow if all_tokens else wide, memory_format=torch.contiguous_format
            )
            self.weight_grad[vocabulary:] = 0
            # what dropped tokens hold may not reach the weight's gradient, as 0 * NaN
            self.student = student._replace(hidden=student.hidden.masked_fill((coefficient == 0).unsqueeze(1), 0))
        if wanted[2] and student.bias is not None:
            self.bias_grad = student.bias.new_zeros(student.bias.shape, dtype=wide)

    def add(self, rows: slice, columns: slice, scores_grad: Tensor) -> None:
        """A block's gradient of scores [rows, columns], in the dtype of the operands."""
        hidden, weight, _, scale = self.student
        if self.bias_grad is not None:
            self.bias_grad[columns] += scores_grad.sum(0, dtype=self.bias_grad.dtype)
        if self.hidden_grad is not None:
            _multiply_(self.hidden_grad[rows], scores_grad, weight[columns], scale, add=columns.start > 0)
        if self.weight_grad is not None:
            _multiply_(self.weight_grad[columns], scores_grad.t(), hidden[rows], scale, add=rows.start > 0)

    def results(self) -> Iterator[Tensor]:
        """The three gradients; empty where not wanted (a tensor each: outputs of an op may not alias)."""
        _sum_over(self.group, self.hidden_grad)
        for grad in (self.hidden_grad, self.weight_grad, self.bias_grad):
            if grad is None:
                yield self.student.weight.new_empty(0, dtype=self.narrow)
            else:
                yield (grad if self.lift is None else grad.div_(self.lift)).to(self.narrow)


def _parts(count: int, at_most: int) -> Iterator[slice]:
    """A range in nearly equal parts of whole tiles of a GEMM."""
    parts = -(-count // at_most)
    step = min(at_most, -(-count // (parts * GEMM_ROWS)) * GEMM_ROWS)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _whole_tiles(count: int) -> int:
    return max(1, count if count < GEMM_ROWS else count - count % GEMM_ROWS)


def _rows_at_once(tokens: int, score_row: int, gradient_row: int, instead: int, workspace: int) -> tuple[int, int]:
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


def _rows(call: _Call, lift: Tensor | None, *objective: float) -> tuple[Tensor, ...]:
    """By rows: scores of some tokens in fp32, straight from the GEMM, and the row primitive.

    An element of the scores costs 8 bytes to write and 8 to read for both models, and with gradients 8 to read again
    and 2 to write for 16-bit operands. Written over the scores, 4 bytes, the gradient would take another pass to be
    narrowed. Gradients of wider operands stay where they are.
    """
    student, teacher, vocabulary, coefficient, labels, workspace_bytes, gradients, group, widest = call
    hidden, weight = student.hidden, student.weight
    tokens, dtype = coefficient.shape[0], score_dtype(hidden)
    buffers, in_place, wanted = 1 if teacher is None else 2, weight.dtype == dtype, any(gradients)
    gradient_row = 0 if in_place or not wanted else widest * weight.itemsize
    score_row = buffers * widest * dtype.itemsize
    weight_rows = weight.shape[0] if group is None else widest
    instead = weight_rows * weight.shape[1] * dtype.itemsize if gradients[1] and gradient_row else -1
    score_rows, gradient_rows = _rows_at_once(tokens, score_row, gradient_row, instead, workspace_bytes)
    if gradient_row == 0:
        gradient_rows = score_rows
    score_rows, gradient_rows = min(score_rows, tokens), min(gradient_rows, tokens)

    scores = hidden.new_empty(buffers, score_rows, vocabulary, dtype=dtype)
    narrow = hidden.new_empty(gradient_rows if gradient_row else 0, vocabulary)
    loss = torch.empty_like(coefficient)
    lifted = coefficient if lift is None else coefficient * lift
    total = _GpuGradients(student, coefficient, vocabulary, lift, group, gradient_rows >= tokens, True, gradients)
    for block in _parts(tokens, gradient_rows):
        for part in _parts(block.stop - block.start, score_rows):
            rows = slice(block.start + part.start, block.start + part.stop)
            both = [scores[i, : part.stop - part.start] for i in range(buffers)]
            for target, head in zip(both, (student, teacher), strict=False):
                assert head is not None
                _multiply_(target, head.hidden[rows], head.weight[:vocabulary].t(), head.scale)
                if head.bias is not None:
                    target += head.bias[:vocabulary]
            arguments = both[0], None if teacher is None else both[1]
            row_labels = None if labels is None else labels[rows]
            if wanted and in_place and group is None:
                divergence_rows_(*arguments, coefficient[rows], row_labels, loss[rows], *objective)
            else:
                stats = coefficient.new_empty(part.stop - part.start, STATS)
                _stats(group, *arguments, coefficient[rows], row_labels, loss[rows], stats, *objective)
                if wanted:
                    target = both[0] if in_place else narrow[part]
                    row_gradient = divergence_gradient if group is None else divergence_shard_gradient
                    row_gradient(*arguments, stats, lifted[rows], row_labels, target, *objective)
        if wanted:
            grad = both[0] if in_place else narrow[: block.stop - block.start]
            total.add(block, slice(0, vocabulary), grad)
    return loss, *total.results()


def _tiles(call: _Call, lift: Tensor | None, *objective: float) -> tuple[Tensor, ...]:
    """By tiles: statistics of all tokens at once, and gradients of all tokens for some of the vocabulary at a time.

    No score is written, 2 bytes an element of gradients of 16-bit operands are, and nothing accumulates the weight's.
    """
    from ..kernels import linear_kl as kernels

    student, teacher, vocabulary, coefficient, labels, workspace_bytes, gradients, *_ = call
    tokens, weight = coefficient.shape[0], student.weight
    columns_at_once = min(vocabulary, _whole_tiles(workspace_bytes // (tokens * weight.itemsize)))
    loss = torch.empty_like(coefficient)
    lifted = coefficient if lift is None else coefficient * lift
    stats = kernels.statistics(student, teacher, vocabulary, coefficient, labels, loss, *objective)
    total = _GpuGradients(student, coefficient, vocabulary, lift, None, True, columns_at_once >= vocabulary, gradients)
    if any(gradients):
        buffer = student.hidden.new_empty(tokens * columns_at_once)
        for columns in _parts(vocabulary, columns_at_once):
            grad = buffer[: tokens * (columns.stop - columns.start)].view(tokens, -1)
            kernels.gradient(student, teacher, vocabulary, lifted, labels, *stats, columns.start, grad, *objective)
            total.add(slice(0, tokens), columns, grad)
    return loss, *total.results()


# ---- the way that a GPU takes ----------------------------------------------------------------------------------------
# Counted, and not measured on any GPU. By rows an element of the scores costs memory traffic; by tiles slower FLOPs,
# and more of them for every look beyond the first (JSD and those after it take two, gradients one more):
#
#                                     | by rows                     | by tiles
#   FLOPs, no gradients               | 2 (Ht + Hs)                 | 2 (Ht + Hs) x looks
#   FLOPs, gradients                  | 2 (Ht + 3 Hs)               | 2 (Ht + Hs) x (looks + 1) + 4 Hs
#   bytes of scores, forward KL       | 16, with gradients 24       | 0
#   bytes of scores, JSD              | 24, with gradients 32       | 0
#
# So, of 16-bit operands and with a teacher (without one half the bytes are those of a single model):
#
#   shape                             | forward KL, reverse KL      | JSD and those after it
#   no gradients                      | tiles to Ht + Hs = 988      | tiles to Ht + Hs = 329
#   gradients                         | tiles to Ht + Hs = 570      | tiles to Ht + Hs = 299
#   768 -> 512, 4096 -> 4096          | rows                        | rows
#   768 -> 192                        | tiles, with gradients rows  | rows
#   256 -> 256                        | tiles                       | rows
#
# fp32 and fp64 operands go by rows: in full precision no tensor core multiplies them. What a wider tile would change is
# in kernels/linear_kl.py.

# What the FLOPs of a byte's time are: an H200's datasheet has 990 TFLOP/s of dense bf16 and 4.8 TB/s.
FLOPS_PER_BYTE = 206
# The rate of products by tiles over that of a library's GEMM, for divergences with a closed form and for others: in
# proportion to the FLOPs made of a byte from the second-level cache, 32 in tiles of 64 x 64, 21 in those of 64 x 32,
# and 85 in a library's 128 x 256.
TILE_RATE = {True: 0.375, False: 0.25}

_forced: str | None = None


@contextlib.contextmanager
def _going_by(way: str) -> Iterator[None]:
    """Makes all calls on a GPU go by "rows" or by "tiles", for tests and benchmarks."""
    global _forced
    before, _forced = _forced, way
    try:
        yield
    finally:
        _forced = before


def _gpu_ways() -> dict[str, Callable[[], contextlib.AbstractContextManager]]:
    """By rows with each row kernel that there is, and by tiles: contexts in which a call goes this way, by name."""

    @contextlib.contextmanager
    def by_rows(kernel: Callable[[], contextlib.AbstractContextManager]) -> Iterator[None]:
        with _going_by("rows"), kernel():
            yield

    ways: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
        f"rows-{name}": functools.partial(by_rows, kernel) for name, kernel in gpu_row_kernels().items()
    }
    return ways | {"tiles": functools.partial(_going_by, "tiles")}


def _by_tiles(student: _Head, teacher: _Head | None, gradients: bool, divergence: int) -> bool:
    """Whether a call goes by tiles: where the counts above say that it takes less time."""
    heads = [student] if teacher is None else [student, teacher]
    if _forced is not None:
        return _forced == "tiles"
    if not student.hidden.is_cuda or any(head.hidden.itemsize != 2 for head in heads):
        return False
    closed = divergence < divergence_code("jsd")
    looks = 2 if teacher is not None and not closed else 1
    flops = sum(2 * head.hidden.shape[1] for head in heads)
    by_rows = flops + FLOPS_PER_BYTE * 4 * len(heads) * (1 + looks + gradients)
    return flops * (looks + gradients) / TILE_RATE[closed] < by_rows


def _on_gpu(call: _Call, *objective: float) -> tuple[Tensor, ...]:
    divergence, _, temperature, kd_weight, ce_weight = objective
    lift = None
    if call.student.weight.dtype == torch.float16 and any(call.gradients):
        largest = call.coefficient.abs().amax() * (abs(kd_weight * temperature) + abs(ce_weight))
        lift = fp16_lift(largest, int(divergence))
    by_tiles = call.group is None and _by_tiles(call.student, call.teacher, any(call.gradients), int(divergence))
    return (_tiles if by_tiles else _rows)(call, lift, *objective)


# ---- forward, with the gradients ------------------------------------------------------------------------------------


def _linear_kl(
    student_hidden: Tensor,  # [T, Hs]
    student_weight: Tensor,  # [Vs, Hs]
    student_bias: Tensor | None,  # [Vs]
    teacher_hidden: Tensor | None,  # [T, Ht]
    teacher_weight: Tensor | None,  # [Vt, Ht]
    teacher_bias: Tensor | None,  # [Vt]
    coefficient: Tensor,  # [T] float64
    labels: Tensor | None,  # [T] int64
    sizes: Tensor,  # [3]: student_scale, teacher_scale, workspace_mb
    gradients: list[bool],  # of student_hidden, student_weight, student_bias
    divergence: int,
    numbers: Tensor,  # [4]: beta, temperature, kd_weight, ce_weight
    vocab_group: str = "",
    widest_shard: int = 0,
) -> tuple[Tensor, ...]:
    student_scale, teacher_scale, workspace_mb = sizes.tolist()
    workspace_bytes, objective = int(workspace_mb * 2**20), (divergence, *numbers.tolist())
    *_, kd_weight, ce_weight = objective
    group = group_by_name(vocab_group)
    vocabulary = student_weight.shape[0]
    if teacher_weight is not None:
        vocabulary = min(vocabulary, teacher_weight.shape[0])
    student, teacher = _Head(student_hidden, student_weight, student_bias, student_scale), None
    if teacher_weight is not None and kd_weight != 0:
        assert teacher_hidden is not None
        teacher = _Head(teacher_hidden, teacher_weight, teacher_bias, teacher_scale)
    labels = labels if ce_weight != 0 else None
    widest = vocabulary if group is None else widest_shard
    call = _Call(student, teacher, vocabulary, coefficient, labels, workspace_bytes, gradients, group, widest)
    if backend_for(student_hidden.device)[0] == "cpp":
        return _on_cpu(call, *objective)
    if coefficient.shape[0] == 0:
        return tuple(x.zero_() for x in _outputs(student_hidden, student_weight, student_bias, coefficient, gradients))
    return _on_gpu(call, *objective)


_library.impl("linear_kl", _linear_kl, "CompositeExplicitAutograd")

# ---- autograd.Function ----------------------------------------------------------------------------------------------


class LinearKL(Function):
    """The summed loss, a 0-d float64 tensor, and the gradients, which the forward pass computes.

    Arguments are those of ``torch.ops.fastkd.linear_kl``.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        loss, *gradients = torch.ops.fastkd.linear_kl(*arguments)
        return loss.sum(), *gradients

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output)
        ctx.dtypes = [inputs[1].dtype] * 3

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_: Tensor):
        loss, *saved = ctx.saved_tensors
        return _for_inputs(ctx, apply(Scaled, "linear_kl", loss, grad_loss, ctx.dtypes, *saved))


class LinearKLPerToken(Function):
    """Losses per token, [T] float64; the backward pass computes logits and gradients from the inputs.

    Arguments are those of ``torch.ops.fastkd.linear_kl``.
    """

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return torch.ops.fastkd.linear_kl(*arguments[:9], [False] * 3, *arguments[10:])[0]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, _, ctx.divergence, numbers = inputs[:12]
        ctx.save_for_backward(*tensors, numbers)
        ctx.shard = inputs[12:]

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        *tensors, coefficient, labels, sizes, numbers = ctx.saved_tensors
        inputs = (*tensors, coefficient * grad_loss, labels, sizes)
        constants = (ctx.needs_input_grad[:3], ctx.divergence, numbers, *ctx.shard)
        return _for_inputs(ctx, apply(_LinearKLGradient, "linear_kl", *inputs, *constants))


class _LinearKLGradient(Gradient):
    @staticmethod
    def forward(op: str, *arguments: Any) -> tuple[Tensor, ...]:
        _, *gradients = torch.ops.fastkd.linear_kl(*arguments)
        return tuple(gradient.to(arguments[1].dtype) for gradient in gradients)


def _for_inputs(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of the first three arguments, and None for the others."""
    needed = ctx.needs_input_grad
    wanted = [gradient if want else None for gradient, want in zip(gradients, needed, strict=False)]
    return *wanted, *(None,) * (len(needed) - len(wanted))


# ---- public function ------------------------------------------------------------------------------------------------


class _Inputs(NamedTuple):
    """The public function's tensors, checked, in the dtypes that autocast gives them, and of this rank alone."""

    student_hidden: Tensor  # [..., Hs]
    student_weight: Tensor  # [Vs, Hs]
    student_bias: Tensor | None  # [Vs]
    teacher_hidden: Tensor | None  # [..., Ht]
    teacher_weight: Tensor | None  # [Vt, Ht]
    teacher_bias: Tensor | None  # [Vt]


def _check_head(
    model: str, hidden: Any, weight: Any, bias: Any, leading: Any, device: torch.device, sharded: bool
) -> None:
    """Checks one model's hidden [..., H], weight [V, H] and bias [V]; a shard may be of no columns."""
    check_tensor(f"{model}_hidden", hidden, shape=None if leading is None else [*leading, None], floating=True)
    width = hidden.shape[-1] if hidden.dim() else 0
    if width == 0:
        raise ValueError(f"{model}_hidden: expected shape [..., H] with H > 0, got {list(hidden.shape)}")
    check_tensor(f"{model}_weight", weight, shape=[None, width], floating=True)
    if weight.shape[0] == 0 and not sharded:
        raise ValueError(f"{model}_weight: expected shape [V, {width}] with V > 0, got {list(weight.shape)}")
    named = [(f"{model}_hidden", hidden), (f"{model}_weight", weight)]
    if bias is not None:
        check_tensor(f"{model}_bias", bias, shape=[weight.shape[0]], floating=True)
        named.append((f"{model}_bias", bias))
    for name, tensor in named:
        check_same_device(name, tensor, device)
        if tensor.dtype != hidden.dtype:
            raise TypeError(f"{name}: expected dtype {hidden.dtype}, that of {model}_hidden, got {tensor.dtype}")


def _check_inputs(inputs: _Inputs, objective: Objective, tokens: TokenArguments, sharded: bool) -> _Inputs:
    """Checks the tensors and the keywords that go with them, and applies autocast."""
    check_tensor("student_hidden", inputs.student_hidden, floating=True)
    inputs = _Inputs(*autocast_like_linear(*inputs))
    inputs = _Inputs(*map(differentiable, inputs[:3]), *map(constant, inputs[3:]))
    leading, device = inputs.student_hidden.shape[:-1], inputs.student_hidden.device
    _check_head("student", *inputs[:3], None, device, sharded)
    vocabulary = inputs.student_weight.shape[0]
    if inputs.teacher_hidden is not None or inputs.teacher_weight is not None:
        _check_head("teacher", *inputs[3:], leading, device, sharded)
        assert inputs.teacher_weight is not None
        vocabulary = min(vocabulary, inputs.teacher_weight.shape[0])
    elif objective.kd_weight != 0:
        raise ValueError(f"teacher_hidden: expected a tensor because kd_weight is {objective.kd_weight}, got None")
    tokens.check(objective, leading, None if sharded else vocabulary, device)
    return inputs


def _flat(hidden: Tensor | None) -> Tensor | None:
    """Hidden states [T, H]"""
    return None if hidden is None else hidden.reshape(-1, hidden.shape[-1])


def _facts(
    inputs: _Inputs, objective: Objective, tokens: TokenArguments, fused: bool, keywords: dict[str, Any]
) -> Facts:
    """What this rank tells the others that hold a shard of the vocabulary."""
    hidden, teacher = inputs.student_hidden, inputs.teacher_hidden
    others = {
        **keywords,
        "reduction": tokens.reduction,
        "fused": fused,
        "dtype": hidden.dtype,
        "width": hidden.shape[-1],
        "device": hidden.device.type,
        "gradients": [wants_gradient(x) for x in inputs[:3]],
        "teacher": teacher is not None,
    }
    return Facts(
        objective,
        others,
        inputs.student_weight.shape[0],
        None if inputs.teacher_weight is None else inputs.teacher_weight.shape[0],
        tokens,
        _flat(hidden),
        _flat(teacher),
        tokens.coefficients(hidden.shape[:-1], hidden.device) != 0,
    )


def linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    workspace_mb: float | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    vocab_group: ProcessGroup | None = None,
    impl: str = "auto",
) -> Tensor:
    """Distillation loss from hidden states and vocabulary heads, without ever holding the logits.

    Equal to :func:`fastkd.logit_kl` on ``student_scale * student_hidden @ student_weight.T + student_bias`` and the
    teacher's logits likewise, with scores in float32 whatever the inputs' dtype (float64 for float64 students).

    Args:
        student_hidden: [..., Hs], the input of the student's head. Receives a gradient.
        student_weight: [Vs, Hs], ``lm_head.weight``, in the dtype of ``student_hidden``. Receives a gradient.
        teacher_hidden, teacher_weight: [..., Ht] with the same leading shape, and [Vt, Ht]; constants. May be None with
            ``kd_weight=0``, which makes this a fused linear cross-entropy.
        student_bias, teacher_bias: [Vs] and [Vt]. The student's receives a gradient.
        student_scale, teacher_scale: multiply the hidden states; T5 v1.0 has ``d_model ** -0.5``.
        workspace_mb: memory for the logits of the tokens in flight, in units of 2**20 bytes; default 128 on CPU, 768 on
            a GPU. At least one token is taken at a time. On a GPU the gradients of 16-bit logits are held for all
            tokens, beside it, where that takes no more than summing up the weight's gradient in float32 would.
        vocab_group: a ``torch.distributed`` process group over whose ranks the vocabulary is spread, of which
            ``student_weight``, ``teacher_weight`` and the biases are this rank's shards: contiguous, in the order of
            ranks, of any size, 0 included, and the same columns of both models as far as both have them. All other
            arguments are the same on all ranks, and labels count in the whole vocabulary. Every rank returns the loss
            of the whole vocabulary and, for ``student_hidden``, its gradient, summed up over the ranks already; those
            of ``student_weight`` and ``student_bias`` are of the shard. Heads that are DTensors, ``Shard(0)`` over a
            one-dimensional mesh, need no ``vocab_group``, and get gradients that are DTensors; what else is a DTensor
            has to be ``Replicate()``. Of a vocabulary that FSDP has sharded, over ranks of different data, gather the
            heads with ``.full_tensor()`` instead.

    With ``vocab_group`` every rank of the group has to make the call, and its backward pass, in the same grad mode. It
    sends 56 bytes for every token that is not dropped, 24 more for divergences other than forward and reverse KL, and
    ``4 * Hs`` for every token (``8 * Hs`` in float64) where ``student_hidden`` needs a gradient; with
    ``reduction="none"`` the backward pass sends all that again. An error on one rank is an error on all, for which the
    ranks exchange a hundred bytes first: on a GPU that waits for the device, so that such a call is no part of a CUDA
    graph, and ``torch.compile`` breaks its graph there.

    The other arguments, the result and the errors are those of :func:`fastkd.logit_kl`. Under ``torch.autocast`` the
    inputs are cast as ``F.linear`` casts them. With ``reduction="mean"`` or ``"sum"`` the gradients are computed in the
    forward pass and kept until the backward pass; with ``"none"`` the backward pass computes the logits again. On a GPU
    float32 inputs are multiplied as torch is set to: in TF32 only where ``torch.backends.cuda.matmul`` allows it.
    """
    heads = {
        "student_weight": student_weight,
        "student_bias": student_bias,
        "teacher_weight": teacher_weight,
        "teacher_bias": teacher_bias,
    }
    group = vocabulary_group(vocab_group, heads, 0)

    def check() -> tuple[_Inputs, Objective, TokenArguments, bool]:
        objective = Objective(divergence, beta, temperature, kd_weight, ce_weight)
        token_arguments = {"weight": weight, "labels": labels, "normalizer": normalizer}
        local = {name: differentiable(local_tensor(name, x)) for name, x in token_arguments.items()}
        tokens = TokenArguments(ignore_index=ignore_index, reduction=reduction, **local)
        check_number("student_scale", student_scale, "that is finite", is_finite)
        check_number("teacher_scale", teacher_scale, "that is finite", is_finite)
        if workspace_mb is not None:
            check_number("workspace_mb", workspace_mb, "> 0", lambda x: 0 < x < float("inf"))
        shards = heads if group is None else {name: shard_on(group, name, x, 0) for name, x in heads.items()}
        hidden = {"student_hidden": student_hidden, "teacher_hidden": teacher_hidden}
        whole = {name: local_tensor(name, x) for name, x in hidden.items()}
        inputs = _check_inputs(_Inputs(**whole, **shards), objective, tokens, group is not None)
        return inputs, objective, tokens, use_fused(impl, inputs.student_hidden.device)

    keywords = {"student_scale": student_scale, "teacher_scale": teacher_scale, "workspace_mb": workspace_mb}
    (inputs, objective, tokens, fused), shard = agree(group, check, lambda checked: _facts(*checked, keywords))

    leading, device = inputs.student_hidden.shape[:-1], inputs.student_hidden.device
    if not fused:
        return reference.linear_kl(
            **inputs._asdict(),
            student_scale=student_scale,
            teacher_scale=teacher_scale,
            shard=shard,
            **vars(objective),
            **vars(tokens),
        )

    flat_labels = tokens.flat_labels()
    wanted = tuple(wants_gradient(x) for x in inputs[:3])
    arguments = (
        _flat(inputs.student_hidden),
        inputs.student_weight,
        inputs.student_bias,
        _flat(inputs.teacher_hidden),
        inputs.teacher_weight,
        inputs.teacher_bias,
        tokens.coefficients(leading, device),
        flat_labels if shard is None else shard.local_labels(flat_labels),
        numbers(student_scale, teacher_scale, WORKSPACE_MB[device.type] if workspace_mb is None else workspace_mb),
        wanted,
        *(objective if shard is None else shard).for_op(),
    )
    if reduction == "none":
        loss = apply(LinearKLPerToken, *arguments).reshape(leading)
    else:
        loss, *_ = apply(LinearKL, *arguments)
    return loss if inputs.student_hidden.dtype == torch.float64 else loss.float()
