"""What a run leaves to read: report.md, loss_curves.png, term_curves.png and metrics.json."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Outcome:
    """How one model did.

    loss: held-out, nats per target token. history: log entries of "step" and "eval_loss", or "loss", its terms
    "loss_<term>" and the gradient norms (see DistillTrainer).
    """

    name: str
    parameters: int
    steps: int
    seconds_per_step: float | None
    loss: float
    token_accuracy: float
    history: list[dict[str, float]]


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a Markdown table with aligned columns."""
    rows = [("model", "parameters", "steps", "s / step", "held-out loss", "token accuracy")]
    for o in outcomes:
        speed = "-" if o.seconds_per_step is None else f"{o.seconds_per_step:.3f}"
        accuracy = f"{100 * o.token_accuracy:.2f} %"
        rows.append((o.name, f"{o.parameters / 1e6:.2f} M", str(o.steps or "-"), speed, f"{o.loss:.4f}", accuracy))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def verdict(outcomes: Sequence[Outcome]) -> str:
    """Return a sentence comparing the last outcome with "scratch"; the run's figures, whichever way they point."""
    student = outcomes[-1]
    scratch = next(o for o in outcomes if o.name == "scratch")
    nats, points = student.loss - scratch.loss, 100 * (student.token_accuracy - scratch.token_accuracy)
    return (
        f"{student.name} against scratch after {student.steps} steps each: held-out loss {nats:+.4f} nats per token "
        f"({'better' if nats < 0 else 'not better'}), token accuracy {points:+.2f} points."
    )


def write(folder: Path, outcomes: Sequence[Outcome], facts: Mapping[str, Any], notes: Sequence[str] = ()) -> None:
    """Write report.md, the pictures and metrics.json into `folder`, replacing older ones.

    facts: listed at the end. notes: sentences below the table.
    """
    metrics = {"run": dict(facts), "models": [dataclasses.asdict(o) for o in outcomes]}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    _draw_losses(folder / "loss_curves.png", outcomes)
    _draw_terms(folder / "term_curves.png", outcomes)
    compared = any(o.name == "scratch" for o in outcomes[:-1])
    lines = [
        "# fastkd-train report",
        "",
        table(outcomes),
        "",
        *([verdict(outcomes), ""] if compared else []),
        *(line for note in notes for line in (note, "")),
        "Held-out loss is the cross-entropy in nats per target token of span-corrupted held-out text, the same for "
        "every model; sentinels count as target tokens.",
        "",
        "![Loss curves](loss_curves.png)",
        "",
        "Each term of the training losses times its weight, and the gradient norms of encoder and decoder before "
        "clipping (means between log entries, shaded up to the largest): in MiniEnD's pilot study (Zhang et al., "
        "2024) the encoder's spikes under the implicit objective and stays small under an explicit one.",
        "",
        "![Term curves](term_curves.png)",
        "",
        *(f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items()),
        "",
    ]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")


def _curve(outcome: Outcome, key: str) -> tuple[list[float], list[float]]:
    """Return the steps and the values of the log entries that hold `key`."""
    entries = [e for e in outcome.history if key in e]
    return [e["step"] for e in entries], [e[key] for e in entries]


def _draw_losses(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Draw held-out loss, and the loss each model minimises, over optimiser steps."""
    with _figure(path, "held-out loss (nats per token)", "training loss (each method's own)") as (held_out, training):
        for outcome in outcomes:
            if not outcome.history:
                held_out.axhline(outcome.loss, label=outcome.name, linestyle="--", color="grey")
                continue
            held_out.plot(*_curve(outcome, "eval_loss"), label=outcome.name, marker="o")
            training.plot(*_curve(outcome, "loss"), label=outcome.name)


def _draw_terms(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Draw the terms of each model's loss, and the gradient norms of encoder and decoder, over optimiser steps."""
    labels = "training loss by term", "encoder gradient norm", "decoder gradient norm"
    with _figure(path, *labels) as (losses, *norms):
        for outcome in outcomes:
            for term in sorted({key for entry in outcome.history for key in entry if key.startswith("loss_")}):
                losses.plot(*_curve(outcome, term), label=f"{outcome.name}: {term.removeprefix('loss_')}")
            for axes, key in zip(norms, ("grad_norm_encoder", "grad_norm_decoder"), strict=True):
                steps, means = _curve(outcome, key)
                if steps:
                    axes.plot(steps, means, label=outcome.name)
                    axes.fill_between(steps, means, _curve(outcome, f"{key}_max")[1], alpha=0.2)
        for axes in (losses, *norms):
            axes.set_yscale("log")


@contextlib.contextmanager
def _figure(path: Path, *labels: str) -> Iterator[Sequence[Any]]:
    """Yield one panel per label over optimiser steps, and save the picture in the end."""
    # Its first use on a machine would print that it is building a font cache.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(labels), 4), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: no display and no global state
    panels = figure.subplots(1, len(labels))
    yield panels
    for axes, label in zip(panels, labels, strict=True):
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    figure.savefig(path, dpi=120)
