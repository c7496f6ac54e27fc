"""What the benchmarks print and write, and their command line."""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from benchmarks import RESULTS
from benchmarks.harness import limits
from benchmarks.harness.measure import OURS, Problem, Unavailable, measure, not_measured

COLUMNS = ("implementation", "min ms", "median ms", "rate", "of limit", "peak MiB", "rel. error", f"time / {OURS}", "")


def _cells(name: str, row: dict, unit: str) -> tuple[str, ...]:
    def number(key: str, form: str, scale: float = 1.0, after: str = "") -> str:
        return "-" if row.get(key) is None else format(row[key] * scale, form) + after

    return (
        name,
        number("min_s", ".1f", 1e3),
        number("median_s", ".1f", 1e3),
        number("rate", ".0f", 1, f" {unit}"),
        number("of_limit", ".0f", 100, " %"),
        number("peak_mib", ".0f"),
        number("error", ".1e"),
        number("ratio", ".2f"),
        row.get("note") or "",
    )


def report(results: list[dict], markdown: bool = False) -> str:
    """One table of all problems, and a line for every target."""
    groups = [(r["problem"], [_cells(name, row, r["unit"]) for name, row in r["rows"].items()]) for r in results]
    cells = [COLUMNS, *(row for _, rows in groups for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]

    def line(row: Sequence[str]) -> str:
        numbers = (cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True))
        padded = [row[0].ljust(widths[0]), *numbers, row[-1].ljust(widths[-1])]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    lines = [line(COLUMNS)]
    if markdown:
        lines.append("|" + "|".join(["---", *["---:"] * (len(COLUMNS) - 2), "---"]) + "|")
    for title, rows in groups:
        lines += [line([f"**{title}**", *[""] * (len(COLUMNS) - 1)]) if markdown else f"\n{title}", *map(line, rows)]
    lines.append("")
    for result in results:
        for t in result["targets"]:
            measured = "not measured" if t["measured"] is None else f"{t['measured']:.2f}"
            verdict = {True: "met", False: "NOT MET", None: "unknown"}[t["met"]]
            lines.append(f"- {result['problem']}: {t['target']} {t['relation']} {t['bound']:g}: {measured}, {verdict}")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cpu = found[1] if found else cpu
    packages = ("torch", "fastkd", "liger-kernel", "triton")
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in packages},
            "cuda": torch.version.cuda,
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def measured(
    problems: list[Problem], seconds: float, budget: float, save: Callable[[list[dict]], None]
) -> tuple[list[dict], bool]:
    """The results of all problems, saved after each, and whether one of them could not be measured.

    Half of each one's share of the budget is for rounds, the other for inputs, fp64 and compilation. What does not fit
    any more is left out.
    """
    results, failed, end = [], False, time.monotonic() + budget
    for i, problem in enumerate(problems):
        share = (end - time.monotonic()) / (len(problems) - i)
        if share <= 5:
            results.append(not_measured(problem, "not run: the time was up"))
            continue
        try:
            results.append(measure(problem, min(seconds, share / 2)))
            failed |= "samples_s" not in results[-1]["rows"][OURS]
        except (Unavailable, ImportError) as why:  # a package is not here
            results.append(not_measured(problem, f"not run: {why}"))
        except Exception as error:  # one problem's, not the others'
            traceback.print_exc()
            results.append(not_measured(problem, f"failed: {(str(error) or repr(error)).splitlines()[0]}"))
            failed = True
        save(results)
    return results, failed


def main(problems: Callable[[torch.device, bool], list[Problem]], description: str | None) -> None:
    """The command line of every benchmark: `problems(device, quick)` lists what it measures."""
    by_hand = (
        "By themselves: benchmarks.ops.logit_kl_exactness (errors against fp64), benchmarks.ops.relation_kl_memory "
        "(peak memory, a picture) and benchmarks.trainer.scaling (bytes between processes)."
    )
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0], epilog=by_hand)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default))
    parser.add_argument("--quick", action="store_true", help="small shapes: shows that it runs, measures nothing")
    parser.add_argument("--only", default="", metavar="TEXT", help="only problems whose title contains this")
    parser.add_argument("--seconds", type=float, default=60, help="time for the rounds of a problem (default 60)")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="time for all problems (default: no end)"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        nargs="?",
        const=RESULTS,
        help="write the samples and what they were taken on; to <machine>.json in a folder, by default results/",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args()

    selected = [p for p in problems(options.device, options.quick) if options.only in p.title]
    if not selected:
        titles = "\n  ".join(p.title for p in problems(options.device, options.quick))
        parser.error(f"--only {options.only!r} matches none of:\n  {titles}")
    host = machine()
    name = host["gpu"] if options.device.type == "cuda" else f"{host['cpu']}, {host['threads']} threads"
    record = {
        "machine": host,
        "device": options.device.type,
        "limits": limits.measure(options.device) if options.device.type == "cuda" else [],
    }
    if options.json == RESULTS or (options.json and options.json.is_dir()):
        options.json /= re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"

    def save(results: list[dict]) -> None:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")

    results, failed = measured(selected, 0 if options.quick else options.seconds, options.budget, save)
    save(results)
    versions = ", ".join(f"{k} {v}" for k, v in host["versions"].items() if v)
    print(f"{name} ({versions}; {host['date'][:10]})\n\n{report(results, options.markdown)}")
    sys.exit(1 if failed else 0)
