"""How benchmarks measure: within a time, with all that is known so far on the screen and in a file."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness import command, timing
from benchmarks.harness.command import Record, measured
from benchmarks.harness.measure import measure
from benchmarks.harness.problem import Problem, Run, Target
from benchmarks.harness.report import Table
from benchmarks.ops import linear_kl


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect() -> Iterator[None]:
    """Garbage collection, which looks at all that was imported, would take most of the seconds given here."""
    torch.compiler.reset()  # imports what takes a second, too
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def ones() -> tuple[torch.Tensor, ...]:
    return (torch.ones(4),)


def made_of(title: str = "made up", /, limit: Run = ones, **factories: Callable[[], Run]) -> Problem:
    """A problem with these implementations beside fastkd's, which takes no time."""
    rows: dict[str, Callable[[], Run]] = {"fastkd": lambda: ones, **factories}
    return Problem(title, "GB/s", 4e9, "limit", tuple(rows), lambda: (rows | {"limit": lambda: limit}, ones))


def slept(duration: float) -> tuple[torch.Tensor, ...]:
    time.sleep(duration)
    return ones()


def compiled_for_ever() -> Run:
    """As compilers do, it goes another way after an error."""
    with contextlib.suppress(Exception):
        time.sleep(600)
    return ones


def test_seconds_bound_every_candidate() -> None:
    """What is not ready in its share of the time has a row that says so, and stops no other."""
    begin = time.monotonic()
    rows = measure(made_of(hangs=compiled_for_ever), 3)["rows"]
    assert time.monotonic() - begin < 3.5
    share = re.fullmatch(r"not measured: not ready in its share of the time, (\d\.\d) s", rows["hangs"]["note"])
    assert share and 0.2 < float(share[1]) <= 1.5  # half of what is left, as two rows are
    for name in ("fastkd", "limit"):
        assert len(rows[name]["samples_s"]) >= 3 and rows[name]["note"] is None


def test_seconds_bound_the_rounds() -> None:
    """What is ready, but too slow for three rounds, is left out of them."""
    begin = time.monotonic()
    rows = measure(made_of(limit=lambda: slept(1)), 4)["rows"]
    assert time.monotonic() - begin < 4.5
    assert re.fullmatch(r"not measured: a run takes 1\.\d s, no time for 3 rounds", rows["limit"]["note"])
    assert rows["limit"]["first_s"] >= 1 and "min_s" not in rows["limit"]
    assert len(rows["fastkd"]["samples_s"]) >= 3 and rows["fastkd"]["note"] is None


def test_seconds_bound_the_inputs() -> None:
    problem = replace(made_of(), prepare=lambda: slept(600))
    record = Record({}, [problem], None)
    assert not measured([problem], record, 0.2, 60, 3, lambda result: None)
    notes = {row["note"] for row in record.results[0]["rows"].values()}
    assert notes == {"not measured: inputs and fp64 alone take more than 0.2 s"}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Callable[..., str | int | None]]]:
    """The file of results, and a run of a benchmark's command line with it; its exit code."""
    file, before = tmp_path / "out.json", signal.getsignal(signal.SIGTERM)

    def run(*problems: Problem, options: tuple[str, ...] = ()) -> str | int | None:
        monkeypatch.setattr(sys, "argv", ["made_up", "--device", "cpu", "--json", str(file), *options])
        with pytest.raises(SystemExit) as end:
            command.main(lambda device, quick: list(problems), "Made up.")
        return end.value.code

    yield file, run
    signal.signal(signal.SIGTERM, before)


