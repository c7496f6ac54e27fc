"""Compiles beforehand, for a GPU elsewhere, what kernels Triton would have to compile there: a cache to be carried.

The launches of the phases `triton` and `times` are made on a CPU's tensors, of small sizes that Triton specialises as
the real ones, and stop where a kernel would start. Triton names a binary by its source, its options and all of Triton
itself, in the wheel for the Python that is there: that wheel's files give the name, the one for this Python compiles.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.device import checks
from benchmarks.device.pool import serve
from benchmarks.gpu.compile.common import launches
from benchmarks.ops import attention_kl, cka_loss, linear_kl, logit_kl, relation_kl
from fastkd import backend
from fastkd.kernels import tuning
from tests.place import Place, Run, arguments, value_and_gradients

TRITON_THERE = "FASTKD_TRITON_THERE"  # the folder of that wheel's files
TARGET = "sm_90"
MODULES = {
    module.__name__.split(".")[-1]: module for module in (logit_kl, linear_kl, relation_kl, attention_kl, cka_loss)
}
# Multiples of 16, as the real ones. Widths of heads matter to attention, and of models to nothing but GEMMs.
SMALL: dict[str, dict[str, int]] = {
    "logit_kl": {"tokens": 64},
    "linear_kl": {"tokens": 1024, "teacher_width": 64, "student_width": 64},
    "relation_kl": {"batch": 16},
    "attention_kl": {"batch": 16},
    "cka_loss": {"tokens": 2048, "pairs": 1},  # enough for covariances
}


def named_as_there(folder: Path) -> None:
    """From now on Triton names binaries as the one whose files these are."""
    from triton.runtime import cache

    own: Any = getattr(cache.triton_key, "__wrapped__", cache.triton_key)
    variables = {**own.__globals__, "__file__": str(folder / "triton" / "runtime" / "cache.py")}
    key = types.FunctionType(own.__code__, variables)()
    cache.triton_key = lambda: key


def names() -> list[str]:
    """Of what can be compiled, first what is needed most: the benchmarks' problems, by module and number, and cases."""
    counts = {name: len(module.problems(torch.device("cuda"))) for name, module in MODULES.items()}
    problems = [f"{name} {i}" for name, count in counts.items() for i in range(count)]
    tuned = [f"{name}, tuned" for name in problems if not name.startswith(("logit", "linear", "cka"))]
    return [*problems, *(case.name for case in checks.cases("triton", False)), *tuned]


def of_problem(name: str) -> Run:
    module, i = name.split()
    problem: Any = MODULES[module].problems(torch.device("cuda"))[int(i)]
    shape: Any = problem.prepare.args[0]
    shape = replace(shape, **SMALL[module])
    rows, _ = problem.prepare.func(shape, torch.device("cpu"))
    run: Run = rows["fastkd"]()
    return run


def of_case(name: str) -> Run:
    case = checks.Case(*name.split("; "))
    place = Place(torch.device("cpu"))
    place.real = True  # its sizes
    inputs, options = arguments(checks.BY_NAME[case.op], place, checks.DTYPES[case.dtype])
    if case.divergence != "-":
        options["divergence"] = case.divergence
    return lambda: value_and_gradients(checks.BY_NAME[case.op], inputs, **options)


def untimed(run: Callable[[], object]) -> float:
    run()
    return 0.0


def compiled(name: str) -> dict:
    """How many launches there are in a case or a problem, all of them compiled; where it is tuned, every candidate."""
    name, _, tuned = name.partition(", ")
    run = of_case(name) if ";" in name else of_problem(name)
    with launches(TARGET) as found, tuning.autotune(untimed) if tuned else contextlib.nullcontext():
        run()
    return {"problem": None, "launches": len(found)}


if __name__ == "__main__":
    if "--list" in sys.argv:
        print("\n".join(names()))
        sys.exit()
    named_as_there(Path(os.environ[TRITON_THERE]))
    with backend.interpret_triton():  # nothing is interpreted, as nothing is launched
        serve(compiled, checks.counting())
