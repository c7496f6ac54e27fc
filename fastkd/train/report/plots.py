"""The pictures of a report, as PNG files in memory."""

from __future__ import annotations

import contextlib
import io
import logging
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.family import STACKS

if TYPE_CHECKING:
    from .outcome import Outcome

POINTS = 400  # of a curve; a panel is about 450 pixels wide
LETTERS = 50  # of a name, so that a legend does not hide the curves
LINE = 45  # letters of an axis' label that a panel is high enough for
FEW = 50  # up to as many points are marked, and one alone could not be seen otherwise
MARKERS = "osD^vPX"  # one per series, for those whom colours do not help


def losses(outcomes: Sequence[Outcome]) -> bytes:
    """Draw held-out loss, and the loss each model minimises, over optimiser steps."""
    labels = "held-out loss (nats per token)", "training loss (each method's own)"
    with figure(*labels) as (picture, (held_out, training)):
        for outcome in outcomes:
            if outcome.history:
                _plot(held_out, outcome, "eval_loss", outcome.name)
                _plot(training, outcome, "loss", outcome.name)
            elif np.isfinite(outcome.loss):
                held_out.axhline(outcome.loss, label=label_of(outcome.name), linestyle="--", color="grey")
    return picture.getvalue()


def stacks(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the stacks of which gradient norms were logged: "encoder", "decoder" or both, as the models have them."""
    logged = {key for outcome in outcomes for entry in outcome.history for key in entry}
    return [stack for stack in STACKS if f"grad_norm_{stack}" in logged]


def terms(outcomes: Sequence[Outcome]) -> bytes:
    """Draw the terms of each model's loss, and the gradient norms of the models' `stacks`, over optimiser steps."""
    drawn = stacks(outcomes)
    with figure("training loss by term", *(f"{stack} gradient norm" for stack in drawn)) as (picture, panels):
        by_term, *norms = panels
        for outcome in outcomes:
            for term in sorted({key for entry in outcome.history for key in entry if key.startswith("loss_")}):
                _plot(by_term, outcome, term, f"{outcome.name}: {term.removeprefix('loss_')}")
            for axes, stack in zip(norms, drawn, strict=True):
                _plot(axes, outcome, f"grad_norm_{stack}", outcome.name, up_to=f"grad_norm_{stack}_max")
        for axes in panels:
            if any((line.get_ydata() > 0).any() for line in axes.lines):
                axes.set_yscale("log", nonpositive="mask")
    return picture.getvalue()


def _plot(axes: Any, outcome: Outcome, key: str, label: str, up_to: str | None = None) -> None:
    """Draw `key` of the log entries that hold it, with the space up to `up_to` shaded.

    Of more than POINTS entries neighbours become one point, their mean, with the space they are spread over shaded.
    """
    entries = [entry for entry in outcome.history if key in entry]
    if not entries:
        return
    steps, values, peaks = (finite([entry.get(name) for entry in entries]) for name in ("step", key, up_to or key))
    stretches = np.array_split(np.arange(len(entries)), min(len(entries), POINTS))
    steps, means, lowest, highest = (
        np.array([summary(known) if len(known := numbers[s][~np.isnan(numbers[s])]) else np.nan for s in stretches])
        for summary, numbers in ((np.mean, steps), (np.mean, values), (np.min, values), (np.max, peaks))
    )
    axes.plot(steps, means, label=label_of(label), marker="o" if len(steps) <= FEW else None, markersize=4)
    axes.fill_between(steps, lowest, highest, alpha=0.2, linewidth=0)


def finite(values: Sequence[float | None]) -> np.ndarray:
    """Return the values as an array, NaN (a gap in a curve) where one is missing or infinite."""
    numbers = np.array(values, dtype=float)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def label_of(name: str) -> str:
    """Return a name as a legend can show it: matplotlib hides those with an underscore first, and fails at others."""
    printable = "".join(character if character.isprintable() else "?" for character in name[:LETTERS])
    return f" {printable}" if printable.startswith("_") else printable


@contextlib.contextmanager
def figure(*labels: str, over: str = "step") -> Iterator[tuple[io.BytesIO, Sequence[Any]]]:
    """Yield a file, into which the picture is written in the end, and one panel per label over `over`."""
    # Its first use on a machine would print that it is building a font cache.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A page shows every picture at its full width, so a panel alone is as wide as two.
    whole = Figure(figsize=(5 * max(len(labels), 2), 4), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(whole)  # no pyplot: no display and no global state
    panels = whole.subplots(1, len(labels), squeeze=False)[0]
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
    canvas.print_png(picture)  # what savefig gives, drawn once and not twice
