"""The pictures of a report, as PNG files in memory."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .outcome import Outcome
    from .schedule import Candidate, Round, Schedule

POINTS = 400  # of a curve; a panel is about 450 pixels wide
LETTERS = 50  # of a name, so that a legend does not hide the curves
LINE = 45  # letters of an axis' label that a panel is high enough for
FEW = 50  # up to as many points are marked, and one alone could not be seen otherwise
MARKERS = "osD^vPX"  # one per series, for those whom colours do not help


def losses(outcomes: Sequence[Outcome]) -> bytes:
    """Draw held-out loss, and the loss each model minimises, over optimiser steps."""
    labels = "held-out loss (nats per token)", "training loss (each method's own)"
    with _figure(*labels) as (picture, (held_out, training)):
        for outcome in outcomes:
            if outcome.history:
                _plot(held_out, outcome, "eval_loss", outcome.name)
                _plot(training, outcome, "loss", outcome.name)
            elif np.isfinite(outcome.loss):
                held_out.axhline(outcome.loss, label=_label(outcome.name), linestyle="--", color="grey")
    return picture.getvalue()


def terms(outcomes: Sequence[Outcome]) -> bytes:
    """Draw the terms of each model's loss, and the gradient norms of encoder and decoder, over optimiser steps."""
    labels = "training loss by term", "encoder gradient norm", "decoder gradient norm"
    with _figure(*labels) as (picture, panels):
        by_term, *norms = panels
        for outcome in outcomes:
            for term in sorted({key for entry in outcome.history for key in entry if key.startswith("loss_")}):
                _plot(by_term, outcome, term, f"{outcome.name}: {term.removeprefix('loss_')}")
            for axes, key in zip(norms, ("grad_norm_encoder", "grad_norm_decoder"), strict=True):
                _plot(axes, outcome, key, outcome.name, up_to=f"{key}_max")
        for axes in panels:
            if any((line.get_ydata() > 0).any() for line in axes.lines):
                axes.set_yscale("log", nonpositive="mask")
    return picture.getvalue()


def tradeoff(schedule: Schedule) -> bytes | None:
    """Draw what a schedule chose from over sparsity: candidates, their tradeoff, and the student of each trial.

    Returns None if it had no choice: one trial, and one candidate in each of its rounds.
    """
    metric = schedule.metric.replace("_", " ")
    drawings: dict[str, Callable[[Any, Schedule], None]] = {}
    if any(len(entry.candidates) > 1 for entry in schedule.rounds):
        drawings[f"held-out {metric} (%)"] = _candidates
        drawings[f"tradeoff: metric + {schedule.tradeoff_lambda:g} * sparsity"] = _tradeoffs
    if len(schedule.trials) > 1:
        drawings[f"held-out {metric} of the student (%)"] = _students
    if not drawings:
        return None
    with _figure(*drawings, over="sparsity (%)") as (picture, panels):
        for axes, draw in zip(panels, drawings.values(), strict=True):
            draw(axes, schedule)
    return picture.getvalue()


def _candidates(axes: Any, schedule: Schedule) -> None:
    """Draw the metric of the candidates of each sandwich round, and of the student."""
    for entry, style in _sandwiches(schedule):
        axes.plot(_sparsities(entry.candidates), _finite([100 * c.metric for c in entry.candidates]), **style)
    student = schedule.chosen.student  # as a ring: it may be one of the candidates
    ring = {"marker": "o", "markersize": 13, "markerfacecolor": "none", "linestyle": "none", "color": "black"}
    axes.plot(_sparsities([student]), _finite([100 * student.metric]), label="student", **ring)


def _tradeoffs(axes: Any, schedule: Schedule) -> None:
    """Draw the tradeoff of the candidates of each sandwich round, a star at the one that went on."""
    for entry, style in _sandwiches(schedule):
        (line,) = axes.plot(_sparsities(entry.candidates), _finite([c.tradeoff for c in entry.candidates]), **style)
        _star(axes, entry.chosen, entry.best.tradeoff, line.get_color())


