"""The rounds of a schedule as a report shows them: a table, why the student came about as it did, and pictures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..report.page import Picture, Table
from ..report.plots import MARKERS, figure, finite, label_of
from .schedule import Round, Schedule


def shown(schedule: Schedule | None) -> dict[str, Any]:
    """Return what `report.write` is to show, and to keep, of a schedule: its tables, pictures and record."""
    if schedule is None:
        return {}
    return {"tables": [_table(schedule)], "pictures": _pictures(schedule), "besides": {"schedule": schedule.to_json()}}


# Units of training's work and time, the largest first, and what each is in billions of operations and in seconds.
_GFLOPS = {"EFLOP": 1e9, "PFLOP": 1e6, "TFLOP": 1e3, "GFLOP": 1.0, "MFLOP": 1e-3}
_SECONDS = {"minutes": 60.0, "seconds": 1.0}


def _unit(total: float, units: Mapping[str, float]) -> tuple[str, float]:
    """Return the name and size of the largest unit that `total` is at least one of, or of the smallest."""
    return next(((name, size) for name, size in units.items() if total >= size), list(units.items())[-1])


def _percent(share: float) -> str:
    return f"{100 * share:g}"


def _table(schedule: Schedule) -> Table:
    """Return the rounds of a schedule, their sums, and why its student came about as it did."""
    work, gflops = _unit(schedule.gflops, _GFLOPS)
    time, seconds = _unit(schedule.seconds, _SECONDS)
    metric = f"{_metric(schedule)} (%)"
    header = ["round", "teacher", "trained at (%)", "chosen (%)", metric, "steps", f"training {work}", time]

    def sums(of: Round | Schedule) -> list[str]:
        return [str(of.steps), f"{of.gflops / gflops:.3f}", f"{of.seconds / seconds:.2f}"]

    rows = [
        [
            entry.name,
            "teacher" if entry.teacher is None else f"{_percent(entry.teacher)} %",
            ", ".join(_percent(candidate.sparsity) for candidate in entry.candidates),
            _percent(entry.chosen),
            f"{100 * entry.best.metric:.2f}",
            *sums(entry),
        ]
        for entry in schedule.rounds
    ]
    meaning = (
        "Sub-networks go by their sparsity, the share of heads and of neurons that is pruned. Training's "
        "floating-point operations are those of linear layers, two for each multiply-accumulate, forward and "
        "backward, the teacher's included; times leave evaluations out."
    )
    return Table(
        "Schedule",
        [header, *rows, ["sum", "", "", "", "", *sums(schedule)]],
        [_why(schedule), meaning],
        numbers=True,
    )


def _metric(schedule: Schedule) -> str:
    return schedule.metric.replace("_", " ")


def _why(schedule: Schedule) -> str:
    """Return which assistant, or which trial, was chosen and why."""
    trial, last = schedule.chosen, schedule.chosen.rounds[-1]
    places = " and ".join(f"{_percent(sparsity)} %" for sparsity in trial.assistants)
    assistants = f"the assistant{'s' * (len(trial.assistants) > 1)} at {places}" if places else "no assistant"
    if len(schedule.trials) > 1:
        return (
            f"Of {len(schedule.trials)} trials the one with {assistants} made the best student: "
            f"{_metric(schedule)} {100 * trial.student.metric:.2f} %."
        )
    choices = [
        f"Of {len(entry.candidates)} candidates {'the student itself' if entry is last else 'the assistant'} "
        f"at {_percent(entry.chosen)} % has the largest tradeoff, metric + lambda * sparsity = {entry.best.metric:.4f} "
        f"+ {schedule.tradeoff_lambda:g} * {entry.chosen:g} = {entry.best.tradeoff:.4f}."
        for entry in _sandwiches(schedule)
    ]
    return " ".join(choices) or f"The student was distilled with {assistants}: nothing was left to choose."


def _sandwiches(schedule: Schedule) -> list[Round]:
    """Return the rounds of several candidates."""
    return [entry for entry in schedule.rounds if len(entry.candidates) > 1]


def _pictures(schedule: Schedule) -> list[Picture]:
    """Return the picture of what a schedule chose from; none if it had no choice: one trial, of single candidates."""
    held_out, labels, notes = f"held-out {_metric(schedule)}", [], []
    if _sandwiches(schedule):
        labels += [f"{held_out} (%)", f"tradeoff: metric + {schedule.tradeoff_lambda:g} * sparsity"]
        notes.append(
            "Sub-networks that were trained together, each at its best evaluation; the ring is the student. "
            "The tradeoff is the metric plus lambda times the sparsity: it rises where pruning more costs less of the "
            "metric than that. The star is its largest value; that sub-network went on."
        )
    if len(schedule.trials) > 1:
        labels.append(f"{held_out} of the student (%)")
        notes.append(
            "Each trial's student over the sparsity of the assistant that it was distilled from; the star is the best "
            "one, which was kept. A dashed line is a trial without an assistant."
        )
    if not labels:
        return []
    with figure(*labels, over="sparsity (%)") as (png, panels):
        if _sandwiches(schedule):
            _draw_candidates(panels[0], panels[1], schedule)
        if len(schedule.trials) > 1:
            _draw_students(panels[-1], schedule)
    return [Picture("tradeoff_curve.png", png.getvalue(), "Choices of the schedule", " ".join(notes))]


def _draw_candidates(held_out: Any, tradeoff: Any, schedule: Schedule) -> None:
    """Draw metric and tradeoff of the candidates of each sandwich round, a star at the one that went on."""
    for entry, marker in zip(_sandwiches(schedule), itertools.cycle(MARKERS), strict=False):
        style: dict[str, Any] = {"marker": marker, "markersize": 5, "label": label_of(entry.name)}
        sparsities = [100 * candidate.sparsity for candidate in entry.candidates]
        held_out.plot(sparsities, finite([100 * candidate.metric for candidate in entry.candidates]), **style)
        (line,) = tradeoff.plot(sparsities, finite([c.tradeoff for c in entry.candidates]), **style)
        _star(tradeoff, entry.chosen, entry.best.tradeoff, line.get_color())
    student = schedule.chosen.student  # as a ring: it may be one of the candidates
    ring = {"marker": "o", "markersize": 13, "markerfacecolor": "none", "linestyle": "none", "color": "black"}
    held_out.plot([100 * student.sparsity], finite([100 * student.metric]), label="student", **ring)


def _draw_students(axes: Any, schedule: Schedule) -> None:
    """Draw each trial's student over the sparsity of its (last) assistant, a star at the best."""
    axes.set_xlabel("assistant's sparsity (%)")
    best = schedule.chosen
    trials = sorted((trial for trial in schedule.trials if trial.assistants), key=lambda trial: trial.assistants[-1])
    metrics = finite([100 * trial.student.metric for trial in trials])
    axes.plot([100 * trial.assistants[-1] for trial in trials], metrics, marker="o", markersize=5, label="student")
    for trial in schedule.trials:
        if not trial.assistants and np.isfinite(trial.student.metric):
            label = "no assistant (best)" if trial is best else "no assistant"
            axes.axhline(100 * trial.student.metric, label=label, linestyle="--", color="grey")
    if best.assistants:
        _star(axes, best.assistants[-1], 100 * best.student.metric, "C0")


def _star(axes: Any, sparsity: float, value: float, colour: str) -> None:
    """Mark what was chosen and write its sparsity, 0 to 1, above it."""
    star = {"marker": "*", "markersize": 16, "markeredgecolor": "black", "linestyle": "none", "zorder": 3}
    axes.plot([100 * sparsity], [value], color=colour, **star)
    axes.annotate(f"{_percent(sparsity)} %", (100 * sparsity, value), (0, 10), textcoords="offset points", ha="center")
    axes.margins(y=0.15)  # room for the text, which stands at the top
