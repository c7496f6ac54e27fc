"""relation_kl, forward + backward: KL between self-attention relations softmax(X X.T / sqrt(d)) of both models.

The limit is the op's four batched GEMMs alone, in the best chunks (_attention.py): 2 B L^2 (Ht + 3 Hs) FLOPs, of which
padding and causality leave fewer. Their scores go through memory, which a GPU kernel does without: there the limit is
what tensor cores or exponential units need for it.

B batch, L length, A relation heads, Ht and Hs widths of all heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from benchmarks.harness.command import main
from benchmarks.harness.problem import Problem, Run, Target, both_ways, gradients, name_of, normals
from benchmarks.ops._attention import LIMITS, by_heads, floor, plain_kl, problem_of

TARGETS = (Target(LIMITS["cpu"], 1.25), Target("torch.compile", 0.5), Target("memory", 32))
GPU_TARGETS = (Target("of limit", 0.6), Target("torch.compile", 1.0))
LONG_TARGETS = (Target("memory", 64),)


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    length: int
    teacher_width: int
    student_width: int
    dtype: torch.dtype = torch.float32
    relations: int = 1  # 3: queries, keys and values
    divergence: str = "forward_kl"
    causal: bool = False
    padded: bool = False  # sequences of L / 4 to L positions
    converged: bool = False  # the student's scores are the teacher's within about 0.1

    def __str__(self) -> str:
        widths = f"{self.teacher_width // self.heads} -> {self.student_width // self.heads}"
        special = {
            "[Q, K, V]": self.relations == 3,
            self.divergence: self.divergence != "forward_kl",
            "causal": self.causal,
            "padded": self.padded,
            "student near teacher": self.converged,
        }
        title = f"relation_kl B {self.batch} A {self.heads} L {self.length} {widths} {name_of(self.dtype)}"
        return ", ".join([title, *(name for name, holds in special.items() if holds)])

    @property
    def lengths(self) -> list[tuple[int, int]]:
        shortest = self.length // 4 if self.padded else self.length
        return [(n, n) for n in torch.linspace(shortest, self.length, self.batch).long().tolist()]

    @property
    def positions(self) -> int:
        return self.relations * sum(n for n, _ in self.lengths)


def prepare(shape: Shape, device: torch.device) -> tuple[dict[str, Callable[[], Run]], Run]:
    B, L, A = shape.batch, shape.length, shape.heads
    normal = partial(normals(device), B, L)

    def pair() -> tuple[Tensor, Tensor]:
        student, teacher = normal(shape.student_width), normal(shape.teacher_width)
        if shape.converged:  # a narrower student comes near only a teacher that does not need its width
            per_head = (shape.teacher_width // A, shape.student_width // A)
            in_use = student.unflatten(-1, (A, -1)) * (per_head[0] / per_head[1]) ** 0.25  # against 1 / sqrt(d)
            teacher = F.pad(in_use, (0, per_head[0] - per_head[1])).flatten(2)
            student = student + 0.07 * normal(shape.student_width)
        return student.to(shape.dtype).requires_grad_(), teacher.to(shape.dtype)

    students, teachers = map(list, zip(*(pair() for _ in range(shape.relations)), strict=True))
    position = torch.arange(L, device=device)
    counts = torch.tensor([n for n, _ in shape.lengths], device=device)
    mask = position < counts[:, None] if shape.padded else None  # [B, L]
    options = {"num_heads": A, "causal": shape.causal, "divergence": shape.divergence}

    def ready(loss: Callable[..., Tensor]) -> Run:
        return gradients(loss, (students, teachers), students)

    def compiled() -> Run:
        allowed = mask[:, None, None, :] if mask is not None else None
        if shape.causal:
            seen = position <= position[:, None]
            allowed = seen if allowed is None else seen & allowed
        counted = None if mask is None else mask[:, None, :]

        def scores(x: Tensor) -> Tensor:
            x = by_heads(x, A)
            return (x @ x.transpose(-1, -2) / x.shape[-1] ** 0.5).float()

        @torch.compile(dynamic=False)
        def loss(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
            total = 0
            for student, teacher in zip(students, teachers, strict=True):
                with torch.no_grad():
                    target = scores(teacher)
                reverse = shape.divergence == "reverse_kl"
                total = total + plain_kl(scores(student), target, allowed, counted, reverse)
            return total / len(students)

        return ready(loss)

    def limit() -> Run:
        return floor([students[0]] * 2, [teachers[0]] * 2, A, shape.lengths, shape.causal, shape.relations)

    def oracle() -> tuple[Tensor, ...]:
        exact = [x.detach().double().requires_grad_() for x in students]
        for b in range(B):  # one sequence after the other
            loss = fastkd.relation_kl(
                [x[b : b + 1] for x in exact],
                [t[b : b + 1].double() for t in teachers],
                key_mask=None if mask is None else mask[b : b + 1],
                normalizer=float(counts.sum()),
                impl="reference",
                **options,
            )
            loss.backward()
        return tuple(x.grad for x in exact)

    by_fastkd = both_ways(partial(fastkd.relation_kl, key_mask=mask, **options), ready)
    return by_fastkd | {"torch.compile": compiled, LIMITS[device.type]: limit}, oracle


def problem(shape: Shape, device: torch.device, targets: tuple[Target, ...] = ()) -> Problem:
    return problem_of(shape, device, prepare, targets, shape.relations)


def problems(device: torch.device, quick: bool = False) -> list[Problem]:
    if quick:
        special = {"relations": 3, "divergence": "reverse_kl", "causal": True, "padded": True, "converged": True}
        return [problem(Shape(2, 4, 48, 64, 32, **special), device, TARGETS)]
    if device.type == "cuda":
        shapes = (Shape(32, 32, length, 768, 384, torch.bfloat16) for length in (512, 2048))
        return [problem(shape, device, GPU_TARGETS) for shape in shapes]
    shape = Shape(8, 12, 512, 768, 384)
    return [
        problem(shape, device, TARGETS),
        problem(replace(shape, causal=True), device),
        problem(replace(shape, padded=True), device),
        problem(replace(shape, converged=True), device),
        problem(replace(shape, divergence="reverse_kl"), device),
        problem(replace(shape, heads=32, relations=3), device),  # as MiniEnD has it
        problem(Shape(1, 2, 4096, 128, 64), device, LONG_TARGETS),
    ]


if __name__ == "__main__":
    main(problems, __doc__)
