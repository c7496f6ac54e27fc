"""What a run leaves to read: report.md, loss_curves.png and metrics.json."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Outcome:
    """How one model did. loss: held-out, nats per target token; history: {"step", "loss" or "eval_loss"} entries."""

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


def write(folder: Path, outcomes: Sequence[Outcome], facts: Mapping[str, Any]) -> None:
    """Write report.md, loss_curves.png and metrics.json into `folder`, replacing older ones."""
    metrics = {"run": dict(facts), "models": [dataclasses.asdict(o) for o in outcomes]}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    _draw(folder / "loss_curves.png", outcomes)
    compared = any(o.name == "scratch" for o in outcomes[:-1])
    lines = [
        "# fastkd-train report",
        "",
        table(outcomes),
        "",
        *([verdict(outcomes), ""] if compared else []),
        "Held-out loss is the cross-entropy in nats per target token of span-corrupted held-out text, the same for "
        "every model; sentinels count as target tokens.",
        "",
        "![Loss curves](loss_curves.png)",
        "",
        *(f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items()),
        "",
    ]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")


def _draw(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Draw held-out loss, and the loss each model minimises, over optimiser steps."""
    # Its first use on a machine would print that it is building a font cache.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: no display and no global state
    panels = (("eval_loss", "held-out loss (nats per token)"), ("loss", "training loss (each method's own)"))
    for axes, (key, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for outcome in outcomes:
            points = [(e["step"], e[key]) for e in outcome.history if key in e]
            if points:
                axes.plot(*zip(*points, strict=True), label=outcome.name, marker="o" if key == "eval_loss" else None)
            elif key == "eval_loss":
                axes.axhline(outcome.loss, label=outcome.name, linestyle="--", color="grey")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
