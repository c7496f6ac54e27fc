"""Several runs side by side: comparison.md and comparison.html, from the metrics.json of each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common.errors import InputError, one_line
from . import plots
from .outcome import Outcome
from .page import Page, Picture, Table, table
from .reports import FORMAT


def compare(folders: Sequence[Path], out: Path) -> str:
    """Put several runs side by side in `out`: comparison.md, .html and .png. Return their table as Markdown.

    folders: of finished runs. The rows are every run's student, named after its folder, below every distinct teacher:
    two runs have the same if its size, its steps and all its scores agree.
    Raises InputError, naming the folders, if one is given twice or holds no metrics.json that `write` could have made,
    or if their figures are of different tasks or of different held-out data.
    """
    if not folders:
        raise InputError("expected at least one folder of a run to compare, got none")
    runs, names = [_read(folder) for folder in folders], _short_names(folders)
    facts = [run for run, _ in runs]
    _check_comparable(folders, facts)
    teachers: dict[str, Outcome] = {}
    for name, (_, models) in zip(names, runs, strict=True):
        for model in models[:-1]:
            if model.name == "teacher":
                scores = repr((model.parameters, model.steps, model.loss, model.token_accuracy, model.metrics))
                teachers.setdefault(scores, replace(model, name=f"teacher of {name}"))
    outcomes = list(teachers.values())
    if len(outcomes) == 1 and "teacher" not in names:
        outcomes = [replace(outcomes[0], name="teacher")]
    outcomes += [replace(models[-1], name=name) for name, (_, models) in zip(names, runs, strict=True)]
    differences = _differences(facts)
    other_pieces = "These runs have different tokenizers, so their held-out losses and token accuracies do not compare."
    page = Page(
        title="fastkd-train comparison",
        outcomes=outcomes,
        lead=[other_pieces] if "pieces" in differences else [],
        pictures=[Picture("comparison.png", plots.losses(outcomes), "Loss curves")],
        tables=[Table("What differs", [["", *names], *differences.values()])] if differences else [],
    )
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: expected a folder for the comparison, or a name for a new one")
    out.mkdir(parents=True, exist_ok=True)
    page.save(out, "comparison")
    return "\n\n".join([table(outcomes), *page.lead])


def _read(folder: Path) -> tuple[dict[str, Any], list[Outcome]]:
    """Return the facts and the outcomes of a run, from its metrics.json."""
    path = folder / "metrics.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no metrics.json: expected the folder of a finished run of fastkd-train")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        version = metrics.get("format", 1)
        if version == FORMAT:
            outcomes = [Outcome.from_json(record) for record in metrics["models"]]
            if not outcomes:
                raise ValueError("no models")
            return dict(metrics["run"]), outcomes
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is broken ({type(error).__name__}: {one_line(error)})") from error
    raise InputError(f"{path} has format {version}, expected {FORMAT}: run that version's fastkd-train again")


def _check_comparable(folders: Sequence[Path], runs: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError, saying which run has what, if their held-out figures are of different tasks or data."""
    for fact in ("task", "held_out_data"):
        groups: dict[str, list[str]] = {}
        for folder, facts in zip(folders, runs, strict=True):
            groups.setdefault(str(facts.get(fact, "unknown")), []).append(str(folder))
        if len(groups) > 1:
            what = fact.replace("_", " ").replace("held out", "held-out")
            got = "; ".join(f"{', '.join(group)}: {value}" for value, group in groups.items())
            raise InputError(f"--compare: expected runs with the same {what}, got {got}; compare each group by itself")


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Return as many of each folder's last parts as it takes to tell it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    for folder, own in zip(folders, parts, strict=True):
        if parts.count(own) > 1:
            raise InputError(f"{folder} was given twice: expected different folders")
    return [
        next("/".join(own[-end:]) for end in range(1, 1 + len(own)) if [p[-end:] for p in parts].count(own[-end:]) == 1)
        for own in parts
    ]


def _differences(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the facts that differ between runs, each as a row: its name, and all of its values."""
    names = dict.fromkeys(name for facts in runs for name in facts)
    values = {name: [str(facts.get(name, "-")) for facts in runs] for name in names}
    return {name: [name.replace("_", " "), *of_runs] for name, of_runs in values.items() if len(set(of_runs)) > 1}
