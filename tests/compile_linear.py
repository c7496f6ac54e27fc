"""Compiles kernels/linear_kl.py for GPUs that need not be here, and tells what each binary uses of them.

    python -m tests.compile_linear                     # the table of what test_compile_gpu.py checks
    python -m tests.compile_linear --all               # every divergence, dtype and target
    python -m tests.compile_linear --all --target sm_80

As in tests/compile_attention.py, kernels are compiled as their launches specialise them, and not started.
"""

from __future__ import annotations

import itertools

import torch

import fastkd.functions  # noqa: F401  # registers the operators
from fastkd.backend import interpret_triton
from fastkd.checks import Objective, numbers
from fastkd.divergence import DIVERGENCES
from fastkd.ops.drivers.linear_kl_gpu import _going_by

from .compile_common import DTYPES, TARGETS, in_parallel, launches, main, of_launch

TOKENS, VOCABULARY, WIDTHS = 256, 32128, (512, 768)
MIX = dict.fromkeys(DIVERGENCES, 0.5)  # all members, which takes the most registers


def call(dtype: torch.dtype, divergence: str, options: str) -> None:
    """Losses and gradients: "plain", with "labels", biases and a temperature, or of "labels" alone."""
    (width_s, width_t), ce = WIDTHS, options != "plain"
    student, student_weight = torch.empty(TOKENS, width_s, dtype=dtype), torch.empty(VOCABULARY, width_s, dtype=dtype)
    teacher, teacher_weight = torch.empty(TOKENS, width_t, dtype=dtype), torch.empty(VOCABULARY, width_t, dtype=dtype)
    bias = torch.empty(VOCABULARY, dtype=dtype) if ce else None
    objective = Objective(
        MIX if divergence == "mix" else divergence, 0.5, 2.0 if ce else 1.0, float(options != "labels alone"), float(ce)
    )
    with interpret_triton(), _going_by("tiles"):  # sends CPU tensors to kernels, which `launches` does not start
        torch.ops.fastkd.linear_kl(
            student, student_weight, bias, teacher, teacher_weight, bias, torch.ones(TOKENS).double(),
            torch.zeros(TOKENS, dtype=torch.int64), numbers(1.0, 1.0, 0.0, 0.0, 1024.0), [True, False, False],
            *objective.for_op(),
        )  # fmt: skip


def measure(case: tuple) -> list[dict]:
    """Compiles one case: (target, dtype, divergence, options)."""
    target, dtype, *rest = case
    with launches(target) as found:
        call(DTYPES[dtype], *rest)
    named = dict(zip(("target", "dtype", "divergence", "options"), case, strict=True))
    return [{**named, "kernel": kernel, **of_launch(target, binary, options)} for kernel, binary, options in found]


def chosen() -> list[tuple]:
    """What the tests compile: on sm_90 the variety, elsewhere what is most likely to spill."""
    cases = [("sm_90", "bf16", name, "labels") for name in DIVERGENCES]
    cases += [("sm_90", "fp16", "forward_kl", "plain"), ("sm_90", "bf16", "forward_kl", "labels alone")]
    cases += [
        (target, "bf16", name, "labels") for target in ("sm_80", "sm_100", "gfx942") for name in ("forward_kl", "jsd")
    ]
    return [*cases, ("sm_90", "fp32", "forward_kl", "plain"), ("sm_90", "bf16", "mix", "labels")]


def everything() -> list[tuple]:
    cases = list(itertools.product(TARGETS, DTYPES, DIVERGENCES, ("plain", "labels")))
    return cases + [(target, dtype, "forward_kl", "labels alone") for target in TARGETS for dtype in DTYPES]


def table(results: list[dict]) -> str:
    lines = [
        f"{'target':8}{'kernel':16}{'dtype':6}{'divergence':17}{'options':14}"
        f"{'warps':>6}{'regs':>6}{'local':>7}{'shared':>8}  wgmma"
    ]
    for r in results:
        lines.append(
            f"{r['target']:8}{r['kernel']:16}{r['dtype']:6}{r['divergence']:17}{r['options']:14}"
            f"{r['warps']:6}{r['registers']:6}{r['local']:7}{r['shared']:8}  {'yes' if r['wgmma'] else 'no'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(chosen, everything, lambda cases: list(itertools.chain.from_iterable(in_parallel(measure, cases))), table)
