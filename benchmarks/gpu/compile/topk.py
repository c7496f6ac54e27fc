"""Compiles kernels/topk_rows/ for GPUs that need not be here, and tells what each binary uses of them.

    python -m benchmarks.gpu.compile.topk                     # the table of what tests/test_compile_gpu.py checks
    python -m benchmarks.gpu.compile.topk --all               # every pass, dtype, number of ids, option and target
    python -m benchmarks.gpu.compile.topk --all --target sm_80

One binary serves every divergence: their weights are arguments. Otherwise as benchmarks/gpu/compile/rows.py.
"""

from __future__ import annotations

import itertools

from triton.compiler import ASTSource

from fastkd.divergence import DIVERGENCES
from fastkd.kernels.topk_rows import host as topk_rows

from .common import DTYPES, TARGETS, Launched, in_parallel, launched, main, resources

PASSES = ("fused", "stats", "gradient")  # loss and gradient; loss and statistics; by them the gradient
SHARD_PASSES = ("shard stats", "shard gradient")  # where the vocabulary is spread; ids are K, and the label
# With what: nothing, labels at temperatures of 1 and another, no tail, and then labels too, or metrics.
OPTIONS = ("plain", "labels", "labels, temperature", "conditional", "conditional, labels", "labels, metrics")
SHARD_OPTIONS = ("plain", "temperature")
ENTRIES = (20, 64, 128, 511)

VOCABULARY = 32128


def _types(which: str, dtype: str, options: str) -> dict[str, str | None]:
    """Of a kernel's arguments."""
    if which in SHARD_PASSES:
        sizes = dict.fromkeys(("columns", "entries", "student_row", "gradient_row"), "i32")
        pointers = dict.fromkeys(("coefficient", "stats", "factors", "at_ids"), "*fp64")
        return {"student": f"*{dtype}", "ids": "*i64", "gradient": f"*{dtype}", "tau": "fp64", **pointers, **sizes}
    return {
        "student": f"*{dtype}",
        "ids": "*i64",
        "log_probs": "*fp64",
        "tail_log_prob": None if options.startswith("conditional") else "*fp64",
        "coefficient": "*fp64",
        "labels": "*i64" if "labels" in options else None,
        "loss": "*fp64" if which != "gradient" else None,
        "stats": "*fp64" if which != "fused" else None,
        "gradient": f"*{dtype}" if which != "stats" else None,
        "metrics": "*fp64" if "metrics" in options and which == "fused" else None,
        **dict.fromkeys(("columns", "entries", "student_row", "gradient_row"), "i32"),
        **dict.fromkeys((*DIVERGENCES, "beta", "tau", "kd_weight", "ce_weight"), "fp64"),
    }


def source(target: str, which: str, dtype: str, entries: int, options: str) -> tuple[ASTSource, dict]:
    """The kernel as a launch on contiguous, aligned rows of a wide vocabulary specialises it, and its options."""
    name = f"topk_{which.replace(' ', '_')}_kernel" if which in SHARD_PASSES else "topk_rows_kernel"
    kernel, nvidia = getattr(topk_rows, name), target.startswith("sm_")
    sizes, launch = topk_rows.sizes_and_options(VOCABULARY, entries, DTYPES[dtype], nvidia)
    types = _types(which, dtype, options)
    constants = {name: None for name, kind in types.items() if kind is None}
    constants.update(sizes, student_column=1, gradient_column=1)
    constants.update(CONDITIONAL=options.startswith("conditional"), SEPARATE="temperature" in options)
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name][0] in "*i" and name != "entries"
    }
    return ASTSource(kernel, signature, constexprs=constants, attrs=aligned), launch


def binaries(case: tuple) -> list[Launched]:
    """Compiles one case: (target, pass, dtype, ids, options)."""
    return [launched(case[0], case[1], *source(*case))]


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
