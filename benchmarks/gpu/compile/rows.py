"""Compiles kernels/rows/ for GPUs that need not be here, and tells what each binary uses of them.

    python -m benchmarks.gpu.compile.rows                     # the table of what tests/test_compile_gpu.py checks
    python -m benchmarks.gpu.compile.rows --all               # every divergence, dtype, pass and target: half an hour
    python -m benchmarks.gpu.compile.rows --all --target sm_80

Not under TRITON_INTERPRET=1, where kernels are Python functions: tests/test_compile_gpu.py starts a process of its own.
"""

from __future__ import annotations

import itertools
import re

import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource

from fastkd.checks import Objective
from fastkd.divergence import DIVERGENCES, beta_of
from fastkd.kernels.rows import column
from fastkd.kernels.rows import host as rows

from .common import DTYPES, TARGETS, Launched, in_parallel, launches, main, resources

# Loss and gradient; loss and statistics; by them the gradient; loss, statistics and metrics.
PASSES = ("fused", "stats", "gradient", "metrics")
SHARD_PASSES = ("shard", "sums")  # statistics and metrics of a shard; what it adds to D and means of the whole row

# Logits of more than 2 GB, on the meta device: of less Triton compiles other loads for AMD.
ROWS, VOCABULARY = 2**16, 32128
MIX = dict.fromkeys(DIVERGENCES, 0.5)  # all members, which takes the most registers


def call(which: str, divergence: str, student: str, teacher: str | None, ce: bool) -> None:
    """Rows, contiguous and aligned, of a wide vocabulary."""

    def wide(needed: bool, *shape: int) -> torch.Tensor | None:
        return torch.empty(ROWS, *shape, dtype=torch.float64, device="meta") if needed else None

    scores = torch.empty(ROWS, VOCABULARY, dtype=DTYPES[student], device="meta")
    objective = Objective(MIX if divergence == "mix" else divergence, 0.5, 2.0, float(teacher is not None), float(ce))
    code, beta = objective.code, beta_of(0.5, *objective.weights)
    rows.divergence_rows(
        scores,
        torch.empty_like(scores, dtype=DTYPES[teacher]) if teacher else None,
        wide(True),
        torch.empty(ROWS, dtype=torch.int64, device="meta") if ce else None,
        wide(which not in ("gradient", *SHARD_PASSES)),
        wide(which != "fused", 7),
        torch.empty_like(scores) if which in ("fused", "gradient") else None,
        code,
        beta,
        objective.temperature,
        objective.kd_weight,
        objective.ce_weight,
        metrics=wide(which in ("metrics", "shard"), 6),
        sums=wide(which == "sums", 3),
    )


def binaries(case: tuple) -> list[Launched]:
    """Compiles one case: (target, pass, divergence, student dtype, teacher dtype or None, with cross-entropy)."""
    target, *rest = case
    with launches(target) as found:
        call(*rest)
    return [(case[1], *launched) for _, *launched in found]


def measure(case: tuple) -> dict:
    ((_, compiled, options),) = binaries(case)
    names = ("target", "pass", "divergence", "student", "teacher", "cross_entropy")
    named = dict(zip(names, case, strict=True))
    return {**named, "warps": options["num_warps"], **resources(case[0], compiled)}


def chosen() -> list[tuple]:
    """What the tests compile: all of fp32 on sm_90, and elsewhere what is most likely to spill."""
    fused = [("sm_90", "fused", name, "fp32", "fp32", True) for name in DIVERGENCES]
    apart = [("sm_90", which, name, "fp32", "fp32", False) for name in DIVERGENCES for which in PASSES[1:]]
    halves = [("sm_90", "fused", name, "bf16", "bf16", True) for name in ("forward_kl", "jsd")]
    others = [
        ("sm_90", "fused", "forward_kl", "fp32", None, True),
        ("sm_90", "stats", "reverse_kl", "fp16", "fp16", True),
        ("sm_90", "gradient", "skew_kl", "bf16", "fp32", True),
        ("sm_90", "fused", "jsd", "fp64", "fp64", True),
        ("sm_90", "metrics", "reverse_kl", "bf16", "bf16", True),
        ("sm_90", "metrics", "jsd", "fp64", "fp64", True),
    ]
    others += [("sm_90", "shard", name, "fp32", "fp32", True) for name in ("reverse_kl", "jsd")]
    others += [("sm_90", "sums", name, dtype, dtype, False) for name, dtype in (("jsd", "fp32"), ("tvd", "bf16"))]
    for target in ("sm_80", "sm_100", "gfx942"):
        others += [(target, "fused", name, "fp32", "fp32", True) for name in ("forward_kl", "jsd", "skew_reverse_kl")]
        others += [(target, which, "reverse_kl", "bf16", "bf16", False) for which in ("stats", "gradient")]
        others.append((target, "stats", "skew_kl", "bf16", "bf16", True))
        others.append((target, "metrics", "forward_kl", "bf16", "bf16", True))
    mixes = [("sm_90", which, "mix", "fp32", "fp32", which == "fused") for which in PASSES]
    mixes.append(("sm_80", "fused", "mix", "bf16", "bf16", True))
    return fused + apart + halves + others + mixes


def everything() -> list[tuple]:
    pairs = [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "bf16"), ("bf16", "fp32"), ("fp64", "fp64")]
    cases = itertools.product(TARGETS, PASSES, DIVERGENCES, pairs, (False, True))
    return [(target, which, name, *pair, ce) for target, which, name, pair, ce in cases]


@triton.jit
def two_sum_kernel(s, t, out, high, low):
    i = tl.arange(0, 32)
    tl.store(out + i, column.shifted_ratio(tl.load(s + i), tl.load(t + i), (high, low), 0.5))


def two_sum_operations() -> dict[str, int]:
    """Floating-point instructions of one `shifted_ratio` in sm_90 assembly: what a compiler may have simplified."""
    signature = {"s": "*fp32", "t": "*fp32", "out": "*fp32", "high": "fp32", "low": "fp32"}
    options = {"num_warps": 1, "enable_fp_fusion": True}
    compiled = triton.compile(ASTSource(two_sum_kernel, signature), target=TARGETS["sm_90"], options=options)
    found = re.findall(r"^\s+((?:add|sub|mul|fma)\S*\.f32)", compiled.asm["ptx"], re.MULTILINE)
    return {name: found.count(name) for name in sorted(set(found))}


def table(results: list[dict]) -> str:
    titles = f"{'target':8}{'pass':10}{'divergence':17}{'dtypes':12}{'CE':4}"
    lines = [titles + f"{'warps':>6}{'regs':>6}{'local':>7}{'shared':>8}"]
    for r in results:
        dtypes, ce = f"{r['student']}, {r['teacher'] or '-'}", "yes" if r["cross_entropy"] else "no"
        numbers = f"{r['warps']:6}{r['registers']:6}{r['local']:7}{r['shared']:8}"
        lines.append(f"{r['target']:8}{r['pass']:10}{r['divergence']:17}{dtypes:12}{ce:4}{numbers}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(chosen, everything, lambda cases: in_parallel(measure, cases), table)
