"""Measures implementations of one op beside each other: time, achieved rate, peak memory and error.

The speed of a machine drifts over seconds, with its clock and its other users, by more than implementations differ.
So they are timed in turns: a round runs each of them once, every round starts with the next one, and two of them are
compared by their fastest rounds, because another process can only ever slow a run down. The limit (bare GEMMs, a
copy) takes part in the rounds like the rest. pytest-benchmark's fixture times one function after the other; it is
therefore handed the samples taken here (test_with_pytest.py) and does the statistics and the bookkeeping.

On a GPU two events around a run tell its time. Before the first, a buffer larger than the second-level cache is
overwritten: no run finds its inputs in the cache, and its first launches are queued while the device is still busy.

A run returns the tensors that its caller would keep: gradients, or the loss. Peak memory is what it took beyond its
inputs and these, in units of 2**20 bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MIB = 2**20
OURS = "fastkd"

Run = Callable[[], tuple[Tensor, ...]]


class Unavailable(Exception):
    """Says why an implementation cannot run here."""


def not_importable(package: str, error: ImportError) -> Unavailable:
    missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == package
    return Unavailable("not installed" if missing else str(error))


@dataclass(frozen=True)
class Target:
    """A bound on fastkd's time over that of another row or in milliseconds ("ms"), on its peak memory in MiB ("memory")
    or over that of another row ("memory / ROW"); or the least share of the limit ("of limit")."""

    quantity: str
    bound: float

    @property
    def relation(self) -> str:
        return ">=" if self.quantity == "of limit" else "<="

    def holds(self, measured: float) -> bool:
        return measured >= self.bound if self.relation == ">=" else measured <= self.bound


@dataclass(frozen=True)
class Problem:
    title: str
    unit: str  # "GFLOP/s" or "GB/s"
    work: float  # FLOPs or bytes that the op needs
    limit: str  # the row that shows how fast this machine does such work...
    limit_work: float  # ...and how much of it one of its runs does
    implementations: tuple[str, ...]
    targets: tuple[Target, ...]
    # Allocates the inputs; returns for each implementation and the limit a function that makes it ready to run, and the
    # function that computes what they should return in fp64.
    prepare: Callable[[], tuple[dict[str, Callable[[], Run]], Run]]
    counts: tuple[float, float] | None = None  # FLOPs and the fewest bytes through memory, for roofline.py


def held_to(context: Callable[[], contextlib.AbstractContextManager], run: Run) -> Run:
    """The run within a context."""

    def held() -> tuple[Tensor, ...]:
        with context():
            return run()

    return held


# ---- one quantity each -----------------------------------------------------------------------------------------------


@functools.cache
def _larger_than_cache(device: torch.device) -> Tensor:
    return torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)


def seconds(run: Run, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _larger_than_cache(device).zero_()
        start.record()
        outputs = run()
        end.record()
        torch.cuda.synchronize()
        elapsed = start.elapsed_time(end) / 1e3
    else:
        begin = time.perf_counter()
        outputs = run()
        elapsed = time.perf_counter() - begin
    del outputs
    return elapsed


def in_turns(runs: dict[str, Run], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """The times of every run in every round."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(seconds(runs[name], device))
    return samples


def fastest(candidates: dict[str, Run], device: torch.device) -> tuple[str, Run]:
    """The best of some variants of one implementation, by three rounds of which the first warms up."""
    samples = in_turns(candidates, 3, device)
    name = min(samples, key=lambda name: min(samples[name][1:]))
    return name, candidates[name]


def noted(run: Run, note: str) -> Run:
    """The run with a remark for the table."""

    def with_note() -> tuple[Tensor, ...]:
        return run()

    with_note.note = note  # type: ignore[attr-defined]
    return with_note


