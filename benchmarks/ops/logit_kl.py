"""logit_kl: forward KL between logits that exist already, forward + backward and forward alone.

The limit is the bandwidth of a copy. The forward pass has to read both logits, the backward pass to read them again and
to write the gradient. On a GPU there is a row for each kernel of the row primitive.

T tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from benchmarks.harness.command import main
from benchmarks.harness.limits import copy_of
from benchmarks.harness.problem import (
    Problem,
    Run,
    Target,
    both_ways,
    gradients,
    held_to,
    name_of,
    normals,
    on_gpu,
    peer,
)
from fastkd.ops.drivers.divergence_rows import gpu_row_kernels

IMPLEMENTATIONS = ("fastkd", "reference", "torch.compile", "Liger")
LIMIT = "copy"
# Statistics of seven doubles a token, and what the system's page accounting is off by, come to less than 4 MiB.
TARGETS = (Target("torch.compile", 0.8), Target("memory", 4))
FORWARD_TARGETS = (Target("torch.compile", 0.4), Target("memory", 4))
GPU_TARGETS = (Target("of limit", 0.85), Target("torch.compile", 1.0), Target("memory", 4))


@dataclass(frozen=True)
class Shape:
    tokens: int
    vocabulary: int
    dtype: torch.dtype = torch.float32
    backward: bool = True
    converged: bool = False  # the student's logits are the teacher's within 0.1, which takes more careful arithmetic

    def __str__(self) -> str:
        passes = "forward + backward" if self.backward else "forward"
        near = ", student near teacher" if self.converged else ""
        return f"logit_kl T {self.tokens} V {self.vocabulary} {name_of(self.dtype)}, {passes}{near}"


def plain_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """What a training loop has where it does not call fastkd."""
    log_q, log_p = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def prepare(shape: Shape, device: torch.device) -> tuple[dict[str, Callable[[], Run]], Run]:
    normal = partial(normals(device, shape.dtype), shape.tokens, shape.vocabulary)
    teacher = normal(std=3.0)
    student = teacher + normal(std=0.1) if shape.converged else normal(std=3.0)
    student.requires_grad_(shape.backward)

    def ready(loss: Callable[..., Tensor]) -> Run:
        if shape.backward:
            return gradients(loss, (student, teacher), (student,))
        return lambda: (loss(student, teacher),)

    def liger() -> Run:
        on_gpu(device)
        loss = peer("liger_kernel.transformers", "LigerKLDIVLoss")(reduction="batchmean", log_target=True)
        return ready(lambda s, t: loss(F.log_softmax(s.float(), -1), F.log_softmax(t.float(), -1)))

    def oracle() -> tuple[Tensor, ...]:
        gradient = torch.empty(shape.tokens, shape.vocabulary, dtype=torch.float64, device=device)
        total = gradient.new_zeros(())
        for start in range(0, shape.tokens, 256):
            rows = slice(start, start + 256)
            scores = student[rows].detach().double().requires_grad_()
            loss = fastkd.logit_kl(scores, teacher[rows].double(), reduction="sum", impl="reference") / shape.tokens
            (gradient[rows],) = torch.autograd.grad(loss, (scores,))
            total += loss.detach()
        return (gradient,) if shape.backward else (total,)

    rows = both_ways(fastkd.logit_kl, ready) | {
        "torch.compile": lambda: ready(torch.compile(plain_loss, dynamic=False)),
        "Liger": liger,
        LIMIT: lambda: copy_of(teacher),
    }
    for name, context in gpu_row_kernels().items():
        rows[f"fastkd, {name}"] = lambda context=context: held_to(context, rows["fastkd"]())
    return rows, oracle


def problem(shape: Shape, device: torch.device, targets: tuple[Target, ...] = ()) -> Problem:
    logits_bytes = shape.tokens * shape.vocabulary * shape.dtype.itemsize
    work = (5 if shape.backward else 2) * logits_bytes
    kernels = [f"fastkd, {name}" for name in gpu_row_kernels()]
    if device.type != "cuda" or len(kernels) == 1:  # no choice
        kernels = []
    return Problem(
        title=str(shape),
        unit="GB/s",
        work=work,
        limit=LIMIT,
        limit_work=2 * logits_bytes,
        implementations=(*IMPLEMENTATIONS, *kernels),
        prepare=partial(prepare, shape, device),
        targets=targets,
        # of an element: two differences, exponentials and products, three sums; then those again, and a difference
        counts=((17 if shape.backward else 9) * shape.tokens * shape.vocabulary, work),
    )


def problems(device: torch.device, quick: bool = False) -> list[Problem]:
    if device.type == "cuda" and not quick:
        odd = Shape(4096, 151643, torch.bfloat16)  # no row begins at 16 bytes, but the first
        # a matrix is several times the second-level cache, and in fp64 still small
        sizes = itertools.product(
            ((8192, 32128), (4096, 128256), (2048, 256000)), (torch.float32, torch.bfloat16), (True, False)
        )
        shapes = [*(Shape(*size, dtype, backward) for size, dtype, backward in sizes), odd]
        return [problem(shape, device, GPU_TARGETS) for shape in shapes]
    tokens, vocabulary = (32, 1000) if quick else (2048, 32128)
    return [
        problem(Shape(tokens, vocabulary), device, TARGETS),
        problem(Shape(tokens, vocabulary, backward=False), device, FORWARD_TARGETS),
        problem(Shape(tokens, vocabulary, converged=True), device),
    ]


if __name__ == "__main__":
    main(problems, __doc__)
