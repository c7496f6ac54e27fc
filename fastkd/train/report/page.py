"""A page that compares models: a table of their figures, examples, pictures; as Markdown and as HTML."""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from ..common.cache import write_whole
from .outcome import Outcome

Example = tuple[str, str]  # source, target


@dataclass(frozen=True)
class _Figure:
    """A figure of a model. title: with the unit. value: None where a model has none. best: min, max or neither."""

    title: str
    value: Callable[[Outcome], float | None]
    form: str
    best: Callable[..., float] | None = min

    def texts(self, outcomes: Sequence[Outcome]) -> list[str]:
        """Return each model's figure, "-" where it has none."""
        values = map(self.value, outcomes)
        return ["-" if value is None else format(value, self.form) for value in values]

    def marks(self, outcomes: Sequence[Outcome]) -> list[bool]:
        """Return whether each model's is the best: where all are written alike, none is."""
        values, texts = [self.value(o) for o in outcomes], self.texts(outcomes)
        known = {text: value for text, value in zip(texts, values, strict=True) if value is not None and value == value}
        best = self.best(known, key=lambda text: known[text]) if self.best and len(known) > 1 else None
        return [text == best for text in texts]


_SIZE = _Figure("parameters (M)", lambda o: o.parameters / 1e6, ".2f")
_OTHERS = (
    _Figure("token accuracy (%)", lambda o: 100 * o.token_accuracy, ".2f", max),
    _Figure("held-out loss (nats/token)", lambda o: o.loss, ".4f"),
    _Figure("steps", lambda o: o.steps or None, "d", None),
    _Figure("s/step", lambda o: o.seconds_per_step, ".3f", None),  # times of a busy machine are no one's best
    _Figure("GFLOPs", lambda o: o.cost.gflops if o.cost else None, ".3f"),
    _Figure("latency (ms)", lambda o: o.cost.latency_ms if o.cost else None, ".1f", None),
    _Figure("peak memory (MiB)", lambda o: o.cost.peak_memory_mb if o.cost else None, ".1f"),
)
_MEANINGS = {
    "held-out loss (nats/token)": "cross-entropy per target token of the held-out data, the same for every model of a "
    "run; sentinels of span-corrupted text count as target tokens.",
    "GFLOPs": "billions of multiply-accumulates in all linear layers but the head, for 128 tokens, on both "
    "sides of a model with two.",
    "latency (ms)": "median time of a forward pass over one sequence of 128 tokens, on both sides of a model with two.",
    "peak memory (MiB)": "the most that such a pass holds at a time beyond the weights.",
}


def _metric(name: str) -> _Figure:
    return _Figure(f"{name.replace('_', ' ')} (%)", lambda o: o.metrics.get(name), ".2f", max)


def _figures(outcomes: Sequence[Outcome]) -> list[_Figure]:
    """Return the figures that at least one model has."""
    names = dict.fromkeys(name for o in outcomes for name in o.metrics)
    figures = [_SIZE, *map(_metric, names), *_OTHERS]
    return [figure for figure in figures if any(figure.value(o) is not None for o in outcomes)]


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a Markdown table, a row for each; figures that no model has are left out."""
    columns = [[figure.title, *figure.texts(outcomes)] for figure in _figures(outcomes)]
    return markdown_table(list(zip(["model", *(o.name for o in outcomes)], *columns, strict=True)))


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first of them the header, as a Markdown table with aligned columns."""
    rows = [[one_line(cell).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def one_line(text: str, most: int | None = None) -> str:
    """Return a text on one line, and its end cut off beyond so many characters."""
    line = " ".join(text.split())
    return line if most is None or len(line) <= most else line[:most] + " ..."


def fenced(text: str, language: str = "") -> str:
    """Return a text as a Markdown code block, which shows it as it is, whatever it holds."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


@dataclass(frozen=True)
class Picture:
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
class Table:
    """A table below its title. rows: the header first. sentences: below it. numbers: whether its cells are figures."""

    title: str
    rows: Sequence[Sequence[str]]
    sentences: Sequence[str] = ()
    numbers: bool = False


@dataclass(frozen=True)
class Page:
    """What a report or a comparison shows, in this order.

    lead: sentences above the table of outcomes. notes: below it. examples: the texts that the outcomes' outputs were
    made of.
    """

    title: str
    outcomes: Sequence[Outcome]
    lead: Sequence[str] = ()
    notes: Sequence[str] = ()
    examples: Sequence[Example] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    config: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

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
            write_whole(folder / picture.file, picture.png)
        figures = _figures(self.outcomes)
        legend = [f"{figure.title}: {_MEANINGS[figure.title]}" for figure in figures if figure.title in _MEANINGS]
        for end in ("md", "html"):
            save(folder / f"{name}.{end}", f"page.{end}", page=self, figures=figures, legend=legend)


@functools.cache
def _templates() -> jinja2.Environment:
    """Return the templates, each of which is compiled once."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastkd.train.report"),
        autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"one_line": one_line, "fenced": fenced, "outcomes": table, "table": markdown_table}
    return environment


def save(file: Path, template: str, **shown: Any) -> None:
    """Write a file by one of the templates."""
    write_whole(file, _templates().get_template(template).render(shown).rstrip("\n") + "\n")
