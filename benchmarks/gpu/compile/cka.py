"""Compiles kernels/cka.py for GPUs that need not be here, and tells what each binary uses of them.

    python -m benchmarks.gpu.compile.cka                     # the table of what tests/test_compile_gpu.py checks
    python -m benchmarks.gpu.compile.cka --all               # every dtype and target
    python -m benchmarks.gpu.compile.cka --all --target sm_80

As in benchmarks/gpu/compile/attention.py, kernels are compiled as their launches specialise them, and not started.
"""

from __future__ import annotations

import itertools

import torch

from fastkd.kernels import cka
from fastkd.ops.dtypes import score_dtype

from .common import DTYPES, TARGETS, Launched, in_parallel, launches, main, of_launch

TOKENS, WIDTH, WIDTHS = 4096, 512, 1280


def call(dtype: torch.dtype, pairs: int, masked: bool = True) -> None:
    """The kernels for one of two models."""
    xs = [torch.empty(TOKENS, WIDTH, dtype=dtype)] * pairs
    masks = [torch.empty(TOKENS, dtype=torch.bool) if masked else None] * pairs
    means = [torch.empty(WIDTHS, dtype=torch.float64)[-WIDTH:]] * pairs
    exact = score_dtype(xs[0])
    cka.means_(xs, masks, means, exact)
    cka.centre_(xs, masks, means, torch.empty(pairs, TOKENS, WIDTHS, dtype=dtype)[:, :, -WIDTH:], exact)


def binaries(case: tuple) -> list[Launched]:
    """Compiles one case: (target, dtype, how many pairs, masked or not)."""
    target, dtype, *rest = case
    with launches(target) as found:
        call(DTYPES[dtype], *rest)
    return found


def measure(case: tuple) -> list[dict]:
    named = dict(zip(("target", "dtype", "pairs"), case, strict=True))
    return [{**named, "kernel": name, **of_launch(case[0], *launch)} for name, *launch in binaries(case)]


def chosen() -> list[tuple]:
    """What the tests compile."""
    cases = [(target, "bf16", 12) for target in TARGETS]
    return [*cases, ("sm_80", "fp32", 2), ("sm_90", "fp32", 2), ("sm_90", "fp64", 2)]


def everything() -> list[tuple]:
    return list(itertools.product(TARGETS, DTYPES, (1, 12)))


def table(results: list[dict]) -> str:
    lines = [
        f"{'target':8}{'kernel':8}{'dtype':6}{'pairs':6}{'tile':>12}{'warps':>6}{'stages':>7}{'regs':>6}{'local':>7}{'shared':>8}"
    ]
    for r in results:
        lines.append(
            f"{r['target']:8}{r['kernel']:8}{r['dtype']:6}{r['pairs']:5} "
            f"{r['tile']:>12}{r['warps']:6}{r['stages']:7}{r['registers']:6}{r['local']:7}{r['shared']:8}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(chosen, everything, lambda cases: list(itertools.chain.from_iterable(in_parallel(measure, cases))), table)
