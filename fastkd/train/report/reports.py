"""What a run leaves to read: metrics.json, report.md and report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common import endings
from ..common.cache import write_whole
from . import plots
from .outcome import Outcome, plain
from .page import Example, Page, Picture, markdown_table, one_line

FORMAT = 3  # of metrics.json; raise it when an older file cannot be compared any more


def _headline(outcomes: Sequence[Outcome]) -> tuple[str, list[float]]:
    """Return the figure that says most, the task's first or else the token accuracy, and each model's, in percent."""
    names = [name for name in outcomes[-1].metrics if all(name in o.metrics for o in outcomes)]
    if not names:
        return "token accuracy", [100 * o.token_accuracy for o in outcomes]
    return names[0].replace("_", " "), [o.metrics[names[0]] for o in outcomes]


def verdict(outcomes: Sequence[Outcome]) -> str:
    """Return a sentence comparing the last outcome with the others; the run's figures, whichever way they point."""
    name, figures = _headline(outcomes)
    *others, student = zip(outcomes, figures, strict=True)

    def gap(model: Outcome, figure: float) -> str:
        larger = model.parameters / student[0].parameters
        size = "" if larger < 1.1 else f", {larger:.1f} times as large"
        points = f"{student[1] - figure:+.1f} points against"
        return f"{points} {model.name} ({figure:.1f} %{size})"

    gaps = [gap(*other) for other in reversed(others)]
    return f"Held-out {name} of {student[0].name}: {student[1]:.1f} %, {', '.join(gaps)}."


def at_a_glance(outcomes: Sequence[Outcome], examples: Sequence[Example]) -> str:
    """Return each model's size, what it is worth, and an answer of it, as a table for a terminal.

    The answers are to the first example that the first model, a teacher, has right; to the first if it has none.
    """
    name, figures = _headline(outcomes)
    pairs = zip(examples, outcomes[0].outputs, strict=False)
    right = next((i for i, ((_, target), output) in enumerate(pairs) if output == target), 0)
    shown = slice(right, right + 1)
    rows = [["", "parameters", name, *(f"answer to: {one_line(source, 60)}" for source, _ in examples[shown])]]
    for o, figure in zip(outcomes, figures, strict=True):
        answers = [one_line(text, 60) for text in o.outputs[: len(examples)][shown]]
        rows.append([o.name, f"{o.parameters / 1e6:.2f} M", f"{figure:.1f} %", *answers])
    rows += [["right answer", "", "", one_line(target, 60)] for _, target in examples[shown]]
    return markdown_table(rows)


def write(
    folder: Path,
    outcomes: Sequence[Outcome],
    facts: Mapping[str, Any],
    notes: Sequence[str] = (),
    *,
    lead: Sequence[str] = (),
    pictures: Sequence[Picture] = (),
    besides: Mapping[str, Any] | None = None,
    **shown: Any,
) -> None:
    """Write report.md, report.html, the pictures and metrics.json into `folder`, replacing older ones.

    outcomes: the student's last. lead, pictures: shown before what all runs have, the verdict and the curves. besides:
    more for metrics.json. shown: what else a `Page` has, of how the student came about.
    report.html holds its pictures and needs no other file; metrics.json holds everything but the pictures.
    """
    endings.begin("the writing of the report")
    lead = [*lead, *([verdict(outcomes)] if len(outcomes) > 1 else [])]
    pictures = [*pictures, *_curves(outcomes)]
    page = Page("fastkd-train report", outcomes, lead, notes, pictures=pictures, facts=facts, **shown)
    metrics = {
        "format": FORMAT,
        "run": plain(facts),
        "models": [o.to_json() for o in outcomes],
        "notes": list(notes),
        "examples": [{"source": source, "target": target} for source, target in page.examples],
        "config": page.config,
        **plain(besides or {}),
    }
    write_whole(folder / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    page.save(folder, "report")


def _curves(outcomes: Sequence[Outcome]) -> list[Picture]:
    """Return the pictures of a run's training; none if none of its models was trained in it."""
    if not any(o.history for o in outcomes):
        return []
    stacks, note = plots.stacks(outcomes), "Each term of the training losses times its weight"
    if stacks:
        note += f", and the gradient norm{'s' * (len(stacks) > 1)} of {' and '.join(stacks)} before clipping (means "
        note += "between log entries, shaded up to the largest)"
    if len(stacks) > 1:
        note += ": in MiniEnD's pilot study (Zhang et al., 2024) the encoder's spikes under the implicit objective "
        note += "and stays small under an explicit one"
    return [
        Picture("loss_curves.png", plots.losses(outcomes), "Loss curves"),
        Picture("term_curves.png", plots.terms(outcomes), "Term curves", f"{note}."),
    ]
