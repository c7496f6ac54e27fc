"""The command line of every benchmark that compares implementations; what it prints and saves as it goes."""

from __future__ import annotations

import argparse
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import RESULTS
from benchmarks.harness import limits
from benchmarks.harness.ending import interruptible
from benchmarks.harness.machine import machine, titled
from benchmarks.harness.measure import FEWEST, MOST, NOT_REACHED, measure, not_measured
from benchmarks.harness.problem import OURS, Problem, Unavailable
from benchmarks.harness.report import Table, first_run, rounds_so_far, verdicts
from benchmarks.harness.saved import save

SAVE_S, SAY_S = 2, 10  # the least time between two rounds that are saved, or told
INTERRUPTED = 130


class Record:
    """The results of some problems, in a file that has all their rows at any time."""

    def __init__(self, head: dict, problems: list[Problem], path: Path | None) -> None:
        self.head, self.path = head, path
        self.results = [not_measured(problem, NOT_REACHED) for problem in problems]
        self.save()

    def save(self) -> None:
        self.saved = time.monotonic()
        if self.path:
            save(self.path, self.head | {"results": self.results})

    def teller(self, i: int) -> Callable[[dict, str | None], None]:
        """Keeps what is known so far of a problem, and says it."""
        begin = said = time.monotonic()

        def tell(result: dict, name: str | None) -> None:
            nonlocal said
            self.results[i], now = result, time.monotonic()
            if name is not None or now - self.saved >= SAVE_S:
                self.save()
            if name == "":
                print(result["problem"], file=sys.stderr, flush=True)
            elif name is not None or now - said >= SAY_S:
                said = now
                text = rounds_so_far(result["rows"]) if name is None else first_run(name, result["rows"][name])
                print(f"{now - begin:6.1f} s  {text}", file=sys.stderr, flush=True)

        return tell


def measured(
    problems: list[Problem], record: Record, limit_s: float, budget: float, most: int, show: Callable[[dict], None]
) -> bool:
    """Measures all problems, each in its share of the budget; whether all could be that are for this machine."""
    well, end = True, time.monotonic() + budget
    for i, problem in enumerate(problems):
        share = (end - time.monotonic()) / (len(problems) - i)
        if share <= 5:
            record.results[i] = not_measured(problem, "not run: the time was up")
        else:
            try:
                record.results[i] = measure(problem, min(limit_s, share), most, record.teller(i))
                well &= "samples_s" in record.results[i]["rows"][OURS]
            except (Unavailable, ImportError) as why:  # a package is not here
                record.results[i] = not_measured(problem, f"not run: {why}")
            except Exception as error:  # one problem's, not the others'
                traceback.print_exc()
                record.results[i] = not_measured(problem, f"failed: {(str(error) or repr(error)).splitlines()[0]}")
                well = False
        record.save()
        show(record.results[i])
    return well


def _options(description: str | None) -> argparse.ArgumentParser:
    by_themselves = (
        "By themselves: benchmarks.ops.logit_kl_exactness (errors against fp64), benchmarks.ops.relation_kl_memory "
        "(peak memory, a picture) and benchmarks.trainer.scaling (bytes between processes)."
    )
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0], epilog=by_themselves)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default))
    parser.add_argument("--quick", action="store_true", help="small shapes: shows that it runs, measures nothing")
    parser.add_argument("--only", default="", metavar="TEXT", help="only problems whose title contains this")
    parser.add_argument(
        "--seconds",
        type=float,
        default=600,
        help="time for a problem, compilation and all; rounds end after a minute, but there are three (default 600)",
    )
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="time for all problems (default: no end)"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        nargs="?",
        const=RESULTS,
        help="write the samples, as they are taken, and what they were taken on; to <machine>.json in a folder, by "
        "default results/",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return parser


def main(problems: Callable[[torch.device, bool], list[Problem]], description: str | None) -> None:
    """Measures what `problems(device, quick)` lists, as the command line says."""
    parser = _options(description)
    options = parser.parse_args()
    selected = [p for p in problems(options.device, options.quick) if options.only in p.title]
    if not selected:
        titles = "\n  ".join(p.title for p in problems(options.device, options.quick))
        parser.error(f"--only {options.only!r} matches none of:\n  {titles}")
    if options.quick:  # targets are of the shapes that are measured
        selected = [replace(problem, targets=()) for problem in selected]
    host = machine()
    name = host["gpu"] if options.device.type == "cuda" else f"{host['cpu']}, {host['threads']} threads"
    path = options.json
    if path and (path == RESULTS or path.is_dir()):
        path /= re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"
    table = Table([row for problem in selected for row in problem.row_names], options.markdown)
    print(f"{titled(host, name)}\n\n{table.header()}", flush=True)

    head = {
        "machine": host,
        "device": options.device.type,
        "limits": limits.measure(options.device) if options.device.type == "cuda" else [],
    }
    record, shown = Record(head, selected, path), []

    def show(result: dict) -> None:
        print(table.problem(result), flush=True)
        shown.append(result)

    most = FEWEST if options.quick else MOST
    try:
        with interruptible():
            code = 0 if measured(selected, record, options.seconds, options.budget, most, show) else 1
    except KeyboardInterrupt:
        code = INTERRUPTED
        record.save()
        for result in record.results[len(shown) : len(shown) + 1]:  # the one that was being measured
            show(result)
        print(f"{parser.prog}: interrupted in problem {len(shown)} of {len(selected)}", file=sys.stderr)
    if lines := verdicts(shown):
        print(f"\n{lines}")
    sys.exit(code)
