"""linear_kl, forward + backward: vocabulary projections of both models and forward KL between their logits.

The limit is the op's GEMMs alone, in the inputs' dtype and at the best chunk size: 2 T V (Ht + 3 Hs) FLOPs.

On a GPU "fastkd" takes the row kernel that the library would; where there are two, a row for each is there to check the
choice. "eager" is what a training loop has where it does not call fastkd: logits in the
inputs' dtype, softmaxes in fp32. Errors are of all gradients, against fp64 of all tokens, some at a time.

T tokens, V vocabulary, Ht and Hs hidden widths.
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
from benchmarks.harness.memory import MIB
from benchmarks.harness.problem import (
    Problem,
    Run,
    Target,
    both_ways,
    gradients,
    held_to,
    name_of,
    normals,
    noted,
    on_gpu,
    peer,
)
from benchmarks.harness.timing import fastest
from fastkd.ops.drivers.divergence_rows import gpu_row_kernels

IMPLEMENTATIONS = ("fastkd", "reference", "torch.compile", "Liger")
GPU_ROWS = ("eager", "Liger, Triton", "orda-kernel")
LIMIT = "bare GEMMs"
CHUNKS = {"cpu": (256, 512, 1024), "cuda": (1024, 2048, 4096)}
TARGETS = (Target(LIMIT, 1.10), Target("torch.compile", 1.0), Target("Liger", 1.0), Target("memory", 130))


@dataclass(frozen=True)
class Shape:
    tokens: int
    vocabulary: int
    teacher_width: int
    student_width: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        widths = f"{self.teacher_width} -> {self.student_width}"
        return f"linear_kl T {self.tokens} V {self.vocabulary} {widths} {name_of(self.dtype)}"


def plain_loss(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> Tensor:
    """What a training loop has where it does not call fastkd."""
    log_q = F.log_softmax(F.linear(student_hidden, student_weight).float(), -1)
    with torch.no_grad():
        log_p = F.log_softmax(F.linear(teacher_hidden, teacher_weight).float(), -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def best_chunk(at: Callable[[int], Run], tokens: int, device: torch.device) -> Run:
    sizes = sorted({min(size, tokens) for size in CHUNKS[device.type]})
    chunk, run = fastest({str(size): at(size) for size in sizes}, device)
    return noted(run, f"chunks of {chunk}")


def liger(ready: Callable[[Callable[..., Tensor]], Run], tokens: int, device: torch.device) -> Run:
    """Its loss in chunks, compiled, which is its default and its fastest; its beta = 0 is KL(teacher || student)."""
    kind = peer("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    labels = torch.zeros(tokens, dtype=torch.long, device=device)  # only ignore_index is looked for in them

    def at(chunk: int) -> Run:
        loss = kind(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, chunk_size=chunk)
        return ready(lambda *x: loss(*x, labels))

    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):  # every chunk size gets code of its own
        return best_chunk(at, tokens, device)


def liger_in_triton(ready: Callable[[Callable[..., Tensor]], Run], device: torch.device) -> Run:
    on_gpu(device)
    loss = peer("liger_kernel.transformers", "LigerFusedLinearJSD")(jsd_beta=0.0)
    return ready(lambda *x: loss(*x, None))


def orda(ready: Callable[[Callable[..., Tensor]], Run], tokens: int, device: torch.device) -> Run:
    """Its Triton kernels; without a GPU it holds all logits."""
    loss, teacher = peer("orda_kernel", "distillation_loss"), peer("orda_kernel", "SeparateTeacher")
    labels = torch.zeros(tokens, dtype=torch.long, device=device)  # only ignore_index is looked for in them
    weights = {"student_ce_weight": 0.0, "teacher_ce_weight": 0.0, "kl_weight": 1.0}

    def of_both(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        return loss(hidden, weight, labels, teacher(hidden=teacher_hidden, weight=teacher_weight), **weights).loss

    return ready(of_both)


def gemms(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Run:
    T, V = len(student_hidden), len(student_weight)

    def at(chunk: int) -> Run:
        scores = student_hidden.new_zeros(2, chunk, V)
        hidden_grad, weight_grad = torch.zeros_like(student_hidden), torch.zeros_like(student_weight)

        @torch.no_grad()
        def run() -> tuple[Tensor, ...]:
            for start in range(0, T, chunk):
                rows = slice(start, min(start + chunk, T))
                student, teacher = scores[:, : rows.stop - rows.start]
                torch.mm(student_hidden[rows], student_weight.t(), out=student)
                torch.mm(teacher_hidden[rows], teacher_weight.t(), out=teacher)
                torch.mm(student, student_weight, out=hidden_grad[rows])
                weight_grad.addmm_(student.t(), student_hidden[rows], beta=0.5)  # 0.5: repeated runs stay finite
            return ()

        return run

    return best_chunk(at, T, student_hidden.device)


def exact(*inputs: Tensor) -> tuple[Tensor, ...]:
    """The gradients in fp64, some tokens at a time."""
    hidden, weight, fixed_hidden, fixed_weight = (x.detach().double() for x in inputs)
    hidden.requires_grad_()
    weight.requires_grad_()
    for start in range(0, len(hidden), 256):
        rows = slice(start, start + 256)
        arguments = hidden[rows], weight, fixed_hidden[rows], fixed_weight
        (fastkd.linear_kl(*arguments, reduction="sum", impl="reference") / len(hidden)).backward()
    assert hidden.grad is not None and weight.grad is not None
    return hidden.grad, weight.grad


def prepare(shape: Shape, device: torch.device) -> tuple[dict[str, Callable[[], Run]], Run]:
    normal = normals(device, shape.dtype)
    T, V, Ht, Hs = shape.tokens, shape.vocabulary, shape.teacher_width, shape.student_width
    student_hidden, teacher_hidden = normal(T, Hs).requires_grad_(), normal(T, Ht)
    # logits of standard deviation 3
    student_weight = normal(V, Hs, std=3 * Hs**-0.5).requires_grad_()
    teacher_weight = normal(V, Ht, std=3 * Ht**-0.5)
    inputs = (student_hidden, student_weight, teacher_hidden, teacher_weight)

    def ready(loss: Callable[..., Tensor]) -> Run:
        return gradients(loss, inputs, inputs[:2])

    rows = both_ways(fastkd.linear_kl, ready) | {
        "torch.compile": lambda: ready(torch.compile(plain_loss, dynamic=False)),
        "Liger": lambda: liger(ready, T, device),
        "eager": lambda: ready(plain_loss),
        "Liger, Triton": lambda: liger_in_triton(ready, device),
        "orda-kernel": lambda: orda(ready, T, device),
        LIMIT: lambda: gemms(*inputs),
    }
    for name, context in gpu_row_kernels().items():
        rows[f"fastkd, {name}"] = lambda context=context: held_to(context, rows["fastkd"]())
    return rows, partial(exact, *inputs)


def problem(shape: Shape, device: torch.device, targets: tuple[Target, ...] = ()) -> Problem:
    weights = shape.vocabulary * (shape.teacher_width + 2 * shape.student_width)  # both, and a gradient
    hidden = shape.tokens * (shape.teacher_width + 2 * shape.student_width)
    flops = 2 * shape.tokens * shape.vocabulary * (shape.teacher_width + 3 * shape.student_width)
    kernels = [f"fastkd, {name}" for name in gpu_row_kernels()]
    of_gpu = (*(kernels if len(kernels) > 1 else ()), *GPU_ROWS) if device.type == "cuda" else ()
    return Problem(
        title=str(shape),
        unit="GFLOP/s",
        work=flops,
        limit=LIMIT,
        implementations=(*IMPLEMENTATIONS, *of_gpu),
        prepare=partial(prepare, shape, device),
        targets=targets,
        counts=(flops, (weights + hidden) * shape.dtype.itemsize),
    )


def problems(device: torch.device, quick: bool = False) -> list[Problem]:
    if quick:
        return [problem(Shape(64, 1000, 48, 32), device, TARGETS)]
    if device.type == "cuda":
        large = Shape(8192, 128256, 4096, 4096, torch.bfloat16)
        narrow = Shape(16384, 32128, 768, 512, torch.bfloat16)
        odd = Shape(8192, 151643, 1024, 1024, torch.bfloat16)  # rows of scores are padded, so that they are aligned
        # chunks add up to the weight's gradient in fp32, which is counted with it
        memory = Target("memory", 1000 + 4 * large.vocabulary * large.student_width / MIB)
        return [
            problem(large, device, (Target("ms", 60), memory, Target("Liger", 1.0))),
            *(
                problem(shape, device, (Target("of limit", 0.6), Target("eager", 1.0)))
                for shape in (narrow, replace(large, tokens=1024), odd)
            ),
        ]
    shape = Shape(2048, 32128, 768, 512)
    return [problem(shape, device, TARGETS), problem(replace(shape, dtype=torch.bfloat16), device)]


if __name__ == "__main__":
    main(problems, __doc__)
