"""What studies share: runs that another call need not repeat, and a figure of scores over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.saved import save


class Runs:
    """What the finished runs of a study told, in FOLDER/runs.json: another call goes on where one was cut off."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "runs.json"
        self.runs: list[dict] = json.loads(self.path.read_text(encoding="utf-8"))["runs"] if self.path.is_file() else []

    def get(self, settings: dict[str, Any], run: Callable[[], Any]) -> Any:
        """What a run with these settings tells."""
        for done in self.runs:
            if done["settings"] == settings:
                return done["found"]
        found = run()
        self.runs.append({"settings": settings, "found": found})
        save(self.path, {"runs": self.runs})
        return found


def draw(path: Path, title: str, unit: str, scores: Mapping[str, Sequence[float]]) -> None:
    """A dot for each seed, and a bar from one deviation below the mean to one above it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(scores)[::-1]
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.4 * len(names)), layout="constrained")
    for y, own in enumerate(scores[name] for name in names):
        spread = statistics.stdev(own) if len(own) > 1 else 0.0
        axes.errorbar(statistics.mean(own), y, xerr=spread, fmt="|", color="C0", markersize=14, capsize=4)
        axes.plot(own, [y] * len(own), "o", color="C1", markersize=4)
    axes.set_yticks(range(len(names)), names)
    axes.set(title=title, xlabel=unit)
    axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
