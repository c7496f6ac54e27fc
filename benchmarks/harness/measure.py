"""Measures implementations of one op beside each other: time, achieved rate, peak memory and error.

Each is made ready and run once for its memory, its error and a first time, then all are timed in turns (timing.py says
why). A problem has so many seconds for all of it, from its inputs to its last round. What is left of them when the
inputs are there is shared alike by what is still to be made ready, less three rounds of what is ready: what needs more
has a row that says so.

pytest-benchmark's fixture times one function after the other; it is therefore handed the samples taken here
(test_with_pytest.py) and does the statistics and the bookkeeping.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.harness.memory import peak_memory, release_memory
from benchmarks.harness.problem import OURS, Problem, Run
from benchmarks.harness.timing import TimeUp, as_called, seconds, turns, within

FEWEST, MOST = 3, 50  # rounds
ENOUGH_S = 60  # of rounds, if there are the fewest
NOT_REACHED = "not reached"

# Gets what is known so far, with "" at a problem's beginning, a row's name when it is ready, None after a round.
Tell = Callable[[dict, str | None], None]


def relative_error(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest of the tensors' relative errors, in the Frobenius norm."""
    errors = [
        torch.linalg.vector_norm(value.detach().double() - exact) / torch.linalg.vector_norm(exact)
        for value, exact in zip(values, expected, strict=True)
    ]
    return max(float(error) for error in errors)


def not_measured(problem: Problem, why: str) -> dict:
    """What `measure` would return, without measurements."""
    result = {
        "problem": problem.title,
        "unit": problem.unit,
        "counts": problem.counts,
        "limit": problem.limit,
        "rows": {name: {"note": why} for name in problem.row_names},
    }
    return result | {"targets": [target.judged(result["rows"]) for target in problem.targets]}


def measure(problem: Problem, limit_s: float, most: int = MOST, tell: Tell = lambda result, name: None) -> dict:
    """All implementations of a problem, timed in turns within `limit_s` seconds, as one JSON object."""
    end = time.monotonic() + limit_s
    result = not_measured(problem, NOT_REACHED)
    tell(result, "")
    torch.compiler.reset()
    try:
        with within(end - time.monotonic()):
            release_memory()
            factories, oracle = problem.prepare()
            expected = oracle()
    except TimeUp:
        return not_measured(problem, f"not measured: inputs and fp64 alone take more than {limit_s:.3g} s")
    device = expected[0].device
    runs = _ready(problem, factories, expected, result, end, tell)
    del expected

    rows = result["rows"]
    rounds = min(most, _rounds_that_fit(runs, rows, end - time.monotonic()))
    try:
        with within(end - time.monotonic()):
            for samples in turns(runs, rounds, device):
                for name, times in samples.items():
                    rows[name] |= {"samples_s": [*times], "min_s": min(times), "median_s": statistics.median(times)}
                _compare(problem, result)
                tell(result, None)
    except TimeUp:
        for row in (rows[name] for name in runs):
            done = len(row.get("samples_s", ()))
            if done < FEWEST:
                _note(row, f"{done} rounds: the time was up" if done else "not measured: the time was up")
    return result


def _ready(
    problem: Problem,
    factories: dict[str, Callable[[], Run]],
    expected: tuple[Tensor, ...],
    result: dict,
    end: float,
    tell: Tell,
) -> dict[str, Run]:
    """The runs of what can run, each after a warm-up; their rows get what one run tells."""
    runs: dict[str, Run] = {}
    rows = result["rows"]
    for i, name in enumerate(rows):
        rounds = FEWEST * sum(rows[ready]["first_s"] for ready in runs)
        share = (end - time.monotonic() - rounds) / (len(rows) - i)
        try:
            with within(share):
                if len(runs) < i:
                    release_memory()  # of what did not fit, perhaps
                run, row = _first_run(factories[name](), expected, with_outputs=name != problem.limit)
        except TimeUp:
            row = {"note": f"not measured: not ready in its share of the time, {max(0.0, share):.1f} s"}
        except Exception as problem_found:  # a compiler's, perhaps: one row's, not the others'
            row = {"note": (str(problem_found) or type(problem_found).__name__).splitlines()[0]}
        else:
            runs[name] = run
        rows[name] = row
        _compare(problem, result)
        tell(result, name)
    return runs


def _first_run(run: Run, expected: tuple[Tensor, ...], with_outputs: bool) -> tuple[Run, dict]:
    device = expected[0].device
    run()  # warm-up
    row = {"note": getattr(run, "note", None)}
    if with_outputs:
        outputs, row["peak_mib"] = peak_memory(run, device)
        if not getattr(run, "of_another_objective", False):
            row["error"] = relative_error(outputs, expected)
        del outputs
    row["first_s"] = seconds(run, device)
    if device.type == "cuda":  # elsewhere it is the time
        row["called_s"] = min(as_called(run, device) for _ in range(FEWEST))
    return run, row


def _rounds_that_fit(runs: dict[str, Run], rows: dict[str, dict], left: float) -> int:
    """How many; while not even the fewest do, the slowest run is left out, fastkd last."""
    while runs and FEWEST * sum(rows[name]["first_s"] for name in runs) > left:
        slowest = max(runs, key=lambda name: (name != OURS, rows[name]["first_s"]))
        del runs[slowest]
        _note(rows[slowest], f"not measured: a run takes {rows[slowest]['first_s']:.1f} s, no time for {FEWEST} rounds")
    one = sum(rows[name]["first_s"] for name in runs)
    return max(FEWEST, int(min(ENOUGH_S, left) / one)) if runs else 0


def _note(row: dict, text: str) -> None:
    row["note"] = f"{row['note']}; {text}" if row["note"] else text


def _compare(problem: Problem, result: dict) -> None:
    """What follows from all rows that have a time."""
    rows = result["rows"]
    timed = [row for row in rows.values() if "min_s" in row]
    ours, limit = rows[OURS], rows[problem.limit]
    for row in timed:
        work = problem.limit_work if row is limit and problem.limit_work is not None else problem.work
        row["rate"] = work / row["min_s"] / 1e9
        row["ratio"] = row["min_s"] / ours["min_s"] if "min_s" in ours else None
    if "rate" in limit:
        for row in timed:
            row["of_limit"] = row["rate"] / limit["rate"]
    result["targets"] = [target.judged(rows) for target in problem.targets]
