"""Compiles what tests/test_compile_gpu.py checks, of several modules in one pool, and prints JSON by module.

python -m benchmarks.gpu.compile.several cuda rows topk
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from .common import in_parallel


def _module(name: str) -> Any:
    return importlib.import_module(f"benchmarks.gpu.compile.{name}")


def measure(case: tuple[str, Any]) -> list[dict]:
    name, its = case
    measured = _module(name).measure(its)
    return measured if isinstance(measured, list) else [measured]


def main() -> None:
    names = sys.argv[1:]
    cases = [(name, case) for name in names for case in _module(name).chosen()]
    found: dict[str, Any] = {name: [] for name in names}
    for (name, _), measured in zip(cases, in_parallel(measure, cases), strict=True):
        found[name] += measured
    if "rows" in names:
        found["two_sum"] = _module("rows").two_sum_operations()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
