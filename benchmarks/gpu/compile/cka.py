"""Compiles kernels/cka/ for GPUs that need not be here, and tells what each binary uses of them.

    python -m benchmarks.gpu.compile.cka                     # the table of what tests/test_compile_gpu.py checks
    python -m benchmarks.gpu.compile.cka --all               # every dtype and target
    python -m benchmarks.gpu.compile.cka --all --target sm_80
    python -m benchmarks.gpu.compile.cka --candidates        # and whatever tuning.autotune would time, which may spill

As in benchmarks/gpu/compile/attention.py, kernels are compiled as their launches specialise them, and not started.
"""

from __future__ import annotations

import itertools
import sys

import torch

import fastkd.functions  # noqa: F401  # registers the operators
from fastkd.backend import interpret_triton
from fastkd.checks import numbers
from fastkd.kernels import tuning

from .common import DTYPES, FAILS_ON_SM_100, TARGETS, Launched, in_parallel, launches, main, of_launch

WIDTHS = 512, 768


def call(dtype: torch.dtype, pairs: int, masked: bool = True) -> None:
    """Forward and backward."""
    tokens = 4096
    student, teacher = ([torch.empty(tokens, width, dtype=dtype)] * pairs for width in WIDTHS)
    mask = [torch.empty(tokens, dtype=torch.bool) if masked else None] * pairs
    wanted = [True] * pairs
    with interpret_triton():  # sends CPU tensors to the kernels, which `launches` does not start
        loss, mean, factor = torch.ops.fastkd.cka_loss(student, teacher, mask, wanted, numbers(1e-8), False)
        torch.ops.fastkd.cka_loss_backward(student, teacher, mask, mean, factor, wanted, loss)


def binaries(case: tuple) -> list[Launched]:
    """Compiles one case: (target, dtype, how many pairs, masked or not)."""
    target, dtype, *rest = case
    with launches(target) as found:
        call(DTYPES[dtype], *rest)
    return found


def measure(case: tuple) -> list[dict]:
    named = dict(zip(("target", "dtype", "pairs"), case, strict=True))
    return [{**named, "kernel": name, **of_launch(case[0], *launch)} for name, *launch in binaries(case)]


def measure_candidates(case: tuple) -> list[dict]:
    """As measure, in every configuration that tuning would time."""
    with tuning.autotune(lambda run: float(run() is not None)):
        return measure(case)


def chosen() -> list[tuple]:
    """What the tests compile."""
    nvidia = ["sm_80", "sm_90"] + ["sm_100"] * (not FAILS_ON_SM_100)
    cases = [(target, "bf16", 12) for target in nvidia]
    return [*cases, ("sm_80", "fp32", 2), ("sm_90", "fp32", 2), ("sm_90", "fp64", 2), ("gfx942", "bf16", 2)]


def everything() -> list[tuple]:
    return list(itertools.product(TARGETS, DTYPES, (1, 12)))


def table(results: list[dict]) -> str:
    lines = [
        f"{'target':8}{'kernel':15}{'dtype':6}{'pairs':6}"
        f"{'tile':>12}{'warps':>6}{'stages':>7}{'regs':>6}{'local':>7}{'shared':>8}  wgmma  tma"
    ]
    for r in results:
        lines.append(
            f"{r['target']:8}{r['kernel']:15}{r['dtype']:6}{r['pairs']:5} "
            f"{r['tile']:>12}{r['warps']:6}{r['stages']:7}{r['registers']:6}{r['local']:7}{r['shared']:8}  "
            f"{'yes' if r['wgmma'] else 'no':5}  {'yes' if r['tma'] else 'no'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    of_case = measure_candidates if "--candidates" in sys.argv else measure
    sys.argv = [argument for argument in sys.argv if argument != "--candidates"]
    main(chosen, everything, lambda cases: list(itertools.chain.from_iterable(in_parallel(of_case, cases))), table)
