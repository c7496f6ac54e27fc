"""Counts what the inner loops of the GPU kernels execute, from their machine code, without a GPU. `make gpu-count`.

    python -m benchmarks.gpu.count                   # all, for sm_90 with estimates, and for sm_100
    python -m benchmarks.gpu.count attention         # ops whose names have this in them, for sm_90
    python -m benchmarks.gpu.count --json FILE       # the counts of all of sm_90 as JSON, too

docs/development/gpu-count.md says how it counts, and how to read the table.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

from .estimate import estimate
from .kernels import OPS, Op
from .measure import Counted, available, measure_all

TITLES = (
    f"{'':38}{'instructions of a lane':>26}{'exponen-':>9}{'barriers':>9}{'shared':>8}{'global':>7}{'tensor':>8}\n"
    f"{'':38}{'normal':>8}{'all':>8}{'budget':>10}{'tials':>9}{'a trip':>9}{'bytes':>8}{'bytes':>7}{'FLOPs':>8}"
    f"{'regs':>5}{'spilled':>8}"
)


def _number(x: float | None) -> str:
    if not x:
        return "-"
    return f"{x:.3g}" if x < 1000 else f"{x:,.0f}" if x < 1e5 else f"{x:.2g}"


def _line(title: str, parts: list[Counted], op: Op | None) -> str:
    """One kernel, or all of an op, whose budget is for all."""

    def each(*names: str) -> float:
        return sum(part.each.get(name, 0) for part in parts for name in names)

    budget = _number(op.budget) if op else ""
    if op and op.budget:
        budget += " over" if each("instructions") > op.budget else " held"
    exponentials = _number(each("exponentials")) + (f"/{_number(op.exponentials)}" if op and op.exponentials else "")
    barriers = str(parts[0].barriers) if len(parts) == 1 else ""
    return (
        f"{title:38}{_number(each('instructions')):>8}{_number(sum(part.all_each for part in parts)):>8}{budget:>10}"
        f"{exponentials:>9}{barriers:>9}{_number(each('shared bytes')):>8}"
        f"{_number(each('loaded bytes', 'stored bytes')):>7}{_number(each('tensor FLOPs')):>8}"
        f"{max(part.registers for part in parts):5}{sum(part.local for part in parts):8}"
    )


def table(target: str, found: dict[str, list[Counted]]) -> str:
    """A line for each op and, where it has several, its kernels; below it, what it comes to on an H200."""
    lines = [f"{target}, Triton {triton.__version__}; by column, score or, of CKA, number", TITLES]
    for op in OPS:
        if (parts := found.get(op.name)) is None:
            continue
        lines.append(_line(op.name, parts, op))
        if len(parts) > 1:
            lines += [_line(f"  {part.title}", [one], None) for part, one in zip(op.parts, parts, strict=True)]
        if target == "sm_90":
            e = estimate(op, parts)
            lines.append(
                f"    H200: {_number(e.clocks)} clocks, bound by {e.bound}: {100 * e.share:.0f} % of the roofline, "
                f"{1000 * e.seconds:.3g} ms of {op.problem}"
            )
    return "\n".join(lines)


def record(target: str, found: dict[str, list[Counted]]) -> dict[str, Any]:
    """For a file, of which git shows what changed."""
    rounded = {}
    for op in OPS:
        if (parts := found.get(op.name)) is None:
            continue
        kernels = {}
        for part, one in zip(op.parts, parts, strict=True):
            each = {name: round(number, 3) for name, number in sorted(one.each.items()) if number}
            kernels[part.title] = {**asdict(one), "each": each, "all_each": round(one.all_each, 3)}
        rounded[op.name] = {"element": op.element, "budget": op.budget, "kernels": kernels}
    return {"target": target, "triton": triton.__version__, "ops": rounded}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("op", nargs="?", default="", help="a part of the names of the ops to count")
    parser.add_argument("--target", choices=("sm_80", "sm_90", "sm_100"), action="append")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    targets = options.target or (["sm_90"] if options.op else ["sm_90", "sm_100"])
    chosen = [op for op in OPS if options.op in op.name]
    if not chosen:
        parser.error(f"op: expected a part of one of {', '.join(op.name for op in OPS)}; got {options.op!r}")
    for target in targets:
        reasons = {op.name: available(op) for op in chosen}
        found = measure_all(target, tuple(op for op in chosen if reasons[op.name] is None))
        print(table(target, found), flush=True)
        for name, reason in reasons.items():
            if reason is not None:
                print(f"not counted: {name}: {reason}")
        if options.json and target == targets[0]:
            options.json.write_text(json.dumps(record(target, found), indent=1) + "\n")
            print(f"written: {options.json}")


if __name__ == "__main__":
    main()
