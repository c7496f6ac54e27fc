"""Every benchmark, in one table; `make bench` calls it."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from harness import Problem
from report import main

NO_PROBLEMS = ("bench_scaling",)  # it compares numbers of ranks, not implementations, and prints tables of its own


def problems(device: torch.device, quick: bool = False) -> list[Problem]:
    names = [path.stem for path in sorted(Path(__file__).parent.glob("bench_*.py")) if path.stem not in NO_PROBLEMS]
    modules = [importlib.import_module(name) for name in names]
    return [problem for module in modules for problem in module.problems(device, quick)]


if __name__ == "__main__":
    main(problems, __doc__)
