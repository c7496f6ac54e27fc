"""cka_loss, forward + backward: 1 - CKA between hidden states of both models, over matched layers.

The limit is the op's five GEMMs alone, on tensors that are centred already and with nothing made of symmetry: B^T A,
A^T A, B^T B, B (B^T A), A (A^T A). fastkd can come below it. With few tokens it takes N x N Grams instead, whose five
GEMMs are smaller; "covariances" and "Grams" are fastkd held to one of the two, to show where they cross.

N tokens, Dt and Ds widths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch import Tensor

import fastkd
from benchmarks.harness.command import main
from benchmarks.harness.problem import (
    Problem,
    Run,
    Target,
    Unavailable,
    both_ways,
    gradients,
    held_to,
    name_of,
    normals,
)
from fastkd.ops import cka_loss as op

LIMIT = "five GEMMs"
IMPLEMENTATIONS = ("fastkd", "reference", "eager", "torch.compile", "ckatorch", "torch-cka")
FORMS = ("fastkd", "covariances", "Grams", "eager")
MOST_TOKENS = 4096  # of what holds N x N matrices: more take minutes
TARGETS = (Target(LIMIT, 0.95), Target("eager", 1.0), Target("torch.compile", 1.0), Target("memory", 48))
GPU_TARGETS = (Target("of limit", 0.6), Target("eager", 1.0))
SMALL_TARGETS = (Target("eager", 0.25), Target("memory", 48))


@dataclass(frozen=True)
class Shape:
    tokens: int
    teacher_width: int
    student_width: int
    pairs: int = 1
    dtype: torch.dtype = torch.float32
    padded: bool = False  # a quarter of the tokens is padding

    def __str__(self) -> str:
        pairs = f", {self.pairs} pairs" if self.pairs > 1 else ""
        widths = f"{self.teacher_width} -> {self.student_width}"
        return f"cka_loss N {self.tokens} {widths} {name_of(self.dtype)}{pairs}{', padded' if self.padded else ''}"

    @property
    def flops(self) -> int:
        """Of the five GEMMs."""
        Ds, Dt = self.student_width, self.teacher_width
        return 2 * self.pairs * self.tokens * (2 * Ds * Dt + Dt**2 + 2 * Ds**2)


def plain_cka(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """What a training loop has where it does not call fastkd."""
    student, teacher = student.float(), teacher.float()
    if mask is None:
        a, b = student - student.mean(0), teacher - teacher.mean(0)
    else:
        kept = mask.unsqueeze(1)
        a, b = ((x - (x * kept).sum(0) / kept.sum()) * kept for x in (student, teacher))
    cross, ours, theirs = (torch.linalg.matrix_norm(x.T @ y) for x, y in ((b, a), (a, a), (b, b)))
    return 1 - cross / ((ours + 1e-8) * (theirs + 1e-8)).sqrt()


def prepare(shape: Shape, device: torch.device) -> tuple[dict[str, Callable[[], Run]], Run]:
    normal = normals(device)

    def hidden(width: int, noise: float) -> Tensor:
        """Of rank 64 and noise, off the origin, as hidden states are."""
        base, mean = normal(64, width) / 8, normal(width)
        return (codes @ base + noise * normal(shape.tokens, width) + mean).to(shape.dtype)

    students, teachers = [], []
    for _ in range(shape.pairs):
        codes = normal(shape.tokens, 64)
        teachers.append(hidden(shape.teacher_width, 0.3))
        students.append(hidden(shape.student_width, 0.5).requires_grad_())
    mask = torch.arange(shape.tokens, device=device) % 4 != 3 if shape.padded else None

    def ready(loss: Callable[..., Tensor]) -> Run:
        return gradients(loss, (students, teachers), students)

    rows = both_ways(partial(fastkd.cka_loss, mask=mask), ready)

    def form(grams: bool) -> Run:
        if grams and shape.tokens > MOST_TOKENS:
            raise Unavailable(f"not run with more than {MOST_TOKENS} tokens")
        return held_to(lambda: mock.patch.object(op, "_by_grams", lambda tokens, widths: grams), rows["fastkd"]())

    def eager(one: Callable[..., Tensor] = plain_cka) -> Run:
        return ready(lambda *x: torch.stack([one(s, t, mask) for s, t in zip(*x, strict=True)]).sum())

    def ckatorch() -> Run:
        raise Unavailable("cannot: computes under torch.no_grad, so no gradients (1.0.3)")

    def torch_cka() -> Run:
        raise Unavailable("cannot: takes models, not tensors, and has .item() in it, so no gradients")

    def gemms() -> Run:
        pairs = [(x.detach(), t) for x, t in zip(students, teachers, strict=True)]

        @torch.no_grad()
        def run() -> tuple[Tensor, ...]:
            for a, b in pairs:
                torch.mm(b.T, b)
                torch.mm(b, torch.mm(b.T, a))
                torch.mm(a, torch.mm(a.T, a))
            return ()

        return run

    def oracle() -> tuple[Tensor, ...]:
        gradients = []
        for x, t in zip(students, teachers, strict=True):
            exact = x.detach().double().requires_grad_()
            loss = fastkd.cka_loss(exact, t.double(), mask=mask, impl="reference")
            gradients += torch.autograd.grad(loss, exact)
        return tuple(gradients)

    return rows | {
        "covariances": lambda: form(False),
        "Grams": lambda: form(True),
        "eager": eager,
        "torch.compile": lambda: eager(torch.compile(plain_cka, dynamic=False)),
        "ckatorch": ckatorch,
        "torch-cka": torch_cka,
        LIMIT: gemms,
    }, oracle


def problem(
    shape: Shape,
    device: torch.device,
    targets: tuple[Target, ...] = (),
    implementations: tuple[str, ...] = IMPLEMENTATIONS,
) -> Problem:
    return Problem(
        title=str(shape),
        unit="GFLOP/s",
        work=shape.flops,  # what it would take without symmetry, in whichever form
        limit=LIMIT,
        implementations=implementations,
        prepare=partial(prepare, shape, device),
        targets=targets,
        # forward and backward read both, and the gradient is written
        counts=(
            shape.flops,
            shape.pairs * shape.tokens * (2 * shape.teacher_width + 3 * shape.student_width) * shape.dtype.itemsize,
        ),
    )


def problems(device: torch.device, quick: bool = False) -> list[Problem]:
    if quick:
        return [problem(Shape(200, 48, 32, pairs=2, padded=True), device, TARGETS)]
    if device.type == "cuda":
        return [problem(Shape(16384, 768, 512, pairs=12, dtype=torch.bfloat16), device, GPU_TARGETS)]
    crossing = [Shape(tokens, 768, 512) for tokens in (64, 256, 512, 1024, 2048, 4096, 16384)]
    return [
        problem(Shape(8192, 768, 512, pairs=6), device, TARGETS),
        problem(Shape(8192, 768, 512, pairs=6, dtype=torch.bfloat16), device),
        problem(Shape(8192, 768, 512, padded=True), device),
        problem(Shape(64, 1024, 1024), device, SMALL_TARGETS),
        *(problem(shape, device, implementations=FORMS) for shape in crossing),
    ]


if __name__ == "__main__":
    main(problems, __doc__)
