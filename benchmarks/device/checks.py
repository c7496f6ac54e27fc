"""Whether kernels are right: each against the reference in fp64 on the same device, with the bounds of the tests.

Of each case one run has every empty tensor filled with NaN, which shows what no kernel has written; five more agree to
the bit; a CUDA graph replays it with other inputs; on a side stream inputs come late.

`python -m benchmarks.device.checks` is one of the processes that share the cases: it is told them by name.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from benchmarks.device.phases import Here, Skipped
from benchmarks.device.pool import Worker, answers, serve
from fastkd.divergence import DIVERGENCES
from tests import interpreter
from tests.cases import (
    CKA_LOSS,
    DIVERGENCE_OPS,
    LINEAR_KL,
    LOGIT_KL,
    OPS,
    ROUNDING,
    SMALLEST,
    TOKEN_OPS,
    Op,
    distance,
    running_on,
    to,
)
from tests.place import Place, arguments, same, value_and_gradients
from tests.sanitize import ways

WORKERS, CASE_S = 8, 40  # compiling is most of a case
REPEATS = 5


def _top(logits: Tensor) -> fastkd.TopK:
    """In fp64, so that both sides of a comparison have the same teacher."""
    log_probs, indices = logits.double().log_softmax(-1).topk(8, -1)
    return fastkd.TopK(indices, log_probs.float())


def _logit_topk(student_logits: Tensor, teacher_logits: Tensor, **options: Any) -> Any:
    return fastkd.logit_kl(student_logits, _top(teacher_logits), **options)


def _linear_topk(teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Tensor, **options: Any) -> Any:
    teacher = _top(teacher_hidden.double() @ teacher_weight.double().T + teacher_bias.double())
    return fastkd.linear_kl(teacher_hidden=teacher, **options)


TOP_OPS = [
    Op("logit_kl of a TopK", _logit_topk, LOGIT_KL.make, LOGIT_KL.student),
    Op("linear_kl of a TopK", _linear_topk, LINEAR_KL.make, LINEAR_KL.student),
]
BY_NAME = {op.name: op for op in [*OPS, *TOP_OPS]}
LINEAR_OPS = [LINEAR_KL, TOP_OPS[1]]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Case:
    op: str
    way: str
    dtype: str
    divergence: str

    @property
    def name(self) -> str:
        return "; ".join((self.op, self.way, self.dtype, self.divergence))


def cases(rows: str, rehearsed: bool) -> list[Case]:
    """Those of ops on kernels of rows of this name; the usual dtype and divergence first, should time be short."""
    ops = TOKEN_OPS if rows == "cuda" else [*OPS, *TOP_OPS]
    dtypes, divergences = list(DTYPES), list(DIVERGENCES)
    if rehearsed:
        dtypes, divergences = ["float32"], ["forward_kl"]
    found = []
    for dtype in dtypes:
        if rows == "cuda" and dtype == "float64":  # which has no such kernel
            continue
        for i, divergence in enumerate(divergences[:1] if dtype == "float64" else divergences):
            for op in ops:
                way = rows if op in TOKEN_OPS else ""
                if op in (*DIVERGENCE_OPS, *TOP_OPS):
                    found.append(Case(op.name, way, dtype, divergence))
                elif i == 0:
                    found.append(Case(op.name, way, dtype, "-"))
    return found


# ---- one case --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def sums_in_bf16(allowed: bool) -> Iterator[None]:
    """Whether GEMMs that write bf16 may add up parts of their sums in bf16: torch lets them unless told otherwise."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_bf16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction, allowed
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


@contextlib.contextmanager
def empties_of_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # which has torch.empty filled
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def errors(op: Op, inputs: dict[str, Tensor], got: Sequence[Tensor], options: dict) -> Iterator[tuple[float, float]]:
    """(error, bound) of the loss and of each gradient."""
    device, dtype = next((x.device, x.dtype) for x in inputs.values())
    exact = value_and_gradients(op, to(inputs, torch.float64, device), "reference", **options)
    if dtype == torch.float64:
        yield from ((distance(x, y), 1e-10) for x, y in zip(got, exact, strict=True))
        return
    plain = value_and_gradients(op, to(inputs, torch.float32, device), "reference", **options)
    smallest = 3e-8 / exact[0].abs().item()
    yield distance(got[0], exact[0]), max(1e-6, 2 * distance(plain[0], exact[0])) + smallest
    least = 5e-5 if op is CKA_LOSS else 1e-5
    for x, y, other in zip(got[1:], exact[1:], plain[1:], strict=True):
        rounding = 2 * ROUNDING[dtype] + SMALLEST[dtype] * y.numel() ** 0.5 / y.norm().item()
        yield distance(x, y), max(least, 2.5 * distance(other, y)) + rounding


