"""logit_kl of a teacher known by its top-k, forward + backward: forward KL with a tail, between logits and K numbers.

The limit is the bandwidth of a copy. The forward pass has to read the student's logits, the backward pass to read them
again and to write their gradient. "eager" is what a training loop has where it does not call fastkd: log_softmax and
gather.

T tokens, V vocabulary, K entries of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from benchmarks.harness.command import main
from benchmarks.harness.limits import copy_of
from benchmarks.harness.problem import Problem, Run, Target, both_ways, gradients, name_of, normals

LIMIT = "copy"
IMPLEMENTATIONS = ("fastkd", "reference", "eager")
TARGETS = (Target("eager", 0.5),)
GPU_TARGETS = (Target("of limit", 0.7), Target("torch.compile", 1.0), *TARGETS)


@dataclass(frozen=True)
class Shape:
    tokens: int
    vocabulary: int
    entries: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return (
            f"logit_kl of a top-k teacher, T {self.tokens} V {self.vocabulary} K {self.entries} {name_of(self.dtype)}"
        )


def plain_loss(student: Tensor, ids: Tensor, log_probs: Tensor, reduction: str = "batchmean") -> Tensor:
    """KL over the ids and one bucket for the others, as one writes it."""
    log_q = F.log_softmax(student.float(), -1).gather(-1, ids)
    log_q, log_p = (torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], -1) for x in (log_q, log_probs))
    return F.kl_div(log_q, log_p, reduction=reduction, log_target=True)


def prepare(shape: Shape, device: torch.device) -> tuple[dict[str, Callable[[], Run]], Run]:
    normal = partial(normals(device, shape.dtype), shape.tokens, shape.vocabulary)
    student = normal(std=3.0).requires_grad_()
    log_probs, ids = F.log_softmax(normal(std=3.0).float(), -1).topk(shape.entries)
    topk = fastkd.TopK(ids, log_probs)

    def ready(*teacher: object) -> Callable[[Callable[..., Tensor]], Run]:
        return lambda loss: gradients(loss, (student, *teacher), (student,))

    def oracle() -> tuple[Tensor, ...]:
        gradient = torch.empty(shape.tokens, shape.vocabulary, dtype=torch.float64, device=device)
        for start in range(0, shape.tokens, 256):
            rows = slice(start, start + 256)
            scores = student[rows].detach().double().requires_grad_()
            teacher = fastkd.TopK(ids[rows], log_probs[rows].double())
            loss = fastkd.logit_kl(scores, teacher, reduction="sum", impl="reference") / shape.tokens
            (gradient[rows],) = torch.autograd.grad(loss, (scores,))
        return (gradient,)

    plain = ready(ids, log_probs)
    rows = both_ways(fastkd.logit_kl, ready(topk)) | {
        "eager": lambda: plain(plain_loss),
        "torch.compile": lambda: plain(torch.compile(plain_loss, dynamic=False)),
        LIMIT: lambda: copy_of(student.detach()),
    }
    return rows, oracle


def problem(shape: Shape, device: torch.device, targets: tuple[Target, ...] = ()) -> Problem:
    logits_bytes = shape.tokens * shape.vocabulary * shape.dtype.itemsize
    work = 3 * logits_bytes + shape.tokens * shape.entries * (8 + 4)
    return Problem(
        title=str(shape),
        unit="GB/s",
        work=work,
        limit=LIMIT,
        limit_work=2 * logits_bytes,
        implementations=(*IMPLEMENTATIONS, "torch.compile") if device.type == "cuda" else IMPLEMENTATIONS,
        prepare=partial(prepare, shape, device),
        targets=targets,
        # of an element: a difference, an exponential, a sum; then a difference, an exponential and a product
        counts=(6 * shape.tokens * shape.vocabulary, work),
    )


def problems(device: torch.device, quick: bool = False) -> list[Problem]:
    if quick:
        return [problem(Shape(64, 1000, 8), device, TARGETS)]
    if device.type == "cuda":
        dtypes = (torch.float32, torch.bfloat16)
        return [problem(Shape(4096, 128256, 64, dtype), device, GPU_TARGETS) for dtype in dtypes]
    return [problem(Shape(2048, 32128, 64), device, TARGETS)]


if __name__ == "__main__":
    main(problems, __doc__)
