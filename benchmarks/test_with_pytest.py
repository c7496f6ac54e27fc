"""`pytest benchmarks/ --benchmark-only`: the benchmarks under pytest-benchmark, with its statistics and comparisons.

All implementations of a problem are timed in turns when the first of its tests runs (harness/measure.py says why).
Every test then replays its samples on a clock of its own. FASTKD_BENCH_QUICK=1 takes the small shapes.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch

from benchmarks.harness.measure import FEWEST, MOST, measure
from benchmarks.harness.problem import Problem
from benchmarks.run import problems

QUICK = os.environ.get("FASTKD_BENCH_QUICK", "0") != "0"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROBLEMS: dict[str, Problem] = {problem.title: problem for problem in problems(DEVICE, QUICK)}


@functools.cache
def measured(title: str) -> dict:
    return measure(PROBLEMS[title], 600, FEWEST if QUICK else MOST)


class Clock:
    """A timer that stands still until it is told to pass some seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, elapsed: float) -> None:
        self.now += elapsed


clock = Clock()


@pytest.mark.parametrize(("title", "name"), [(title, name) for title, p in PROBLEMS.items() for name in p.row_names])
@pytest.mark.benchmark(timer=clock)
def test_benchmark(benchmark, title: str, name: str) -> None:
    row = measured(title)["rows"][name]
    if "samples_s" not in row:
        pytest.skip(row["note"])
    samples = iter(row["samples_s"])
    benchmark.group = title
    benchmark.extra_info.update({key: value for key, value in row.items() if key != "samples_s"})
    benchmark.pedantic(clock.pass_by, setup=lambda: ((next(samples),), {}), rounds=len(row["samples_s"]))