def examine(case: Case, place: Place) -> dict:
    op, dtype = BY_NAME[case.op], DTYPES[case.dtype]
    torch.manual_seed(0)
    inputs, options = arguments(op, place, dtype)
    torch.manual_seed(1)
    others, _ = arguments(op, place, dtype)
    if case.divergence != "-":
        options["divergence"] = case.divergence
    # libraries may choose other GEMMs
    near = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 2 * ROUNDING[dtype])
    problems = []

    def agree(what: str, got: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
        furthest = max(distance(x, y) for x, y in zip(got, wanted, strict=True))
        if not furthest <= near:
            problems.append(f"{what}: {furthest:.1e} away")

    def run() -> tuple[Tensor, ...]:
        return value_and_gradients(op, inputs, **options)

    with ways(op)[case.way]() if case.way else contextlib.nullcontext():
        first = run()
        if not all(same(run(), first) for _ in range(REPEATS)):
            problems.append("repeats differ")
        if op in LINEAR_OPS:
            with sums_in_bf16(allowed=False):
                alone = run()
            if not same(alone[1:2], first[1:2]):
                problems.append("hidden states' gradient: added up in bf16")
        with empties_of_nan():
            filled = run()
        found = list(errors(op, inputs, filled, options))
        problems += [
            f"{i}: error {error:.1e} over {bound:.1e}" for i, (error, bound) in enumerate(found) if not error <= bound
        ]
        agree("without NaN in empties", first, filled)
        wanted = value_and_gradients(op, others, **options)
        replay = place.captured(run)
        with place.another_stream():
            for name, x in inputs.items():
                x.copy_(others[name])
            late = run()
        agree("side stream", late, wanted)
        agree("graph", [x.clone() for x in replay()], wanted)
    place.synchronize()
    error, bound = max(found, key=lambda pair: pair[0] / pair[1])
    return {"error": error, "bound": bound, "problem": "; ".join(problems) or None}


# ---- all of them -----------------------------------------------------------------------------------------------------


def _count(counts: dict[str, int], **told: Any) -> None:
    counts["hits" if told["cache_hit"] else "misses"] += 1


def counting() -> dict[str, int]:
    """How many of Triton's binaries were there, and how many are compiled, from now on."""
    from triton import knobs

    counts = {"hits": 0, "misses": 0}
    knobs.compilation.listener = partial(_count, counts)
    return counts


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpreter.adapt(pytest.MonkeyPatch())
    with running_on("triton") as (_, device):
        place = Place(torch.device("cuda", 0) if device.type == "cuda" else device)
        serve(lambda name: examine(Case(*name.split("; ")), place), counting())


def check(here: Here, names: Sequence[str]) -> bool:
    """Whether all cases are right; what was not reached is not."""
    start: Callable[[], Worker] = partial(Worker, [sys.executable, "-m", "benchmarks.device.checks"])
    seen, wrong, hits, misses = 0, 0, 0, 0
    for answer in answers(names, start, 2 if here.rehearsed else WORKERS, CASE_S, here.end):
        here.lines.write("check", **answer)
        print(f"{answer['case']}: {answer['problem'] or 'right'}", flush=True)
        seen, wrong = seen + 1, wrong + (answer["problem"] is not None)
        hits, misses = hits + answer.get("hits", 0), misses + answer.get("misses", 0)
    here.lines.write("checked", right=seen - wrong, wrong=wrong, left=len(names) - seen)
    here.lines.write("cache", hits=hits, misses=misses)
    return wrong == 0 and seen == len(names)


def triton(here: Here) -> bool:
    return check(here, [case.name for case in cases("triton", here.rehearsed)])


def cuda(here: Here) -> bool:
    if "cuda" not in ways(LOGIT_KL):
        raise Skipped("the extension has no CUDA kernels here; tests/emulated runs them on a CPU's threads")
    return check(here, [case.name for case in cases("cuda", here.rehearsed)])


if __name__ == "__main__":
    main()
