"""What the benchmarks of relation_kl and attention_kl have in common: the loss as plain lines, and its GEMMs alone.

B batch, L length (Lq queries, Lk keys), A heads, H width, d = H / A head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.limits import roofline
from benchmarks.harness.problem import Problem, Run, Target, noted
from benchmarks.harness.timing import fastest

# No library has either op. TextBrewer's losses between attention matrices are plain torch lines on [B, A, L, L] scores,
# as "reference" and, compiled, "torch.compile" are.
IMPLEMENTATIONS = ("fastkd", "reference", "torch.compile")
LIMITS = {"cpu": "GEMMs", "cuda": "roofline"}
HEADS, ROWS = (2, 4, 12), (128, 256, 512)  # of a chunk


def by_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, L, H] as [B, A, L, d]"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def plain_kl(
    student: Tensor,  # scores [B, A, Lq, Lk]
    teacher: Tensor,
    allowed: Tensor | None,  # broadcasts to the scores
    counted: Tensor | None,  # rows [B, 1, Lq]
    reverse: bool = False,
) -> Tensor:
    """What a training loop has where it does not call fastkd; to be compiled."""
    if allowed is not None:
        # not -inf, which kl_div makes NaN of
        student, teacher = (x.masked_fill(~allowed, torch.finfo(x.dtype).min) for x in (student, teacher))
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    if reverse:
        log_q, log_p = log_p, log_q
    loss = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return loss.mean() if counted is None else (loss * counted).sum() / (counted.sum() * loss.shape[1])


def pairs(lengths: Sequence[tuple[int, int]], causal: bool) -> int:
    """Scores that count in each head, of sequences of (Lq, Lk)."""
    return sum(queries * (queries + 1) // 2 if causal else queries * keys for queries, keys in lengths)


def problem_of(
    shape: Any,
    device: torch.device,
    prepare: Callable[..., Any],
    targets: tuple[Target, ...],
    times: int = 1,
) -> Problem:
    """Its work is that of the GEMMs: the scores of both models and the student's two gradients."""
    # What causality hides counts neither for fastkd nor for the limit, though chunks on the diagonal compute it.
    work = 2 * times * pairs(shape.lengths, shape.causal) * (shape.teacher_width + 3 * shape.student_width)
    widths = shape.teacher_width + 2 * shape.student_width  # both, and the student's gradients
    return Problem(
        title=str(shape),
        unit="GFLOP/s",
        work=work,
        limit=LIMITS[device.type],
        implementations=IMPLEMENTATIONS,
        prepare=partial(prepare, shape, device),
        targets=targets,
        counts=(work, shape.positions * widths * shape.dtype.itemsize),
    )


def floor(
    student: Sequence[Tensor],  # queries [B, Lq, Hs], keys [B, Lk, Hs]
    teacher: Sequence[Tensor],
    num_heads: int,
    lengths: Sequence[tuple[int, int]],  # (Lq, Lk) of each sequence without its padding
    causal: bool,
    times: int = 1,
) -> Run:
    """The limit on this device."""
    if student[0].is_cuda:
        return in_registers(lengths, causal, student[0], teacher[0], num_heads, times)
    return gemms(*student, *teacher, num_heads, lengths, causal, times)


def in_registers(
    lengths: Sequence[tuple[int, int]], causal: bool, student: Tensor, teacher: Tensor, num_heads: int, times: int
) -> Run:
    """The limit on a GPU: tensor cores or exponential units, whichever take longer.

    Nothing of [Lq, Lk] is kept, so that both models' scores and exponentials are computed twice: once for what a row
    sums up to, once for the gradient. Head widths are counted as they are, though tensor cores take multiples of 16.
    """
    count = times * pairs(lengths, causal)
    products = 2 * count * (2 * teacher.shape[-1] + 4 * student.shape[-1])
    return roofline(products, 4 * count * num_heads, student.dtype, student.device)


def gemms(
    student_q: Tensor,  # [B, Lq, Hs]
    student_k: Tensor,  # [B, Lk, Hs]
    teacher_q: Tensor,  # [B, Lq, Ht]
    teacher_k: Tensor,  # [B, Lk, Ht]
    num_heads: int,
    lengths: Sequence[tuple[int, int]],
    causal: bool,
    times: int,
) -> Run:
    """The op's four GEMMs and nothing else, in the fastest chunks: scores of both models, G K and G.T Q.

    Chunks do without padding, and without the keys that causality hides from all their rows. For relations, fastkd has
    one GEMM less where a chunk holds whole ones, (G + G.T) X, so that it may come below this.
    """
    tensors = (student_q, student_k, teacher_q, teacher_k)
    student_q, student_k, teacher_q, teacher_k = (by_heads(x.detach(), num_heads) for x in tensors)
    most_queries, most_keys = (max(sizes) for sizes in zip(*lengths, strict=True))

    def at(heads: int, rows: int, transposed: bool) -> Run:
        width = student_q.shape[-1]
        scores = student_q.new_empty(2, heads * rows * most_keys)
        gradients = student_q.new_empty(2, heads * max(rows, most_keys) * width)

        def first(buffer: Tensor, *shape: int) -> Tensor:
            return buffer[: torch.Size(shape).numel()].view(shape)

        @torch.no_grad()
        def run() -> tuple[Tensor, ...]:
            for b, (queries, keys) in enumerate(lengths):
                for head, row in itertools.product(range(0, num_heads, heads), range(0, queries, rows)):
                    end = min(row + rows, queries)
                    of_q = (b, slice(head, head + heads), slice(row, end))
                    of_k = (b, slice(head, head + heads), slice(0, end if causal else keys))
                    q, k = student_q[of_q], student_k[of_k]  # [heads, rows, d], [heads, keys, d]
                    student, teacher = (first(x, *q.shape[:2], k.shape[1]) for x in scores)
                    torch.bmm(q, k.transpose(1, 2), out=student)
                    torch.bmm(teacher_q[of_q], teacher_k[of_k].transpose(1, 2), out=teacher)
                    torch.bmm(student, k, out=first(gradients[0], *q.shape))
                    if transposed:
                        torch.bmm(q.transpose(1, 2), student, out=first(gradients[1], *k.transpose(1, 2).shape))
                    else:
                        torch.bmm(student.transpose(1, 2), q, out=first(gradients[1], *k.shape))
            return ()

        return run

    candidates = {
        f"chunks of {heads} x {rows} rows" + (", Q.T G" if transposed else ", G.T Q"): at(heads, rows, transposed)
        for heads in sorted({min(size, num_heads) for size in HEADS})
        for rows in sorted({min(size, most_queries) for size in ROWS})
        for transposed in (True, False)
    }
    name, run = fastest(candidates, student_q.device)
    return noted(lambda: tuple(x for _ in range(times) for x in run()), name)
