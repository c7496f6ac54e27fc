"""Every benchmark, in one table; `make bench` calls it."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from harness import Problem
from report import main


def problems(device: torch.device, quick: bool = False) -> list[Problem]:
    modules = [importlib.import_module(path.stem) for path in sorted(Path(__file__).parent.glob("bench_*.py"))]
    return [problem for module in modules for problem in module.problems(device, quick)]


if __name__ == "__main__":
    main(problems, __doc__)