def _status_bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak_memory(run: Run, device: torch.device) -> tuple[tuple[Tensor, ...], float | None]:
    """What a run returns, and the most it held beside that, in MiB; None where the system does not tell.

    A GPU's allocator counts. On Linux the process's high-water mark of resident memory is reset, after memory that
    earlier runs freed went back to the system. Call it after a warm-up, so that code and library buffers are there.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    elif os.access("/proc/self/clear_refs", os.W_OK):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        outputs = run()
        peak = _status_bytes("VmHWM") - before
    else:
        return run(), None
    return outputs, max(0, peak - sum(x.nbytes for x in outputs)) / MIB


def relative_error(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest of the tensors' relative errors, in the Frobenius norm."""
    errors = [
        torch.linalg.vector_norm(value.detach().double() - exact) / torch.linalg.vector_norm(exact)
        for value, exact in zip(values, expected, strict=True)
    ]
    return max(float(error) for error in errors)


# ---- a problem -------------------------------------------------------------------------------------------------------


def _result(problem: Problem, rows: dict[str, dict]) -> dict:
    return {
        "problem": problem.title,
        "unit": problem.unit,
        "counts": problem.counts,
        "limit": problem.limit,
        "rows": rows,
        "targets": [_judge(target, rows) for target in problem.targets],
    }


def not_measured(problem: Problem, why: str) -> dict:
    """What `measure` would return, without measurements."""
    return _result(problem, {name: {"note": why} for name in (*problem.implementations, problem.limit)})


def measure(problem: Problem, budget_s: float) -> dict:
    """All implementations of a problem, timed in turns for about `budget_s` seconds, as one JSON object."""
    torch.compiler.reset()
    _release_memory()
    factories, oracle = problem.prepare()
    expected = oracle()
    device = expected[0].device
    rows: dict[str, dict] = {name: {} for name in (*problem.implementations, problem.limit)}
    runs: dict[str, Run] = {}
    for name, row in rows.items():
        print(f"{problem.title}: {name}", file=sys.stderr, flush=True)
        try:
            run = factories[name]()
            run()  # warm-up
            outputs, peak = peak_memory(run, device)
        except Exception as problem_found:  # a compiler's, perhaps: one row's, not the others'
            row["note"] = (str(problem_found) or type(problem_found).__name__).splitlines()[0]
        else:
            runs[name] = run
            row["note"] = getattr(run, "note", None)
            if name != problem.limit:
                row["peak_mib"], row["error"] = peak, relative_error(outputs, expected)
            del outputs
        if "peak_mib" not in row:
            _release_memory()  # of what did not fit, perhaps
    del expected

    one_round = sum(samples[0] for samples in in_turns(runs, 1, device).values())
    for name, samples in in_turns(runs, min(50, max(3, math.ceil(budget_s / one_round))), device).items():
        rows[name] |= {"samples_s": samples, "min_s": min(samples), "median_s": statistics.median(samples)}
    for row in (rows[name] for name in runs):
        row["ratio"] = row["min_s"] / rows[OURS]["min_s"] if OURS in runs else None
        work = problem.limit_work if row is rows[problem.limit] else problem.work
        row["rate"] = work / row["min_s"] / 1e9
    for name in runs:
        if problem.limit in runs:
            rows[name]["of_limit"] = rows[name]["rate"] / rows[problem.limit]["rate"]
    return _result(problem, rows)


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _judge(target: Target, rows: dict[str, dict]) -> dict:
    ours = rows[OURS]
    if target.quantity == "memory":
        text, measured = f"{OURS} peak MiB", ours.get("peak_mib")
    elif target.quantity == "ms":
        text, measured = f"{OURS} ms", ours["min_s"] * 1e3 if "min_s" in ours else None
    elif target.quantity == "of limit":
        text, measured = f"{OURS} share of the limit", ours.get("of_limit")
    elif target.quantity.startswith("memory / "):
        text, peer = f"{OURS} {target.quantity}", rows[target.quantity.removeprefix("memory / ")].get("peak_mib")
        measured = ours["peak_mib"] / peer if peer and ours.get("peak_mib") is not None else None
    else:
        text, peer = f"{OURS} time / {target.quantity}", rows[target.quantity].get("min_s")
        measured = ours["min_s"] / peer if peer and "min_s" in ours else None
    met = None if measured is None else target.holds(measured)
    return {"target": text, "relation": target.relation, "bound": target.bound, "measured": measured, "met": met}