def test_rows_are_saved_and_told_as_they_are_measured(
    bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, run = bench
    monkeypatch.setattr(command, "SAVE_S", 0)
    monkeypatch.setattr(command, "SAY_S", 0)
    seen = []

    def look() -> tuple[torch.Tensor, ...]:
        out, err = capsys.readouterr()
        seen.append((json.loads(file.read_text())["results"], out, err))
        return ones()

    def two() -> Run:
        look()
        return look

    assert run(made_of("first", two=two), made_of("second")) == 0
    (first, second), out, err = seen[0]  # before it is made ready
    assert out.splitlines()[-1].startswith("implementation")
    assert re.match(r"first\n +\d+\.\d s  fastkd: \d+\.\d ms, \d+ MiB, error 0", err)
    assert first["rows"]["fastkd"]["first_s"] > 0 and "min_s" not in first["rows"]["fastkd"]
    assert first["rows"]["two"] == second["rows"]["fastkd"] == {"note": "not reached"}
    (first, _), out, err = seen[6]  # in the third round, after one to be ready, three runs of its own, and two rounds
    assert [len(row["samples_s"]) for row in first["rows"].values()] == [2, 2, 2]
    assert first["rows"]["two"]["ratio"] == first["rows"]["two"]["min_s"] / first["rows"]["fastkd"]["min_s"]
    assert re.fullmatch(r" +\d+\.\d s  rounds 2: fastkd .* ms, two .* ms, limit .* ms\n", err)
    out = capsys.readouterr().out
    assert out.index("\nfirst\nfastkd ") < out.index("\nsecond\nfastkd ")


def test_interrupted_run_leaves_what_it_has(bench, capsys: pytest.CaptureFixture[str]) -> None:
    """By a time limit's signal, or by Ctrl-C."""
    file, run = bench

    def interrupts() -> Run:
        os.kill(os.getpid(), signal.SIGTERM)
        return ones

    assert run(made_of("first"), made_of("second", peer=interrupts), made_of("third")) == 130
    first, second, third = json.loads(file.read_text())["results"]
    assert len(first["rows"]["fastkd"]["samples_s"]) >= 3
    assert second["rows"]["fastkd"]["first_s"] > 0
    assert second["rows"]["peer"] == second["rows"]["limit"] == third["rows"]["fastkd"] == {"note": "not reached"}
    out, err = capsys.readouterr()
    assert "\nfirst\n" in out and re.search(r"\nsecond\nfastkd .*\npeer .* not reached\n", out) and "third" not in out
    assert err.splitlines()[-1] == "made_up: interrupted in problem 2 of 3"
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_one_problem_that_fails_stops_no_other(bench, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> Run:
        raise ZeroDivisionError("broken")

    file, run = bench
    failing = replace(made_of("first"), prepare=broken, targets=(Target("ms", 1),))
    assert run(failing, made_of("second")) == 1
    first, second = json.loads(file.read_text())["results"]
    assert first["rows"]["fastkd"] == {"note": "failed: broken"} and first["targets"][0]["met"] is None
    assert len(second["rows"]["fastkd"]["samples_s"]) >= 3
    out, err = capsys.readouterr()
    assert re.search(r"^fastkd  .*failed: broken$", out, re.MULTILINE) and "ZeroDivisionError" in err


def test_small_shapes_are_held_to_no_target(bench, capsys: pytest.CaptureFixture[str]) -> None:
    file, run = bench
    problem = replace(made_of("small"), targets=(Target("limit", 1e-9), Target("memory", 1e9)))
    for options, targets in [((), 2), (("--quick",), 0)]:
        assert run(problem, options=options) == 0
        out = capsys.readouterr().out
        assert len(re.findall("NOT MET|, met", out)) == targets
        assert len(json.loads(file.read_text())["results"][0]["targets"]) == targets


def test_no_budget_is_no_failure() -> None:
    problem = made_of()
    record = Record({}, [problem], None)
    assert measured([problem], record, 600, -1, 3, lambda result: None)
    assert record.results[0]["rows"]["limit"] == {"note": "not run: the time was up"}


def test_missing_peer_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Liger its row says so."""
    for name in ("liger_kernel", "liger_kernel.chunked_loss"):
        monkeypatch.setitem(sys.modules, name, None)
    (problem,) = linear_kl.problems(torch.device("cpu"), quick=True)
    problem = replace(problem, implementations=("fastkd", "Liger"), targets=())
    table = Table(problem.row_names).problem(measure(problem, 600, 3))
    assert re.search(r"^Liger .*  not installed$", table, re.MULTILINE)


def test_targets_are_judged() -> None:
    rows: dict[str, dict] = {"fastkd": {"min_s": 0.05, "peak_mib": 10.0, "of_limit": 0.7}}
    rows["peer"] = {"min_s": 0.1, "peak_mib": 40.0}
    for quantity, bound, expected in (
        ("peer", 0.4, 0.5),
        ("ms", 49, 50),
        ("memory", 9, 10),
        ("memory / peer", 0.2, 0.25),
        ("of limit", 0.8, 0.7),
    ):
        found = Target(quantity, bound).judged(rows)
        assert found["measured"] == pytest.approx(expected) and found["met"] is False
        assert Target(quantity, expected).judged(rows)["met"] is True
        nothing: dict[str, dict] = {name: {"note": "no"} for name in rows}
        assert Target(quantity, bound).judged(nothing)["met"] is None


class Clocks:
    """A host and a GPU with a clock each. What the host queues begins when it is queued and all before it is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.device = 0.0
        fake = SimpleNamespace(zero_=lambda: self.launch(0, 60e-6))
        monkeypatch.setattr(timing, "_larger_than_cache", lambda device: fake)
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.host))
        monkeypatch.setattr(torch.cuda, "Event", partial(Event, self))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda clocks: self.launch(0, clocks / 2e9))
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)

    def launch(self, host_s: float, device_s: float) -> None:
        self.host += host_s
        self.device = max(self.host, self.device) + device_s

    def wait(self) -> None:
        self.host = max(self.host, self.device)


class Event:
    def __init__(self, clocks: Clocks, enable_timing: bool) -> None:
        self.clocks = clocks

    def record(self) -> None:
        self.at = max(self.clocks.host, self.clocks.device)

    def query(self) -> bool:
        return self.clocks.host >= self.at

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


@pytest.mark.parametrize("launches", [1, 5, 30, 100, 1000])
def test_the_device_is_timed_and_not_the_host(launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of launches of 10 microseconds that take the host 100 each, and of which at most 16 ms can be queued ahead."""
    clocks, calls = Clocks(monkeypatch), 0

    def run() -> tuple[torch.Tensor, ...]:
        nonlocal calls
        calls += 1
        for _ in range(launches):
            clocks.launch(100e-6, 10e-6)
        return ()

    gpu = torch.device("cuda")
    kernel = timing.seconds(run, gpu)
    if launches < 1000:
        assert kernel == pytest.approx(launches * 10e-6)
    else:  # not all can be kept apart
        assert launches * 10e-6 < kernel < launches * 100e-6
    assert timing.as_called(run, gpu) == pytest.approx(launches * 100e-6 + 10e-6)
    calls = 0
    assert timing.seconds(run, gpu) == pytest.approx(kernel) and calls == 1  # it is known how long to hold the device


def test_a_gpu_busy_for_long_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(monkeypatch)
    assert timing.seconds(lambda: clocks.launch(0.01, 2.0) or (), torch.device("cuda")) == pytest.approx(2.0)
