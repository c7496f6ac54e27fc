"""What runs leave to read: of one run metrics.json, report.md and report.html, of several comparison.md and .html."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from . import plots
from .cost import Cost
from .errors import InputError
from .schedule import Round, Schedule, Trial

FORMAT = 2  # of metrics.json; raise it when an older file cannot be compared any more
SHOWN = 600  # characters of a text in report.md; report.html and metrics.json hold all of it
# Facts that say what the held-out figures were measured on.
DATA_FACTS = {"task", "texts", "held_out_chunks", "held_out_examples", "tokens_per_chunk", "pieces"}

Example = tuple[str, str]  # source, target


@dataclass
class Outcome:
    """How one model did.

    loss: held-out, nats per target token. history: log entries of "step" and "eval_loss", or "loss", its terms
    "loss_<term>" and the gradient norms (see DistillTrainer). metrics: of the task, in percent, more is better.
    outputs: what the model generated for each of the report's examples.
    """

    name: str
    parameters: int
    steps: int
    seconds_per_step: float | None
    loss: float
    token_accuracy: float
    history: list[dict[str, float]]
    metrics: dict[str, float] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    cost: Cost | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as what JSON knows; numbers that are not finite, which it does not, become None."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Outcome:
        """Return the outcome that `to_json` gave, NaN for a number that was not finite.

        What came later than the first version may be absent. Raises KeyError, TypeError, ValueError or AttributeError
        if the record is no outcome.
        """
        speed, cost = record["seconds_per_step"], record.get("cost")
        return cls(
            name=str(record["name"]),
            parameters=int(record["parameters"]),
            steps=int(record["steps"]),
            seconds_per_step=None if speed is None else _number(speed),
            loss=_number(record["loss"]),
            token_accuracy=_number(record["token_accuracy"]),
            history=[{key: _number(value) for key, value in entry.items()} for entry in record["history"]],
            metrics={key: _number(value) for key, value in record.get("metrics", {}).items()},
            outputs=[str(output) for output in record.get("outputs", [])],
            cost=None if cost is None else Cost(**{k: None if v is None else _number(v) for k, v in cost.items()}),
        )


def _number(value: Any) -> Any:
    if value is None:
        return math.nan
    if not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {value!r}")
    return value


def _plain(value: Any) -> Any:
    """Return a value as JSON knows it: NaN and infinities as None, NumPy's scalars as numbers, the unknown as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)


@dataclass(frozen=True)
class _Column:
    """A column of the table. title: with the unit. value: None where a model has none. best: min, max or neither."""

    title: str
    value: Callable[[Outcome], float | None]
    form: str
    best: Callable[..., float] | None = min
    note: str = ""


_COLUMNS = (
    _Column("parameters (M)", lambda o: o.parameters / 1e6, ".2f"),
    _Column(
        "GFLOPs",
        lambda o: o.cost.gflops if o.cost else None,
        ".3f",
        note="billions of multiply-accumulates in all linear layers but the head, for 128 tokens on both sides.",
    ),
    _Column("steps", lambda o: o.steps or None, "d", None),
    _Column("s/step", lambda o: o.seconds_per_step, ".3f", None),  # times of a busy machine are no one's best
    _Column(
        "held-out loss (nats/token)",
        lambda o: o.loss,
        ".4f",
        note="cross-entropy per target token of the held-out data, the same for every model of a run; sentinels of "
        "span-corrupted text count as target tokens.",
    ),
    _Column("token accuracy (%)", lambda o: 100 * o.token_accuracy, ".2f", max),
)
_MEASURED = (
    _Column(
        "latency (ms)",
        lambda o: o.cost.latency_ms if o.cost else None,
        ".1f",
        None,
        note="median time of a forward pass over one sequence, 128 tokens on both sides.",
    ),
    _Column(
        "peak memory (MiB)",
        lambda o: o.cost.peak_memory_mb if o.cost else None,
        ".1f",
        note="the most that such a pass holds at a time beyond the weights.",
    ),
)


def _metric_column(name: str) -> _Column:
    return _Column(f"{name} (%)", lambda o: o.metrics.get(name), ".2f", max)


