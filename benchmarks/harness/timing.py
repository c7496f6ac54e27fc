"""Time: of a run, of several in turns, and the end of what may be taken.

The speed of a machine drifts over seconds, with its clock and its other users, by more than implementations differ.
So they are timed in turns: a round runs each of them once, every round starts with the next one, and two of them are
compared by their fastest rounds, because another process can only ever slow a run down. The limit (bare GEMMs, a
copy) takes part in the rounds like the rest.

On a GPU two events around a run tell its time. Before the first, a buffer larger than the second-level cache is
overwritten, so that no run finds its inputs in the cache, and the device is kept busy until the host has queued all of
the run: else it would be the host's launches that are timed. What those add for a caller with nothing else queued is a
time of its own, "as called".
"""

from __future__ import annotations

import contextlib
import functools
import signal
import time
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.harness.problem import Run

HOLDS = (2_000_000, 8_000_000, 32_000_000)  # clocks of the device: about 1, 4 and 16 ms


class TimeUp(BaseException):
    """Not an Exception, which compilers catch to wrap it or to go another way."""


@contextlib.contextmanager
def within(limit_s: float) -> Iterator[None]:
    """Raises TimeUp in the main thread's block after so many seconds: at once in Python, in C++ when it returns."""

    def stop(number: int, frame: object) -> None:
        raise TimeUp

    if limit_s <= 0:
        raise TimeUp
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@functools.cache
def _larger_than_cache(device: torch.device) -> Tensor:
    return torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)


_needed: weakref.WeakKeyDictionary[Run, int] = weakref.WeakKeyDictionary()  # the hold that was enough for a run


def seconds(run: Run, device: torch.device) -> float:
    """Of the device's work, however long the host takes to ask for it; where a run waits for the device, with that."""
    if device.type != "cuda":
        return as_called(run, device)
    elapsed = 0.0
    for clocks in HOLDS[_needed.get(run, 0) :]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _larger_than_cache(device).zero_()
        torch.cuda._sleep(clocks)
        start.record()
        outputs = run()
        end.record()
        queued_in_time = not start.query()
        torch.cuda.synchronize()
        elapsed = start.elapsed_time(end) / 1e3
        del outputs
        _needed[run] = HOLDS.index(clocks)
        if queued_in_time:
            break
    return elapsed


def as_called(run: Run, device: torch.device) -> float:
    """From the call to its results, on a device with nothing else to do."""
    if device.type == "cuda":
        _larger_than_cache(device).zero_()
        torch.cuda.synchronize()
    begin = time.perf_counter()
    outputs = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - begin
    del outputs
    return elapsed


def turns(runs: dict[str, Run], rounds: int, device: torch.device) -> Iterator[dict[str, list[float]]]:
    """The times of every run so far, after each round."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(seconds(runs[name], device))
        yield samples


def in_turns(runs: dict[str, Run], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """The times of every run in every round."""
    *_, samples = turns(runs, rounds, device)
    return samples


def fastest(candidates: dict[str, Run], device: torch.device) -> tuple[str, Run]:
    """The best of some variants of one implementation, by three rounds of which the first warms up."""
    samples = in_turns(candidates, 3, device)
    name = min(samples, key=lambda name: min(samples[name][1:]))
    return name, candidates[name]
