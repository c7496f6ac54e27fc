"""linear_kl of a teacher known by its top-k, forward + backward: one vocabulary projection, forward KL with a tail.

The limit is the op's GEMMs alone, in the inputs' dtype and at the best chunk size: 6 T V Hs FLOPs. The rows called
dense are beside it for their time: they have the teacher's hidden states and head in place of its top-k, so one GEMM
more, and the teacher's half of the scores. "eager" is what a training loop has where it does not call fastkd: logits,
log_softmax, gather; "chunks, checkpointed" the same of some tokens at a time, whose logits are computed again in the
backward pass, which is how trainers of large models hold the memory down. Errors are of all gradients, against fp64 of
all tokens, some at a time.

T tokens, V vocabulary, K entries of the teacher, Ht and Hs hidden widths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastkd
from benchmarks.harness.command import main
from benchmarks.harness.problem import (
    Problem,
    Run,
    Target,
    both_ways,
    gradients,
    name_of,
    normals,
    of_another_objective,
)
from benchmarks.ops.linear_kl import best_chunk, liger
from benchmarks.ops.logit_kl_topk import plain_loss as of_logits

DENSE, CHECKPOINTED = "fastkd, dense", "chunks, checkpointed"
IMPLEMENTATIONS = ("fastkd", "reference", DENSE, "eager", CHECKPOINTED, "Liger, dense")
LIMIT = "bare GEMMs"
TARGETS = (Target(LIMIT, 1.10), Target(DENSE, 0.72), Target("eager", 0.5), Target("memory / eager", 0.15))


@dataclass(frozen=True)
class Shape:
    tokens: int
    vocabulary: int
    entries: int
    teacher_width: int  # of the rows called dense
    student_width: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        sizes = f"T {self.tokens} V {self.vocabulary} K {self.entries} {self.student_width}"
        return f"linear_kl of a top-k teacher, {sizes} {name_of(self.dtype)}"


def plain_loss(hidden: Tensor, weight: Tensor, *teacher: Tensor) -> Tensor:
    return of_logits(F.linear(hidden, weight), *teacher)


def plain_sum(hidden: Tensor, weight: Tensor, *teacher: Tensor) -> Tensor:
    return of_logits(F.linear(hidden, weight), *teacher, reduction="sum")


def checkpointed(ready: Callable[[Callable[..., Tensor]], Run], tokens: int, device: torch.device) -> Run:
    def at(chunk: int) -> Run:
        def loss(hidden: Tensor, weight: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
            parts = zip(*(x.split(chunk) for x in (hidden, ids, log_probs)), strict=True)
            losses = [checkpoint(plain_sum, h, weight, i, p, use_reentrant=False) for h, i, p in parts]
            return torch.stack(losses).sum() / tokens

        return ready(loss)

    return best_chunk(at, tokens, device)


def gemms(hidden: Tensor, weight: Tensor) -> Run:
    T, V = len(hidden), len(weight)

    def at(chunk: int) -> Run:
        scores = hidden.new_zeros(chunk, V)
        hidden_grad, weight_grad = torch.zeros_like(hidden), torch.zeros_like(weight)

        @torch.no_grad()
        def run() -> tuple[Tensor, ...]:
            for start in range(0, T, chunk):
                rows = slice(start, min(start + chunk, T))
                student = scores[: rows.stop - rows.start]
                torch.mm(hidden[rows], weight.t(), out=student)
                torch.mm(student, weight, out=hidden_grad[rows])
                weight_grad.addmm_(student.t(), hidden[rows], beta=0.5)  # 0.5: repeated runs stay finite
            return ()

        return run

    return best_chunk(at, T, hidden.device)


def exact(hidden: Tensor, weight: Tensor, ids: Tensor, log_probs: Tensor) -> tuple[Tensor, ...]:
    """The gradients in fp64, some tokens at a time."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    for start in range(0, len(hidden), 256):
        rows = slice(start, start + 256)
        teacher = fastkd.TopK(ids[rows], log_probs[rows].double())
        (fastkd.linear_kl(hidden[rows], weight, teacher, reduction="sum", impl="reference") / len(hidden)).backward()
    assert hidden.grad is not None and weight.grad is not None
    return hidden.grad, weight.grad


def prepare(shape: Shape, device: torch.device) -> tuple[dict[str, Callable[[], Run]], Run]:
    normal = normals(device, shape.dtype)
    T, V, Ht, Hs = shape.tokens, shape.vocabulary, shape.teacher_width, shape.student_width
    hidden, teacher_hidden = normal(T, Hs).requires_grad_(), normal(T, Ht)
    # logits of standard deviation 3
    weight = normal(V, Hs, std=3 * Hs**-0.5).requires_grad_()
    teacher_weight = normal(V, Ht, std=3 * Ht**-0.5)
    log_probs, ids = F.log_softmax(F.linear(teacher_hidden, teacher_weight).float(), -1).topk(shape.entries)
    topk = fastkd.TopK(ids, log_probs)

    def ready(*teacher: object) -> Callable[[Callable[..., Tensor]], Run]:
        return lambda loss: gradients(loss, (hidden, weight, *teacher), (hidden, weight))

    dense, plain = ready(teacher_hidden, teacher_weight), ready(ids, log_probs)
    rows = both_ways(fastkd.linear_kl, ready(topk)) | {
        DENSE: lambda: of_another_objective(dense(partial(fastkd.linear_kl, impl="fused"))),
        "eager": lambda: plain(plain_loss),
        CHECKPOINTED: lambda: checkpointed(plain, T, device),
        "Liger, dense": lambda: of_another_objective(liger(dense, T, device)),
        LIMIT: lambda: gemms(hidden, weight),
    }
    return rows, partial(exact, hidden, weight, ids, log_probs)


def problem(shape: Shape, device: torch.device, targets: tuple[Target, ...] = ()) -> Problem:
    flops = 6 * shape.tokens * shape.vocabulary * shape.student_width
    numbers = 2 * shape.student_width * (shape.tokens + shape.vocabulary)  # inputs and gradients
    entries = shape.tokens * shape.entries * (8 + 4)
    return Problem(
        title=str(shape),
        unit="GFLOP/s",
        work=flops,
        limit=LIMIT,
        implementations=IMPLEMENTATIONS,
        prepare=partial(prepare, shape, device),
        targets=targets,
        counts=(flops, numbers * shape.dtype.itemsize + entries),
    )


def problems(device: torch.device, quick: bool = False) -> list[Problem]:
    if quick:
        return [problem(Shape(64, 1000, 8, 48, 32), device, TARGETS)]
    if device.type == "cuda":
        return [problem(Shape(8192, 128256, 64, 4096, 4096, torch.bfloat16), device)]
    return [problem(Shape(2048, 32128, 64, 768, 512), device, (*TARGETS, Target("memory", 80)))]


if __name__ == "__main__":
    main(problems, __doc__)