def _students(axes: Any, schedule: Schedule) -> None:
    """Draw each trial's student over the sparsity of its (last) assistant, a star at the best."""
    axes.set_xlabel("assistant's sparsity (%)")
    best = schedule.chosen
    trials = sorted((trial for trial in schedule.trials if trial.assistants), key=lambda trial: trial.assistants[-1])
    metrics = _finite([100 * trial.student.metric for trial in trials])
    axes.plot([100 * trial.assistants[-1] for trial in trials], metrics, marker="o", markersize=5, label="student")
    for trial in schedule.trials:
        if not trial.assistants and np.isfinite(trial.student.metric):
            label = "no assistant (best)" if trial is best else "no assistant"
            axes.axhline(100 * trial.student.metric, label=label, linestyle="--", color="grey")
    if best.assistants:
        _star(axes, best.assistants[-1], 100 * best.student.metric, "C0")


def _sandwiches(schedule: Schedule) -> Iterator[tuple[Round, dict[str, Any]]]:
    """Yield each round of several candidates and the style of its curve."""
    rounds = [entry for entry in schedule.rounds if len(entry.candidates) > 1]
    for entry, marker in zip(rounds, itertools.cycle(MARKERS), strict=False):
        yield entry, {"marker": marker, "markersize": 5, "label": _label(entry.name)}


def _sparsities(candidates: Sequence[Candidate]) -> list[float]:
    """Return the sparsities in percent."""
    return [100 * candidate.sparsity for candidate in candidates]


def _star(axes: Any, sparsity: float, value: float, colour: str) -> None:
    """Mark what was chosen and write its sparsity, 0 to 1, above it."""
    star = {"marker": "*", "markersize": 16, "markeredgecolor": "black", "linestyle": "none", "zorder": 3}
    axes.plot([100 * sparsity], [value], color=colour, **star)
    place = 100 * sparsity, value
    axes.annotate(f"{100 * sparsity:g} %", place, (0, 10), textcoords="offset points", ha="center")
    axes.margins(y=0.15)  # room for the text, which stands at the top


def _plot(axes: Any, outcome: Outcome, key: str, label: str, up_to: str | None = None) -> None:
    """Draw `key` of the log entries that hold it, with the space up to `up_to` shaded.

    Of more than POINTS entries neighbours become one point, their mean, with the space they are spread over shaded.
    """
    entries = [entry for entry in outcome.history if key in entry]
    if not entries:
        return
    steps, values, peaks = (_finite([entry.get(name) for entry in entries]) for name in ("step", key, up_to or key))
    stretches = np.array_split(np.arange(len(entries)), min(len(entries), POINTS))
    steps, means, lowest, highest = (
        np.array([summary(known) if len(known := numbers[s][~np.isnan(numbers[s])]) else np.nan for s in stretches])
        for summary, numbers in ((np.mean, steps), (np.mean, values), (np.min, values), (np.max, peaks))
    )
    axes.plot(steps, means, label=_label(label), marker="o" if len(steps) <= FEW else None, markersize=4)
    axes.fill_between(steps, lowest, highest, alpha=0.2, linewidth=0)


def _finite(values: Sequence[float | None]) -> np.ndarray:
    """Return the values as an array, NaN (a gap in a curve) where one is missing or infinite."""
    numbers = np.array(values, dtype=float)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _label(name: str) -> str:
    """Return a name as a legend can show it: matplotlib hides those with an underscore first, and fails at others."""
    printable = "".join(character if character.isprintable() else "?" for character in name[:LETTERS])
    return f" {printable}" if printable.startswith("_") else printable


@contextlib.contextmanager
def _figure(*labels: str, over: str = "step") -> Iterator[tuple[io.BytesIO, Sequence[Any]]]:
    """Yield a file, into which the picture is written in the end, and one panel per label over `over`."""
    # Its first use on a machine would print that it is building a font cache.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A page shows every picture at its full width, so a panel alone is as wide as two.
    figure = Figure(figsize=(5 * max(len(labels), 2), 4), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: no display and no global state
    panels = figure.subplots(1, len(labels), squeeze=False)[0]
    for axes, label in zip(panels, labels, strict=True):
        axes.set_xlabel(over)
        axes.set_ylabel(textwrap.fill(label, LINE))
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    yield picture, panels
    for axes in panels:
        if axes.get_legend_handles_labels()[1]:
            for text in axes.legend().get_texts():
                text.set_parse_math(False)  # names may hold a dollar sign
    figure.savefig(picture, format="png", dpi=120)
