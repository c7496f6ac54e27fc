"""attention_kl, forward + backward: KL between attention distributions of both models, with T5's bias or another.

The limit is the op's four batched GEMMs alone, in the best chunks (_attention.py): 2 B Lq Lk (Ht + 3 Hs) FLOPs, of
which causality leaves half. Their scores go through memory, which a GPU kernel does without: there the limit is what
tensor cores or exponential units need for it.

B batch, L length (Lq queries, Lk keys), A heads, Ht and Hs widths of all heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from benchmarks.harness.command import main
from benchmarks.harness.problem import Problem, Run, Target, both_ways, gradients, name_of, normals
from benchmarks.ops._attention import LIMITS, by_heads, floor, plain_kl, problem_of

BUCKETS, MAX_DISTANCE = 32, 128  # T5's
MEMORY = Target("memory", 40)
TARGETS = (Target(LIMITS["cpu"], 1.4), MEMORY)
GPU_TARGETS = (Target("of limit", 0.6), Target("torch.compile", 1.0))


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    queries: int
    keys: int
    teacher_width: int
    student_width: int
    bias: str = "T5's"  # "T5's" (both tables, the student's with a gradient), "dense" ([1, A, Lq, Lk] likewise) or "no"
    causal: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def lengths(self) -> list[tuple[int, int]]:
        return [(self.queries, self.keys)] * self.batch

    @property
    def positions(self) -> int:
        return self.batch * (self.queries + self.keys)

    def __str__(self) -> str:
        length = f"L {self.keys}" if self.queries == self.keys else f"Lq {self.queries} Lk {self.keys}"
        widths = f"{self.teacher_width // self.heads} -> {self.student_width // self.heads}"
        title = f"attention_kl B {self.batch} A {self.heads} {length} {widths} {name_of(self.dtype)}"
        return f"{title}, {self.bias} bias" + (", causal" if self.causal else "")


def prepare(shape: Shape, device: torch.device) -> tuple[dict[str, Callable[[], Run]], Run]:
    normal = normals(device, shape.dtype)
    B, A, queries, keys = shape.batch, shape.heads, shape.queries, shape.keys

    def queries_and_keys(width: int) -> list[Tensor]:  # T5 does not scale its scores: its queries are small instead
        return [normal(B, queries, width, std=(width // A) ** -0.5), normal(B, keys, width)]

    def bias() -> list[Tensor]:
        sizes = {"T5's": [(BUCKETS, A)], "dense": [(1, A, queries, keys)], "no": []}[shape.bias]
        return [normal(*size) for size in sizes]

    student = [x.requires_grad_() for x in queries_and_keys(shape.student_width) + bias()]
    teacher = queries_and_keys(shape.teacher_width) + bias()

    def relative(table: Tensor) -> fastkd.RelativeBias:
        return fastkd.RelativeBias(table, bidirectional=not shape.causal, max_distance=MAX_DISTANCE)

    def loss_by_fastkd(student: list[Tensor], teacher: list[Tensor], **options) -> Tensor:
        for name, (*_, bias) in (("student_bias", student), ("teacher_bias", teacher)):
            if shape.bias != "no":
                options[name] = relative(bias) if shape.bias == "T5's" else bias
        options |= {"num_heads": A, "student_scale": 1.0, "teacher_scale": 1.0, "causal": shape.causal}
        return fastkd.attention_kl(*student[:2], *teacher[:2], **options)

    def ready(loss: Callable[..., Tensor]) -> Run:
        return gradients(loss, (student, teacher), student)

    def compiled() -> Run:
        distance = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None]  # [Lq, Lk]
        bucket = relative(teacher[2]).bucket(distance) if shape.bias == "T5's" else None
        allowed = distance <= 0 if shape.causal else None

        def scores(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
            result = (by_heads(q, A) @ by_heads(k, A).transpose(-1, -2)).float()
            if bias is None:
                return result
            # a table is looked up as in T5Attention.compute_bias
            return result + (bias if bucket is None else F.embedding(bucket, bias).permute(2, 0, 1))

        @torch.compile(dynamic=False)
        def loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
            with torch.no_grad():
                target = scores(*teacher)
            return plain_kl(scores(*student), target, allowed, None)

        return ready(loss)

    def limit() -> Run:
        return floor(student[:2], teacher[:2], A, shape.lengths, shape.causal)

    def oracle() -> tuple[Tensor, ...]:
        exact, fixed = [x.detach().double().requires_grad_() for x in student], [x.double() for x in teacher]
        for b in range(B):  # one sequence after the other
            sequence = ([x[b : b + 1] for x in side[:2]] + side[2:] for side in (exact, fixed))
            loss_by_fastkd(*sequence, normalizer=float(B * queries), impl="reference").backward()
        return tuple(x.grad for x in exact)

    rows = both_ways(loss_by_fastkd, ready) | {"torch.compile": compiled, LIMITS[device.type]: limit}
    return rows, oracle


def problem(shape: Shape, device: torch.device, targets: tuple[Target, ...] = ()) -> Problem:
    return problem_of(shape, device, prepare, targets)


def problems(device: torch.device, quick: bool = False) -> list[Problem]:
    if quick:
        shape = Shape(2, 4, 48, 48, 64, 32)
        return [
            problem(replace(shape, causal=True), device, TARGETS),
            problem(replace(shape, queries=20, bias="dense"), device),
        ]
    if device.type == "cuda":
        shapes = (Shape(32, 12, length, length, 768, 768, dtype=torch.bfloat16) for length in (512, 2048))
        return [problem(shape, device, GPU_TARGETS) for shape in shapes]
    shape = Shape(8, 12, 512, 512, 768, 384)
    return [
        problem(shape, device, TARGETS),
        problem(replace(shape, causal=True), device),
        problem(replace(shape, queries=128, bias="no"), device),  # cross-attention
        problem(replace(shape, bias="dense"), device, (MEMORY,)),
    ]


if __name__ == "__main__":
    main(problems, __doc__)
