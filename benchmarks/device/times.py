"""How fast: the benchmarks of ops, some problems and some rows of them in each phase, told line by line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.device.checks import counting
from benchmarks.device.phases import Here
from benchmarks.harness.command import Record, measured
from benchmarks.harness.measure import FEWEST, MOST
from benchmarks.harness.problem import OURS, Problem, Run, held_to
from benchmarks.harness.report import Table
from benchmarks.ops import attention_kl, cka_loss, linear_kl, logit_kl, relation_kl
from fastkd.ops.drivers.divergence_rows import gpu_row_kernels, gpu_rows

BLOCKS = (0, 4, 8, 16)  # that share a row in CUDA C++; 0: one block that reads it twice
PROBLEM_S = 60


class Told(Record):
    """The results of some problems, a line each time that one changes."""

    def __init__(self, here: Here, problems: list[Problem]) -> None:
        self.lines, self.written = here.lines, dict[str, str]()
        super().__init__({}, problems, None)

    def save(self) -> None:
        self.saved = time.monotonic()
        for result in self.results:
            text = json.dumps(result)
            if self.written.get(result["problem"]) != text:
                self.lines.write("result", result=result)
                self.written[result["problem"]] = text


def bench(here: Here, problems: Sequence[Problem]) -> bool:
    """Whether fastkd could be measured in all of them, with gradients that are right."""
    counts = counting()
    table = Table([row for problem in problems for row in problem.row_names])
    print(table.header(), flush=True)
    record = Told(here, list(problems))
    most = FEWEST if here.rehearsed else MOST

    def show(result: dict) -> None:
        print(table.problem(result), flush=True)

    well = measured(list(problems), record, PROBLEM_S, here.left, most, show)
    here.lines.write("cache", **counts)
    rows = [result["rows"][OURS] for result in record.results]
    return well and all("samples_s" in row and row["error"] < 0.05 for row in rows)


def _of(here: Here, module: Any, chosen: Callable[[str], bool]) -> list[Problem]:
    """A module's problems whose titles are chosen; in a rehearsal the first of its small ones."""
    problems: list[Problem]
    if here.rehearsed:
        problems = module.problems(torch.device("cpu"), quick=True)
        return problems[:1]
    problems = module.problems(torch.device("cuda"))
    return [problem for problem in problems if chosen(problem.title)]


# ---- against whom ----------------------------------------------------------------------------------------------------


def linear_large(here: Here) -> bool:
    return bench(here, _of(here, linear_kl, lambda title: "T 8192 V 128256" in title))


def linear_narrow(here: Here) -> bool:
    return bench(here, _of(here, linear_kl, lambda title: "V 32128" in title))


def linear_odd(here: Here) -> bool:
    return bench(here, _of(here, linear_kl, lambda title: "V 151643" in title))


def linear_short(here: Here) -> bool:
    return bench(here, _of(here, linear_kl, lambda title: "T 1024 " in title))


def logit(here: Here) -> bool:
    return bench(here, _of(here, logit_kl, _usual))


def relation(here: Here) -> bool:
    return bench(here, _of(here, relation_kl, lambda title: True))


def attention(here: Here) -> bool:
    return bench(here, _of(here, attention_kl, lambda title: True))


def cka(here: Here) -> bool:
    return bench(here, _of(here, cka_loss, lambda title: True))


# ---- alone -----------------------------------------------------------------------------------------------------------


def _by_blocks(problem: Problem) -> Problem:
    """With a row for each number of blocks."""

    def prepare() -> tuple[dict[str, Callable[[], Run]], Callable[[], tuple[Tensor, ...]]]:
        rows, oracle = problem.prepare()
        for blocks in BLOCKS:
            rows[f"fastkd, cuda, {blocks} blocks"] = lambda blocks=blocks: held_to(
                partial(gpu_rows, "cuda", blocks), rows[OURS]()
            )
        return rows, oracle

    names = (*problem.implementations, *(f"fastkd, cuda, {blocks} blocks" for blocks in BLOCKS))
    return replace(problem, implementations=names, prepare=prepare)


def alone(here: Here) -> bool:
    """fastkd and the limit; both kernels of rows, and the one in CUDA C++ by blocks."""
    problems = [p for m in (logit_kl, linear_kl, relation_kl, attention_kl, cka_loss) for p in _of(here, m, _usual)]
    found = []
    for problem in problems:
        ours = tuple(name for name in problem.implementations if name.startswith(OURS))
        problem = replace(problem, implementations=ours, targets=())
        rows = problem.title.startswith("logit_kl") and "cuda" in gpu_row_kernels()
        found.append(_by_blocks(problem) if rows else problem)
    return bench(here, found)


def _usual(title: str) -> bool:
    """Of logit_kl those in 16 bits, forward and backward, of vocabularies that are used."""
    return not title.startswith("logit_kl") or ("bfloat16, forward + backward" in title and "V 256000" not in title)


# ---- launches --------------------------------------------------------------------------------------------------------


def _on_the_host(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def autotune(here: Here) -> bool:
    """Candidates of kernels/tuning.py on the benchmarks' shapes, as far as time goes: lines to paste into its table."""
    from fastkd.kernels import tuning
    from tests.cases import running_on

    measure = _on_the_host if here.rehearsed else tuning._milliseconds
    told: list[str] = []

    def tell() -> None:
        for line in found.lines().splitlines()[len(told) :]:
            told.append(line)
            here.lines.write("launch", line=line)
            print(line, flush=True)

    def timer(run: Callable[[], object]) -> float:
        tell()  # of the kinds of launches before
        if here.left < 2:
            raise TimeoutError
        return measure(run)

    counts = counting()
    with running_on("triton"), tuning.autotune(timer) as found:
        for module in (relation_kl, attention_kl):
            for problem in _of(here, module, lambda title: True):
                try:
                    rows, _ = problem.prepare()
                    rows[OURS]()()
                except TimeoutError:
                    here.lines.write("left", case=problem.title)
                    print(f"no time for all of {problem.title}")
                tell()
    here.lines.write("cache", **counts)
    return bool(told)
