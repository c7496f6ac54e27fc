"""Compiles kernels/topk_rows/ for GPUs that need not be here, and tells what each binary uses of them.

    python -m benchmarks.gpu.compile.topk                     # the table of what tests/test_compile_gpu.py checks
    python -m benchmarks.gpu.compile.topk --all               # every pass, dtype, number of ids, option and target
    python -m benchmarks.gpu.compile.topk --all --target sm_80

One binary serves every divergence: their weights are arguments. As in benchmarks/gpu/compile/attention.py,
kernels are compiled as their launches specialise them, and not started.
"""

from __future__ import annotations

import itertools

import torch

from fastkd.divergence import DIVERGENCES
from fastkd.kernels.topk_rows import host as topk_rows

from .common import DTYPES, TARGETS, Launched, in_parallel, launches, main, resources

PASSES = ("fused", "stats", "gradient")  # loss and gradient; loss and statistics; by them the gradient
SHARD_PASSES = ("shard stats", "shard gradient")  # where the vocabulary is spread; ids are K, and the label
# With what: nothing, labels at temperatures of 1 and another, no tail, and then labels too, or metrics.
OPTIONS = ("plain", "labels", "labels, temperature", "conditional", "conditional, labels", "labels, metrics")
SHARD_OPTIONS = ("plain", "temperature")
ENTRIES = (20, 64, 128, 511)

VOCABULARY = 32128


def call(which: str, dtype: torch.dtype, entries: int, options: str) -> None:
    """A launch on rows of a wide vocabulary."""
    student, ids = torch.empty(1, VOCABULARY, dtype=dtype), torch.empty(1, entries, dtype=torch.int64)
    one, at_ids, stats, factors, metrics = (
        torch.empty(1, *shape, dtype=torch.float64) for shape in ((), (entries,), (3,), (2,), (6,))
    )
    temperature, told = 2.0 if "temperature" in options else 1.0, which == "fused" and "metrics" in options
    if which == "shard stats":
        topk_rows.topk_shard_stats(student, ids, one, stats, temperature)
    elif which == "shard gradient":
        topk_rows.topk_shard_gradient(student, ids, one, stats, factors, at_ids, student, temperature)
    else:
        topk_rows.topk_rows(
            student, ids, at_ids, one, one, ids[:, 0].contiguous() if "labels" in options else None,
            one if which != "gradient" else None, stats if which != "fused" else None,
            student if which != "stats" else None, [1.0] * len(DIVERGENCES), options.startswith("conditional"), 0.5,
            temperature, 1.0, float("labels" in options), metrics if told else None,
        )  # fmt: skip


def binaries(case: tuple) -> list[Launched]:
    """Compiles one case: (target, pass, dtype, ids, options)."""
    target, which, dtype, *rest = case
    with launches(target) as found:
        call(which, DTYPES[dtype], *rest)
    return [(which, *launch) for _, *launch in found]


def measure(case: tuple) -> dict:
    ((_, compiled, launch),) = binaries(case)
    named = dict(zip(("target", "pass", "dtype", "entries", "options"), case, strict=True))
    moves_16_bytes = any(x in compiled.asm.get("ptx", "") for x in ("global.v4.b32", "global.v2.b64"))
    return {**named, "warps": launch["num_warps"], "wide": moves_16_bytes, **resources(case[0], compiled)}


def chosen() -> list[tuple]:
    """What the tests compile: on sm_90 the variety, elsewhere what is most likely to spill."""
    cases = [("sm_90", which, "fp32", 64, options) for which in PASSES for options in OPTIONS[:3:2]]
    cases += [("sm_90", "fused", dtype, 64, "labels, temperature") for dtype in ("bf16", "fp64")]
    cases += [
        ("sm_90", "fused", dtype, entries, "labels, metrics") for dtype in ("fp32", "bf16") for entries in (64, 511)
    ]
    cases += [("sm_90", "fused", "fp32", 20, "conditional"), ("sm_90", "gradient", "bf16", 128, "conditional, labels")]
    cases += [("sm_90", "fused", dtype, 511, "labels, temperature") for dtype in ("fp32", "fp64")]
    for target in ("sm_80", "sm_100", "gfx942"):
        cases += [(target, "fused", dtype, 64, "labels, temperature") for dtype in ("fp32", "bf16")]
        cases.append((target, "fused", "fp32", 511, "labels, temperature"))
    for which in SHARD_PASSES:
        cases += [(target, which, "fp32", 65, "temperature") for target in ("sm_80", "sm_90", "sm_100")]
        cases += [("sm_90", which, dtype, ids, "temperature") for dtype, ids in (("bf16", 65), ("fp64", 511))]
    return cases


def everything() -> list[tuple]:
    whole = itertools.product(TARGETS, PASSES, DTYPES, ENTRIES, OPTIONS)
    return [*whole, *itertools.product(TARGETS, SHARD_PASSES, DTYPES, ENTRIES, SHARD_OPTIONS)]


def table(results: list[dict]) -> str:
    lines = [
        f"{'target':8}{'pass':15}{'dtype':6}{'ids':>5}  {'options':21}{'warps':>6}{'regs':>6}{'local':>7}{'shared':>8}"
    ]
    for r in results:
        what = f"{r['target']:8}{r['pass']:15}{r['dtype']:6}{r['entries']:5}  {r['options']:21}"
        lines.append(what + f"{r['warps']:6}{r['registers']:6}{r['local']:7}{r['shared']:8}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(chosen, everything, lambda cases: in_parallel(measure, cases), table)
