"""What runs leave to read: of one run metrics.json, report.md and report.html, of several comparison.md and .html."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common import endings
from ..common.cache import write_whole
from ..common.errors import InputError
from . import plots
from .outcome import Outcome, plain
from .page import Example, Page, Picture, Table, markdown_table, one_line, table

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
    examples: Sequence[Example] = (),
    config: str = "",
    tables: Sequence[Table] = (),
    pictures: Sequence[Picture] = (),
    besides: Mapping[str, Any] | None = None,
) -> None:
    """Write report.md, report.html, the pictures and metrics.json into `folder`, replacing older ones.

    outcomes: the student's last. facts: listed at the end. lead, notes: sentences above and below the table. examples:
    what the outcomes' outputs were generated for. config: the exact configuration as YAML. tables, pictures: of how the
    student came about, shown before its curves. besides: more of that for metrics.json.
    report.html holds its pictures and needs no other file; metrics.json holds everything but the pictures.
    """
    endings.begin("the writing of the report")
    metrics = {
        "format": FORMAT,
        "run": plain(facts),
        "models": [o.to_json() for o in outcomes],
        "notes": list(notes),
        "examples": [{"source": source, "target": target} for source, target in examples],
        "config": config,
        **plain(besides or {}),
    }
    text = json.dumps(metrics, indent=2, allow_nan=False)
    write_whole(folder / "metrics.json", text + "\n")
    page = Page(
        title="fastkd-train report",
        outcomes=outcomes,
        lead=[*lead, *([verdict(outcomes)] if len(outcomes) > 1 else [])],
        notes=notes,
        examples=examples,
        tables=tables,
        pictures=[*pictures, *_curves(outcomes)],
        config=config,
        facts=facts,
    )
    page.save(folder, "report")


def _curves(outcomes: Sequence[Outcome]) -> list[Picture]:
    """Return the pictures of a run's training; none if none of its models was trained in it."""
    if not any(o.history for o in outcomes):
        return []
    return [
        Picture("loss_curves.png", plots.losses(outcomes), "Loss curves"),
        Picture(
            "term_curves.png",
            plots.terms(outcomes),
            "Term curves",
            "Each term of the training losses times its weight, and the gradient norms of encoder and decoder before "
            "clipping (means between log entries, shaded up to the largest): in MiniEnD's pilot study (Zhang et al., "
            "2024) the encoder's spikes under the implicit objective and stays small under an explicit one.",
        ),
    ]


def compare(folders: Sequence[Path], out: Path) -> str:
    """Put several runs side by side in `out`: comparison.md, .html and .png. Return their table as Markdown.

    folders: of finished runs. The rows are every run's student, named after its folder, below every distinct teacher:
    two runs have the same if its size, its steps and all its scores agree.
    Raises InputError, naming the folders, if one is given twice or holds no metrics.json that `write` could have made,
    or if their figures are of different tasks or of different held-out data.
    """
    if not folders:
        raise InputError("expected at least one folder of a run to compare, got none")
    runs = [_read(folder) for folder in folders]
    names = _short_names(folders)
    _check_comparable(folders, [facts for facts, _ in runs])
    teachers: dict[str, tuple[str, Outcome]] = {}
    for name, (_, models) in zip(names, runs, strict=True):
        for model in models[:-1]:
            if model.name == "teacher":
                scores = model.loss, model.token_accuracy, model.metrics
                teachers.setdefault(repr((model.parameters, model.steps, scores)), (name, model))
    alone = len(teachers) == 1 and "teacher" not in names
    outcomes = [
        dataclasses.replace(model, name="teacher" if alone else f"teacher of {name}")
        for name, model in teachers.values()
    ]
    outcomes += [dataclasses.replace(models[-1], name=name) for name, (_, models) in zip(names, runs, strict=True)]
    differences = _differences([facts for facts, _ in runs])
    rows = [["", *names], *([fact.replace("_", " "), *values] for fact, values in differences.items())]
    other_pieces = "These runs have different tokenizers, so their held-out losses and token accuracies do not compare."
    lead = [other_pieces] if "pieces" in differences else []
    page = Page(
        title="fastkd-train comparison",
        outcomes=outcomes,
        lead=lead,
        pictures=[Picture("comparison.png", plots.losses(outcomes), "Loss curves")],
        tables=[Table("What differs", rows)] if differences else [],
    )
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: expected a folder for the comparison, or a name for a new one")
    out.mkdir(parents=True, exist_ok=True)
    page.save(out, "comparison")
    return "\n\n".join([table(outcomes), *lead])


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
        raise InputError(f"{path} is broken ({type(error).__name__}: {one_line(str(error))})") from error
    raise InputError(f"{path} has format {version}, expected {FORMAT}: run that version's fastkd-train again")


def _check_comparable(folders: Sequence[Path], runs: Sequence[Mapping[str, Any]]) -> None:
    """Raise InputError, saying which run has what, if their held-out figures are of different tasks or data."""
    for fact in ("task", "held_out_data"):
        groups: dict[str, list[str]] = {}
        for folder, facts in zip(folders, runs, strict=True):
            groups.setdefault(str(facts.get(fact, "unknown")), []).append(str(folder))
        if len(groups) > 1:
            what = fact.replace("_", " ").replace("held out", "held-out")
            which = "; ".join(f"{', '.join(group)}: {value}" for value, group in groups.items())
            raise InputError(
                f"--compare: expected runs with the same {what}, got {which}; compare each group by itself"
            )


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Return as many of each folder's last parts as it takes to tell it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for folder, own in zip(folders, parts, strict=True):
        ends = (end for end in range(1, len(own) + 1) if sum(other[-end:] == own[-end:] for other in parts) == 1)
        end = next(ends, None)
        if end is None:
            raise InputError(f"{folder} was given twice: expected different folders")
        names.append("/".join(own[-end:]))
    return names


def _differences(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the facts that differ between runs, each with all of its values."""
    names = dict.fromkeys(name for facts in runs for name in facts)
    values = {name: [str(facts.get(name, "-")) for facts in runs] for name in names}
    return {name: of_runs for name, of_runs in values.items() if len(set(of_runs)) > 1}