def _columns(outcomes: Sequence[Outcome]) -> list[_Column]:
    """Return the columns in which at least one model has a value."""
    metrics = dict.fromkeys(name for o in outcomes for name in o.metrics)
    columns = [*_COLUMNS, *map(_metric_column, metrics), *_MEASURED]
    return [column for column in columns if any(column.value(o) is not None for o in outcomes)]


def _cells(column: _Column, outcomes: Sequence[Outcome]) -> list[tuple[str, bool]]:
    """Return each model's cell, and whether it is the column's best: where all are equal, none is."""
    values = [column.value(o) for o in outcomes]
    texts = ["-" if value is None else format(value, column.form) for value in values]
    known = {text: value for text, value in zip(texts, values, strict=True) if value is not None and value == value}
    if column.best is None or len(known) < 2:
        return [(text, False) for text in texts]
    best = column.best(known, key=lambda text: known[text])
    return [(text, text == best) for text in texts]


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a Markdown table with aligned columns; columns that no model has are left out."""
    columns = [[column.title, *(text for text, _ in _cells(column, outcomes))] for column in _columns(outcomes)]
    return _markdown_table(list(zip(["model", *(o.name for o in outcomes)], *columns, strict=True)))


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first of them the header, as a Markdown table with aligned columns."""
    rows = [[_one_line(cell).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def fenced(text: str, language: str = "") -> str:
    """Return a text as a Markdown code block, which shows it as it is, whatever it holds."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def listed(facts: Mapping[str, Any]) -> str:
    """Return facts as a Markdown list."""
    return "\n".join(f"- {name.replace('_', ' ')}: {_one_line(str(value))}" for name, value in facts.items())


def verdict(outcomes: Sequence[Outcome]) -> str:
    """Return a sentence comparing the last outcome with "scratch"; the run's figures, whichever way they point."""
    student = outcomes[-1]
    scratch = next(o for o in outcomes if o.name == "scratch")
    nats, points = student.loss - scratch.loss, 100 * (student.token_accuracy - scratch.token_accuracy)
    shared = [name for name in student.metrics if name in scratch.metrics]
    metrics = "".join(f", {name} {student.metrics[name] - scratch.metrics[name]:+.2f}" for name in shared)
    return (
        f"{student.name} against scratch after {student.steps} steps each: held-out loss {nats:+.4f} nats per token "
        f"({'better' if nats < 0 else 'not better'}), token accuracy {points:+.2f} points{metrics}."
    )


@dataclass(frozen=True)
class _Picture:
    """A PNG, the name of its file, what it shows in a few words, and what to know about it."""

    file: str
    png: bytes
    title: str
    note: str = ""

    @property
    def uri(self) -> str:
        """The picture itself as an address."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class _Table:
    """A table below its title. rows: the header first. sentences: below it. numbers: whether its cells are figures."""

    title: str
    rows: Sequence[Sequence[str]]
    sentences: Sequence[str] = ()
    numbers: bool = False


@dataclass(frozen=True)
class _Page:
    """What a report or a comparison shows, as Markdown and as HTML alike.

    sentences: below the table of outcomes. tables: other ones.
    """

    title: str
    outcomes: Sequence[Outcome]
    sentences: Sequence[str]
    pictures: Sequence[_Picture]
    examples: Sequence[Example] = ()
    tables: Sequence[_Table] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""

    @property
    def legend(self) -> list[tuple[str, str]]:
        """What the columns mean: (title, meaning)."""
        return [(column.title, column.note) for column in _columns(self.outcomes) if column.note]

    @property
    def samples(self) -> list[list[tuple[str, str]]]:
        """Of each example (what, text): the source, the reference, and what each model that was asked made of it."""
        return [
            [("source", source), ("reference", target)]
            + [(o.name, o.outputs[i]) for o in self.outcomes if i < len(o.outputs)]
            for i, (source, target) in enumerate(self.examples)
        ]

    def save(self, folder: Path, name: str) -> None:
        """Write the pictures, NAME.md, which shows them, and NAME.html, which holds them."""
        for picture in self.pictures:
            (folder / picture.file).write_bytes(picture.png)
        _write(folder / f"{name}.md", _markdown(self))
        _write(folder / f"{name}.html", _html(self))


def _write(path: Path, text: str) -> None:
    # Texts read from JSON may hold halves of surrogate pairs, which UTF-8 has no bytes for.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _markdown(page: _Page) -> str:
    blocks = [f"# {page.title}", table(page.outcomes), *page.sentences]
    blocks += ["\n".join(f"- {title}: {note}" for title, note in page.legend)]
    for extra in page.tables:
        blocks += [f"## {extra.title}", _markdown_table(extra.rows), *extra.sentences]
    for picture in page.pictures:
        blocks += [f"## {picture.title}", f"![{picture.title}]({picture.file})"]
        blocks += [picture.note] if picture.note else []
    if page.samples:
        blocks.append("## Samples")
    for sample in page.samples:
        blocks.append(fenced("\n".join(_shortened(f"{what}: {text}") for what, text in sample), "text"))
    if page.config:
        blocks += ["## Configuration", fenced(page.config, "yaml")]
    if page.facts:
        blocks += ["## Facts", listed(page.facts)]
    return "\n\n".join(blocks) + "\n"


def _shortened(text: str) -> str:
    line = _one_line(text)
    return line if len(line) <= SHOWN else line[:SHOWN] + " ..."


def _html(page: _Page) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastkd.train"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    columns = _columns(page.outcomes)
    rows = zip(*(_cells(column, page.outcomes) for column in columns), strict=True)
    return environment.get_template("report.html").render(
        page=page,
        header=[column.title for column in columns],
        rows=list(zip((o.name for o in page.outcomes), rows, strict=True)),
    )


def write(
    folder: Path,
    outcomes: Sequence[Outcome],
    facts: Mapping[str, Any],
    notes: Sequence[str] = (),
    *,
    examples: Sequence[Example] = (),
    config: str = "",
    schedule: Schedule | None = None,
) -> None:
    """Write report.md, report.html, the pictures and metrics.json into `folder`, replacing older ones.

    outcomes: the student's last. facts: listed at the end. notes: sentences below the table. examples: what the
    outcomes' outputs were generated for. config: the exact configuration as YAML. schedule: the distillations
    that led to the student, of a method that has one.
    report.html holds its pictures and needs no other file; metrics.json holds everything but the pictures.
    """
    metrics = {
        "format": FORMAT,
        "run": _plain(facts),
        "models": [o.to_json() for o in outcomes],
        "notes": list(notes),
        "examples": [{"source": source, "target": target} for source, target in examples],
        "config": config,
        **({"schedule": _plain(schedule.to_json())} if schedule else {}),
    }
    text = json.dumps(metrics, indent=2, allow_nan=False)
    (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
    compared = any(o.name == "scratch" for o in outcomes[:-1])
    page = _Page(
        title="fastkd-train report",
        outcomes=outcomes,
        sentences=[*([verdict(outcomes)] if compared else []), *notes],
        pictures=[*(_choices(schedule) if schedule else []), *_curves(outcomes)],
        examples=examples,
        tables=[_schedule_table(schedule)] if schedule else [],
        facts=facts,
        config=config,
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


def _schedule_table(schedule: Schedule) -> _Table:
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
    return _Table(
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


def _choices(schedule: Schedule) -> list[_Picture]:
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
    return [_Picture("tradeoff_curve.png", png, "Choices of the schedule", " ".join(notes))]


def _curves(outcomes: Sequence[Outcome]) -> list[_Picture]:
    """Return the pictures of a run's training; none if none of its models was trained in it."""
    if not any(o.history for o in outcomes):
        return []
    return [
        _Picture("loss_curves.png", plots.losses(outcomes), "Loss curves"),
        _Picture(
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
    page = _Page(
        title="fastkd-train comparison",
        outcomes=outcomes,
        sentences=[other_data] if differences.keys() & DATA_FACTS else [],
        pictures=[_Picture("comparison.png", plots.losses(outcomes), "Loss curves")],
        tables=[_Table("What differs", rows)] if differences else [],
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
        raise InputError(f"{path} is broken ({type(error).__name__}: {_one_line(str(error))})") from error
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
