"""Compiles kernels/attention/ for GPUs that need not be here, and tells what each binary uses of them.

    python -m benchmarks.gpu.compile.attention                # the table of what tests/test_compile_gpu.py checks
    python -m benchmarks.gpu.compile.attention --all          # every width, bias and target
    python -m benchmarks.gpu.compile.attention --all --target sm_80
    python -m benchmarks.gpu.compile.attention --candidates   # and whatever tuning.autotune would time, which may spill

The functions are called as on a GPU, with tensors that nobody reads: kernels are compiled as their launches specialise
them, and not started. Not under TRITON_INTERPRET=1, where kernels are Python functions.
"""

from __future__ import annotations

import itertools
import sys

import torch

from fastkd.checks import Objective
from fastkd.divergence import DIVERGENCES, beta_of
from fastkd.kernels import attention as kernels
from fastkd.kernels import tuning

from .common import DTYPES, TARGETS, Launched, in_parallel, launches, main, of_launch

BATCH, HEADS, LENGTH = 2, 4, 512
# Of all six members the gradient of a relation spills 168 bytes of a thread's.
MIX = {"forward_kl": 0.5, "reverse_kl": 0.5}


def call(op: str, divergence: str, dtypes: str, width_s: int, width_t: int, causal: bool, masked: bool = True) -> None:
    """relation_kl, or attention_kl without a bias, with a dense one, with diagonals or grouped: with all gradients.

    Grouped are four heads of queries on two of the student's keys and one of the teacher's. dtypes: all tensors', or
    the student's, "/", and that of the teacher and the bias.
    """
    dtype, _, other = (DTYPES.get(name) for name in dtypes.partition("/"))
    other = other or dtype
    x, y = (torch.empty(BATCH, LENGTH, HEADS * w, dtype=d) for w, d in ((width_s, dtype), (width_t, other)))
    coefficient = torch.empty(BATCH, HEADS, LENGTH, dtype=torch.float64)
    mask = torch.empty(BATCH, LENGTH, dtype=torch.bool) if masked else None
    objective = Objective(MIX if divergence == "mix" else divergence, 0.5, 1.0, 1.0, 0.0)
    code, beta = objective.code, beta_of(0.5, *objective.weights)
    if op == "relation":
        kernels.relation_kl(
            [x] * 3, [y] * 3, [coefficient] * 3, [mask] * 3, [causal] * 3, HEADS, [True] * 3, code, beta
        )
        return
    bias = None
    if op == "dense":
        bias = torch.empty(1, HEADS, LENGTH, LENGTH, dtype=other)
    elif op == "diagonals":
        bias = torch.empty(HEADS, 257)
    wanted = [True, True, bias is not None]
    keys = (x[..., : 2 * width_s], y[..., :width_t]) if op == "grouped" else (x, y)
    kernels.attention_kl(
        x, keys[0], y, keys[1], bias, bias, coefficient, mask, causal, HEADS, 1.0, 1.0, wanted, code, beta
    )


def binaries(case: tuple) -> list[Launched]:
    """Compiles one case: (target, op, divergence, dtypes, head widths, causal, masked or not)."""
    target, *rest = case
    with launches(target) as found:
        call(*rest)
    return found


def measure(case: tuple) -> list[dict]:
    names = ("target", "op", "divergence", "dtype", "width_s", "width_t", "causal")
    named = dict(zip(names, case, strict=True))
    return [{**named, "kernel": name, **of_launch(case[0], *launch)} for name, *launch in binaries(case)]


def measure_candidates(case: tuple) -> list[dict]:
    """As measure, in every configuration that tuning would time."""
    with tuning.autotune(lambda run: float(run() is not None)):
        return measure(case)


def chosen() -> list[tuple]:
    """What the tests compile: the widths of T5 and MiniLM, and what is most likely to spill."""
    cases = [("sm_90", "relation", "forward_kl", "bf16", *widths, False) for widths in [(12, 24), (64, 64), (128, 128)]]
    cases += [
        ("sm_90", "relation", "reverse_kl", "bf16", 64, 32, True),
        ("sm_90", "dense", "forward_kl", "bf16", 64, 64, False),
        ("sm_90", "diagonals", "mix", "bf16", 64, 64, False),
    ]
    for target in ("sm_80", "sm_90", "sm_100"):
        cases.append((target, "diagonals", "forward_kl", "bf16", 64, 64, False))
        cases.append((target, "relation", "forward_kl", "fp32", 64, 32, False))
        cases.append((target, "attention", "forward_kl", "fp32", 128, 128, False))
        cases.append((target, "grouped", "forward_kl", "bf16", 128, 128, True))
    cases += [(target, "relation", "reverse_kl", "bf16", 128, 128, True) for target in ("sm_80", "sm_100")]
    cases += [
        ("sm_90", "relation", divergence, "bf16", 64, 64, False) for divergence in (*tuple(DIVERGENCES)[2:], "mix")
    ]
    cases += [("gfx942", "relation", divergence, "bf16", 64, 32, False) for divergence in ("forward_kl", "jsd")]
    cases += [("sm_90", op, "forward_kl", "fp64", 64, 64, False) for op in ("relation", "diagonals")]
    cases.append(("sm_90", "dense", "forward_kl", "fp64/bf16", 64, 64, False))
    return cases


def everything() -> list[tuple]:
    ops = ("relation", "attention", "grouped", "dense", "diagonals")
    widths = [(12, 12), (12, 24), (24, 24), (64, 32), (64, 64), (128, 128)]
    cases = itertools.product(TARGETS, ops, DIVERGENCES, ("bf16", "fp32"), widths, (False, True))
    return [(*case, *pair, causal) for *case, pair, causal in cases]


def table(results: list[dict]) -> str:
    lines = [
        f"{'target':8}{'op':10}{'kernel':19}{'divergence':16}{'dtypes':10}{'d':>4}/{'d':<4}{'causal':7}"
        f"{'tile':>8}{'warps':>6}{'stages':>7}{'regs':>6}{'local':>7}{'shared':>8}  wgmma  tma"
    ]
    for r in results:
        lines.append(
            f"{r['target']:8}{r['op']:10}{r['kernel']:19}{r['divergence']:16}{r['dtype']:10}{r['width_s']:4}/"
            f"{r['width_t']:<4}{'yes' if r['causal'] else 'no':7}{r['tile']:>8}{r['warps']:6}{r['stages']:7}"
            f"{r['registers']:6}{r['local']:7}{r['shared']:8}  {'yes' if r['wgmma'] else 'no':5}  "
            f"{'yes' if r['tma'] else 'no'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    of_case = measure_candidates if "--candidates" in sys.argv else measure
    sys.argv = [argument for argument in sys.argv if argument != "--candidates"]
    main(chosen, everything, lambda cases: list(itertools.chain.from_iterable(in_parallel(of_case, cases))), table)
