"""What runs leave to read: of one run metrics.json, report.md and report.html, of several comparison.md and .html."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import plots
from .errors import InputError
from .outcome import Outcome, plain
from .page import Example, Page, Picture, Table, markdown_table, one_line, table
from .schedule import Round, Schedule, Trial

FORMAT = 2  # of metrics.json; raise it when an older file cannot be compared any more
# Facts that say what the held-out figures were measured on.
DATA_FACTS = {"task", "texts", "held_out_chunks", "held_out_examples", "tokens_per_chunk", "pieces"}


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
    schedule: Schedule | None = None,
) -> None:
    """Write report.md, report.html, the pictures and metrics.json into `folder`, replacing older ones.

    outcomes: the student's last. facts: listed at the end. lead, notes: sentences above and below the table. examples:
    what the outcomes' outputs were generated for. config: the exact configuration as YAML. schedule: the distillations
    that led to the student, of a method that has one.
    report.html holds its pictures and needs no other file; metrics.json holds everything but the pictures.
    """
    metrics = {
        "format": FORMAT,
        "run": plain(facts),
        "models": [o.to_json() for o in outcomes],
        "notes": list(notes),
        "examples": [{"source": source, "target": target} for source, target in examples],
        "config": config,
        **({"schedule": plain(schedule.to_json())} if schedule else {}),
    }
    text = json.dumps(metrics, indent=2, allow_nan=False)
    (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
    page = Page(
        title="fastkd-train report",
        outcomes=outcomes,
        lead=[*lead, *([verdict(outcomes)] if len(outcomes) > 1 else [])],
        notes=notes,
        examples=examples,
        tables=[_schedule_table(schedule)] if schedule else [],
        pictures=[*(_choices(schedule) if schedule else []), *_curves(outcomes)],
        config=config,
        facts=facts,
    )
    page.save(folder, "report")


# Units of training's work and time, the largest first, and what each is in billions of operations and in seconds.
_GFLOPS = {"EFLOP": 1e9, "PFLOP": 1e6, "TFLOP": 1e3, "GFLOP": 1.0, "MFLOP": 1e-3}
_SECONDS = {"minutes": 60.0, "seconds": 1.0}


def _unit(total: float, units: Mapping[str, float]) -> tuple[str, float]:
    """Return the name and size of the largest unit that `total` is at least one of, or of the smallest."""
    return next(((name, size) for name, size in units.items() if total >= size), list(units.items())[-1])


def _percent(share: float) -> str:
    return f"{100 * share:g}"


def _schedule_table(schedule: Schedule) -> Table:
    """Return the rounds of a schedule, their sums, and why its student came about as it did."""
    work, gflops = _unit(schedule.gflops, _GFLOPS)
    time, seconds = _unit(schedule.seconds, _SECONDS)
    metric = f"{schedule.metric.replace('_', ' ')} (%)"
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


def _why(schedule: Schedule) -> str:
    """Return which assistant, or which trial, was chosen and why."""
    trial = schedule.chosen
    if len(schedule.trials) > 1:
        metric, score = schedule.metric.replace("_", " "), 100 * trial.student.metric
        return (
            f"Of {len(schedule.trials)} trials the one with {_assistants(trial)} made the best student: "
            f"{metric} {score:.2f} %."
        )
    choices = [_choice(schedule, entry) for entry in trial.rounds if len(entry.candidates) > 1]
    return " ".join(choices) or f"The student was distilled with {_assistants(trial)}: nothing was left to choose."


def _assistants(trial: Trial) -> str:
    places = " and ".join(f"{_percent(sparsity)} %" for sparsity in trial.assistants)
    return f"the assistant{'s' * (len(trial.assistants) > 1)} at {places}" if places else "no assistant"


def _choice(schedule: Schedule, entry: Round) -> str:
    what = "the student itself" if entry is schedule.chosen.rounds[-1] else "the assistant"
    return (
        f"Of {len(entry.candidates)} candidates {what} at {_percent(entry.chosen)} % has the largest tradeoff, "
        f"metric + lambda * sparsity = {entry.best.metric:.4f} + {schedule.tradeoff_lambda:g} * {entry.chosen:g} "
        f"= {entry.best.tradeoff:.4f}."
    )


def _choices(schedule: Schedule) -> list[Picture]:
    """Return the picture of what a schedule chose from; none if it had no choice."""
    png = plots.tradeoff(schedule)
    if png is None:
        return []
    notes = []
    if any(len(entry.candidates) > 1 for entry in schedule.rounds):
        notes.append(
            "Sub-networks that were trained together, each at its best evaluation; the ring is the student. "
            "The tradeoff is the metric plus lambda times the sparsity: it rises where pruning more costs less of the "
            "metric than that. The star is its largest value; that sub-network went on."
        )
    if len(schedule.trials) > 1:
        notes.append(
            "Each trial's student over the sparsity of the assistant that it was distilled from; the star is the best "
            "one, which was kept. A dashed line is a trial without an assistant."
        )
    return [Picture("tradeoff_curve.png", png, "Choices of the schedule", " ".join(notes))]


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
    Raises InputError, naming the folder, if one is given twice or holds no metrics.json that `write` could have made.
    """
    if not folders:
        raise InputError("expected at least one folder of a run to compare, got none")
    runs = [_read(folder) for folder in folders]
    names = _short_names(folders)
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
    other_data = "These runs were not evaluated on the same data, so their scores do not compare."
    page = Page(
        title="fastkd-train comparison",
        outcomes=outcomes,
        lead=[other_data] if differences.keys() & DATA_FACTS else [],
        pictures=[Picture("comparison.png", plots.losses(outcomes), "Loss curves")],
        tables=[Table("What differs", rows)] if differences else [],
    )
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: expected a folder for the comparison, or a name for a new one")
    out.mkdir(parents=True, exist_ok=True)
    page.save(out, "comparison")
    return table(outcomes)


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
