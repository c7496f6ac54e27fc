"""Reports, comparisons and model cards, read back with other readers than those that wrote them."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from huggingface_hub import ModelCard
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fastkd.train.common.errors import InputError
from fastkd.train.judge.cost import Cost
from fastkd.train.minidisc import pages as minidisc_pages
from fastkd.train.minidisc.pages import shown
from fastkd.train.minidisc.prune import sliced
from fastkd.train.minidisc.schedule import Candidate, Round, Schedule, Trial
from fastkd.train.models.architectures import enct5_from, parts
from fastkd.train.report import card, comparison, plots
from fastkd.train.report import page as pages
from fastkd.train.report import reports as report
from fastkd.train.report.outcome import Outcome
from tests.forks import Forks

NASTY = "<script>alert('x')</script> & \"q\" ```` | \u2028 \x00 \ud800 %}{{ 7*7 }}\nreference: forged"
ADDRESS = "data:image/png;base64,"


def history(steps: int = 3, scale: float = 1.0) -> list[dict[str, float]]:
    entries: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        norms = {f"grad_norm_{side}{end}": scale * step for side in ("encoder", "decoder") for end in ("", "_max")}
        entries.append({"step": step, "loss": scale / step, "loss_ce": scale / step, **norms})
    return [*entries, {"step": steps, "eval_loss": scale}]


def teacher(**changes: Any) -> Outcome:
    cost = Cost(2_900_000, 0.3, 12.0, 1.5)
    outcome = Outcome("teacher", 2_900_000, 900, 0.19, 4.61, 0.31, history(), {"rouge1": 30.0}, ["its", "words"], cost)
    return replace(outcome, **changes)


def student(**changes: Any) -> Outcome:
    curves, cost = history(scale=2.0), Cost(500_000, 0.03, 4.0, 0.5)
    outcome = Outcome("kd", 500_000, 500, 0.07, 4.75, 0.295, curves, {"rouge1": 26.0}, ["mine", NASTY], cost)
    return replace(outcome, **changes)


SCRATCH = Outcome("scratch", 500_000, 500, 0.05, 4.82, 0.29, history(), {"rouge1": 26.0}, [], Cost(500_000, 0.03))
FACTS: dict[str, Any] = {"method": "kd", "seed": 1, "torch": "2.13"}


class Page(HTMLParser):
    """A page: its tags, the cells of its tables, its text; fails where a tag is not closed in order."""

    EMPTY = ("meta", "img")

    def __init__(self, path: Path):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[tuple[str, bool]]] = []
        self.texts: list[tuple[str, str]] = []  # the innermost tag, and what it says
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)
            self.texts.append((tag, ""))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(("", dict(attrs).get("class") == "best"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] = (self.rows[-1][-1][0] + data, self.rows[-1][-1][1])
        if self.open and self.texts[-1][0] == self.open[-1]:
            self.texts[-1] = (self.open[-1], self.texts[-1][1] + data)

    def said_in(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    def figure(self, title: str) -> tuple[list[str], list[bool]]:
        cells = next(row for row in self.rows if row[0][0] == title)[1:]
        return [text for text, _ in cells], [best for _, best in cells]


def strict(path: Path) -> Any:
    """JSON as the standard has it: without NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run("a", [outcomes], method=...): a folder with that run's report."""

    def make(name: str, outcomes: Sequence[Outcome] = (), **facts: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        report.write(folder, outcomes or [teacher(history=[]), student(history=[])], {**FACTS, **facts})
        return folder

    return make


# Outcomes as JSON


@pytest.mark.parametrize("outcome", [teacher(), student(), SCRATCH, replace(SCRATCH, seconds_per_step=None)])
def test_outcomes_survive_json(outcome: Outcome) -> None:
    assert Outcome.from_json(json.loads(json.dumps(outcome.to_json(), allow_nan=False))) == outcome


def test_numbers_that_json_lacks() -> None:
    numpy: Any = np.float32(0.5)
    odd = student(
        loss=math.nan,
        history=[{"step": 1, "loss": math.inf, "loss_ce": -math.inf}],
        metrics={"a": numpy, "b": math.nan},
    )
    odd.cost = Cost(3, math.inf)
    read = Outcome.from_json(json.loads(json.dumps(odd.to_json(), allow_nan=False)))
    assert math.isnan(read.loss) and read.metrics["a"] == 0.5 and math.isnan(read.metrics["b"])
    assert read.history[0]["step"] == 1 and math.isnan(read.history[0]["loss"] + read.history[0]["loss_ce"])
    assert read.cost == Cost(3, None)


def test_outcomes_of_before() -> None:
    record = teacher().to_json()
    del record["metrics"], record["outputs"], record["cost"]
    assert Outcome.from_json(record) == replace(teacher(), metrics={}, outputs=[], cost=None)


# The table


def test_table_written_out() -> None:
    given = Outcome("teacher", 2_900_000, 0, None, math.nan, 0.5, [])
    other = replace(SCRATCH, name="a|b", metrics={"bleu": 12.346})
    assert pages.table([given, other]) == (
        "| model   | parameters (M) | bleu (%) | token accuracy (%) | held-out loss (nats/token) | steps | s/step "
        "| GFLOPs |\n"
        "|---------|----------------|----------|--------------------|----------------------------|-------|--------"
        "|--------|\n"
        "| teacher | 2.90           | -        | 50.00              | nan                        | -     | -      "
        "| -      |\n"
        "| a\\|b    | 0.50           | 12.35    | 29.00              | 4.8200                     | 500   | 0.050  "
        "| 0.030  |"
    )


def test_columns_that_no_model_has() -> None:
    bare = Outcome("teacher", 1, 0, None, 1.0, 0.5, [], cost=Cost(latency_ms=1.0))
    header = [cell.strip() for cell in pages.table([bare]).splitlines()[0].strip("|").split("|")]
    assert header == ["model", "parameters (M)", "token accuracy (%)", "held-out loss (nats/token)", "latency (ms)"]


def test_the_best_of_each_column_is_marked(tmp_path: Path) -> None:
    models = [teacher(loss=math.nan), SCRATCH, student(token_accuracy=0.31, seconds_per_step=None)]
    report.write(tmp_path, models, {})
    page = Page(tmp_path / "report.html")
    assert [text for text, _ in page.rows[0]] == ["", "teacher", "scratch", "kd"] and len(page.rows) == 10
    for title, expected in {
        "parameters (M)": [False, True, True],  # equal ones are both the best
        "GFLOPs": [False, True, True],
        "steps": [False, False, False],
        "s/step": [False, False, False],  # as steps and latency never
        "held-out loss (nats/token)": [False, False, True],  # one is NaN
        "token accuracy (%)": [True, False, True],
        "rouge1 (%)": [True, False, False],
        "latency (ms)": [False, False, False],
        "peak memory (MiB)": [False, False, True],
    }.items():
        assert page.figure(title)[1] == expected, title
    assert page.figure("held-out loss (nats/token)")[0] == ["nan", "4.8200", "4.7500"]

    report.write(tmp_path, [student(), student()], {})
    assert not any(best for row in Page(tmp_path / "report.html").rows for _, best in row)


def test_verdict_points_whichever_way() -> None:
    better = student(metrics={"exact_match": 25.5, "bleu": 3.0})
    others = [teacher(metrics={"exact_match": 30.0}), replace(SCRATCH, metrics={"exact_match": 1.25})]
    assert report.verdict([*others, better]) == (
        "Held-out exact match of kd: 25.5 %, +24.2 points against scratch (1.2 %), -4.5 points against teacher "
        "(30.0 %, 5.8 times as large)."
    )
    assert report.verdict([SCRATCH, student(metrics={}, token_accuracy=0.25)]) == (
        "Held-out token accuracy of kd: 25.0 %, -4.0 points against scratch (29.0 %)."
    )
    assert "nan points" in report.verdict([SCRATCH, student(metrics={"rouge1": math.nan})])


def test_at_a_glance() -> None:
    """Size, figure and answer of each: what the demo ends with."""
    said = report.at_a_glance(
        [teacher(), replace(SCRATCH, outputs=["x" * 99]), student()], [("a  source", "words"), ("b", "c")]
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines()]
    assert rows[0] == ["", "parameters", "rouge1", "answer to: a source"]
    assert rows[2:] == [
        ["teacher", "2.90 M", "30.0 %", "its"],
        ["scratch", "0.50 M", "26.0 %", "x" * 60 + " ..."],
        ["kd", "0.50 M", "26.0 %", "mine"],
        ["right answer", "", "", "words"],
    ]
    assert "answer" not in report.at_a_glance([teacher(outputs=[])], [])
    examples = [("first", "1"), ("second", "2"), ("third", "3")]
    said = report.at_a_glance([teacher(outputs=["0", "2", "3"]), teacher(name="kd", outputs=["1", "1", "3"])], examples)
    assert "answer to: second" in said  # the first that the teacher has right
    said = report.at_a_glance([teacher(outputs=["0", "0", "0"])], examples)
    assert "answer to: first" in said


# A run's report


def test_a_report_holds_everything(tmp_path: Path) -> None:
    outcomes = [teacher(), SCRATCH, student()]
    examples, config = [("long " * 300, "its summary"), ("source", "the <b>reference</b>")], "a: 1\nb: '```'\n"
    facts = FACTS | {"path": tmp_path}
    report.write(tmp_path, outcomes, facts, ["A note."], lead=["What."], examples=examples, config=config)
    names = {"metrics.json", "report.md", "report.html", "loss_curves.png", "term_curves.png"}
    assert {path.name for path in tmp_path.iterdir()} == names

    metrics = strict(tmp_path / "metrics.json")
    assert [Outcome.from_json(record) for record in metrics["models"]] == outcomes
    assert metrics["run"] == FACTS | {"path": str(tmp_path)} and metrics["format"] == report.FORMAT
    assert metrics["config"] == config and metrics["notes"] == ["A note."]
    assert [(example["source"], example["target"]) for example in metrics["examples"]] == examples

    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    for part in (
        "What.", pages.table(outcomes), report.verdict(outcomes), "A note.", "](loss_curves.png)", "](term_curves.png)",
        "- seed: 1", "reference: its summary\nteacher: its\nkd: mine\n", "````yaml\na: 1\nb: '```'\n````",
    ):  # fmt: skip
        assert part in markdown, part
    sample = next(line for line in markdown.splitlines() if line.startswith("source: long"))
    assert len(sample) < 700 and sample.endswith(" ...")

    order = ["What.", report.verdict(outcomes), pages.table(outcomes), "## Examples", "](loss_curves.png)", "## Facts"]
    assert sorted(order, key=markdown.index) == order

    page = Page(tmp_path / "report.html")
    assert page.said_in("p")[:2] == ["What.", report.verdict(outcomes)]
    texts = [text for _, text in page.texts]
    for part in (report.verdict(outcomes), "A note.", config, "long " * 300, "the <b>reference</b>", NASTY[:30]):
        assert any(part in text for text in texts), part
    assert page.said_in("dt") == ["source", "reference", "teacher", "kd"] * 2  # scratch made no outputs


def test_report_html_stands_alone(tmp_path: Path) -> None:
    report.write(tmp_path, [teacher(), SCRATCH, student()], FACTS, examples=[("a", "b")], config="a: 1")
    page, html = Page(tmp_path / "report.html"), (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r"base64,[\w+/=]+", "", html))
    assert "prefers-color-scheme: dark" in html and not {"link", "script", "iframe"} & {tag for tag, _ in page.tags}
    assert any(tag == "meta" and attributes.get("name") == "viewport" for tag, attributes in page.tags)
    pictures = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    files = [(tmp_path / name).read_bytes() for name in ("loss_curves.png", "term_curves.png")]
    assert [base64.b64decode(uri.removeprefix(ADDRESS)) for uri in pictures] == files
    assert all(matplotlib.image.imread(io.BytesIO(png)).ndim == 3 for png in files)


def test_nasty_texts_stay_texts(tmp_path: Path) -> None:
    """Outputs, names, facts and notes that hold markup, fences, forged lines and half a surrogate pair."""
    report.write(
        tmp_path,
        [student(name=NASTY, outputs=[NASTY, ""])],
        {NASTY: NASTY},
        [NASTY],
        examples=[(NASTY, NASTY), ("a", "b")],
        config=NASTY,
    )
    metrics = strict(tmp_path / "metrics.json")
    assert metrics["models"][0]["outputs"] == [NASTY, ""] and metrics["run"] == {NASTY: NASTY}
    page = Page(tmp_path / "report.html")
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "b"})
    shown = NASTY.replace("\ud800", "\\ud800")
    assert page.said_in("dd") == [shown, shown, shown, "a", "b", "(nothing)"] and page.said_in("pre") == [shown]
    assert page.rows[0][1][0] == shown
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    samples = markdown.split("## Examples")[1].split("## Configuration")[0]
    assert [line.split(":")[0] for line in samples.splitlines() if line.startswith("reference")] == ["reference"] * 2
    fences = re.findall(r"^`{3,}", markdown, re.MULTILINE)
    assert fences == ["`````"] * 6  # longer than any run inside
    assert len(pages.table([student(name="a\nb")]).splitlines()) == 3


def test_nothing_to_show(tmp_path: Path) -> None:
    """A teacher that was given, and nothing else: no curves, no samples, no verdict."""
    report.write(tmp_path, [Outcome("teacher", 10, 0, None, math.inf, math.nan, [])], {})
    assert not list(tmp_path.glob("*.png")) and "##" not in (tmp_path / "report.md").read_text()
    assert not Page(tmp_path / "report.html").said_in("h2")
    assert strict(tmp_path / "metrics.json")["models"][0]["loss"] is None


# Curves


class Axes:
    """Keeps what is drawn."""

    def plot(self, steps: np.ndarray, values: np.ndarray, **style: Any) -> None:
        self.steps, self.values, self.style = steps, values, style

    def fill_between(self, steps: np.ndarray, lowest: np.ndarray, highest: np.ndarray, **style: Any) -> None:
        assert steps is self.steps
        self.lowest, self.highest = lowest, highest


def drawn(entries: list[dict[str, Any]], up_to: str | None = None) -> Axes:
    axes = Axes()
    plots._plot(axes, student(history=entries), "loss", "label", up_to)
    return axes


def test_short_curves_are_drawn_as_they_are() -> None:
    entries = [{"step": 2 * i, "loss": i / 7, "loss_max": i / 5} for i in range(50)]
    axes = drawn([*entries, {"step": 99, "eval_loss": 1.0}], "loss_max")
    assert axes.steps.tolist() == [e["step"] for e in entries] and axes.style["marker"] == "o"
    assert axes.values.tolist() == axes.lowest.tolist() == [e["loss"] for e in entries]
    assert axes.highest.tolist() == [e["loss_max"] for e in entries]


def test_long_curves_keep_their_spikes() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=100_000)
    values[4321], values[77_777], values[5000:6000], values[90_000] = 50.0, -50.0, math.nan, math.inf
    axes = drawn([{"step": i, "loss": value} for i, value in enumerate(values)])
    assert len(axes.steps) == len(axes.values) <= 1000 and axes.style["marker"] is None
    assert (np.diff(axes.steps) > 0).all() and axes.steps[0] < 500 and axes.steps[-1] > 99_500
    assert np.nanmax(axes.highest) == 50 and np.nanmin(axes.lowest) == -50
    assert axes.steps[np.nanargmax(axes.highest)] == pytest.approx(4321, abs=250)
    assert not np.isinf(axes.highest).any() and 3 <= np.isnan(axes.values).sum() <= 5  # the thousand that is missing
    assert np.nanmean(axes.values) == pytest.approx(np.mean(values[np.isfinite(values)]), abs=1e-3)


def coloured(png: bytes, colour: tuple[int, int, int] = (31, 119, 180)) -> int:
    """How many pixels have the first curve's colour."""
    pixels = (255 * matplotlib.image.imread(io.BytesIO(png))[..., :3]).round()
    return int((abs(pixels - colour).max(-1) <= 2).sum())


def test_one_point_can_be_seen() -> None:
    nowhere = student(name="", history=[{"step": 1, "loss": math.nan, "eval_loss": math.nan}])
    one = replace(nowhere, history=[{"step": 1, "loss": 2.0, "eval_loss": math.nan}])
    assert coloured(plots.losses([one])) > coloured(plots.losses([nowhere])) + 10


@pytest.mark.parametrize(
    ("value", "others"),
    [(value, [1.0, 2.0]) for value in (math.nan, math.inf, -math.inf, None, 0.0, -1.0, 1e-45, 3e38)]
    + [(value, []) for value in (math.nan, None, 0.0)],
)
def test_strange_values_do_not_break_the_pictures(value: Any, others: list[float]) -> None:
    entries: list[dict[str, Any]] = [
        {
            "step": step, "loss": x, "eval_loss": x, "loss_ce": x,
            "grad_norm_encoder": x, "grad_norm_encoder_max": x, "grad_norm_decoder": x,
        }
        for step, x in enumerate([*others, value, *others])
    ]  # fmt: skip
    for draw in (plots.losses, plots.terms):
        assert draw([student(history=entries)])[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("sides", "norms"),
    [
        (("encoder", "decoder"), ", and the gradient norms of encoder and decoder before clipping"),
        (("encoder",), ", and the gradient norm of encoder before clipping"),
        (("decoder",), ", and the gradient norm of decoder before clipping"),
        ((), "."),
    ],
)
def test_gradient_norms_are_of_the_stacks_that_there_are(
    sides: tuple[str, ...], norms: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A BERT has no decoder, a GPT-2 no encoder: neither a panel nor a word of it."""
    others = tuple(f"grad_norm_{side}" for side in ("encoder", "decoder") if side not in sides)
    entries = [{k: v for k, v in entry.items() if not k.startswith(others)} for entry in history()]
    drawn, figure = [], plots.figure
    monkeypatch.setattr(plots, "figure", lambda *labels, **over: drawn.append(labels) or figure(*labels, **over))
    report.write(tmp_path, [student(history=entries)], {})
    assert drawn[1] == ("training loss by term", *(f"{side} gradient norm" for side in sides))
    note = next(text for text in Page(tmp_path / "report.html").said_in("p") if "Each term" in text)
    assert f"times its weight{norms}" in note and ("MiniEnD" in note) == (len(sides) == 2)


def test_names_that_matplotlib_would_read_as_something_else() -> None:
    plain, odd, empty = (
        plots.losses([student(name=name, history=history())]) for name in ("abcdefgh", "_$x^{$\\frac", "")
    )
    legends = [(matplotlib.image.imread(io.BytesIO(png))[..., :3].sum(-1) < 1).sum() for png in (plain, odd, empty)]
    assert min(legends[:2]) > legends[2]  # the name is there, in black


# Schedules


def candidates(**metrics: float) -> list[Candidate]:
    """candidates(at_50=0.9): that metric at a sparsity of 50 %, with a lambda of 0.2."""
    shares = {int(name.removeprefix("at_")) / 100: metric for name, metric in metrics.items()}
    return [Candidate(share, 1000, metric, metric + 0.2 * share, 10) for share, metric in shares.items()]


def schedule_of(*trials: Sequence[Round], metric: str = "accuracy") -> Schedule:
    return Schedule(metric, 0.2, 0.95, [Trial(list(rounds)) for rounds in trials])


SANDWICH = Round("sandwich", None, candidates(at_50=0.9, at_85=0.875, at_95=0.7), 0.85, 900, 1234.5, 4.1e6)
LAST = Round("student", 0.85, candidates(at_95=0.75), 0.95, 300, 400.5, 0.9e6)
MINIDISC = schedule_of([SANDWICH, LAST])


def one_trial(assistant: float, metric: float) -> list[Round]:
    """The rounds of a trial with an assistant at that sparsity, 0 for none, whose student has that metric."""
    student = Round("student", assistant or None, candidates(at_95=metric), 0.95, 10, 2.0, 1.0)
    first = Round(
        "assistant", None, [Candidate(assistant, 1000, 0.9, 0.9 + 0.2 * assistant, 5)], assistant, 10, 4.0, 3.0
    )
    return [first, student] if assistant else [student]


# The best in the middle, of two equal ones the first, and the sparsities out of order.
MAXIDISC = schedule_of(*(one_trial(*of) for of in ((0, 0.7), (0.9, 0.68), (0.6, 0.725), (0.7, 0.725), (0.5, 0.71))))
FIXED = schedule_of(one_trial(0.6, 0.72))


def report_of(folder: Path, schedule: Schedule) -> tuple[str, list[list[str]], list[str]]:
    """A report with that schedule: its section in report.md, and the table's cells and the sentences of report.html."""
    report.write(folder, [teacher(history=[]), student(history=[])], {}, **shown(schedule))
    page = Page(folder / "report.html")
    rows = [[text for text, _ in row] for row in page.rows]
    start = next(i for i, row in enumerate(rows) if row[0] == "round")
    markdown = (folder / "report.md").read_text(encoding="utf-8").split("## Schedule\n")[1]
    return markdown, rows[start:], page.said_in("p")[1:]  # the first is the verdict


def test_a_schedule_is_reported(tmp_path: Path) -> None:
    markdown, rows, sentences = report_of(tmp_path, MINIDISC)
    assert rows == [
        ["round", "teacher", "trained at (%)", "chosen (%)", "accuracy (%)", "steps", "training PFLOP", "minutes"],
        ["sandwich", "teacher", "50, 85, 95", "85", "87.50", "900", "4.100", "20.57"],
        ["student", "85 %", "95", "95", "75.00", "300", "0.900", "6.67"],
        ["sum", "", "", "", "", "1200", "5.000", "27.25"],
    ]
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == rows
    why = (
        "Of 3 candidates the assistant at 85 % has the largest tradeoff, metric + lambda * sparsity = 0.8750 + 0.2 * "
        "0.85 = 1.0450."
    )
    assert sentences[0] == why and why in markdown and all(sentence in markdown for sentence in sentences)
    assert re.findall("^## (.*)", markdown, re.MULTILINE) == Page(tmp_path / "report.html").said_in("h2")[1:]
    assert "](tradeoff_curve.png)" in markdown
    pictures = [attributes["src"] or "" for tag, attributes in Page(tmp_path / "report.html").tags if tag == "img"]
    png = (tmp_path / "tradeoff_curve.png").read_bytes()
    assert [base64.b64decode(uri.removeprefix(ADDRESS)) for uri in pictures] == [png] and png[:4] == b"\x89PNG"
    assert Schedule.from_json(strict(tmp_path / "metrics.json")["schedule"]) == MINIDISC


def test_without_a_schedule(tmp_path: Path) -> None:
    report.write(tmp_path, [teacher(history=[]), student(history=[])], {})
    assert "schedule" not in strict(tmp_path / "metrics.json")
    assert not Page(tmp_path / "report.html").said_in("h2") and "##" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("gflops", "seconds", "expected"),
    [
        (2.5e9, 90.0, ["training EFLOP", "minutes", "2.500", "1.50"]),
        (1e6, 60.0, ["training PFLOP", "minutes", "1.000", "1.00"]),
        (999_999.0, 59.9, ["training TFLOP", "seconds", "999.999", "59.90"]),
        (2.0, 1.0, ["training GFLOP", "seconds", "2.000", "1.00"]),
        (0.0125, 0.25, ["training MFLOP", "seconds", "12.500", "0.25"]),
        (0.0, 0.0, ["training MFLOP", "seconds", "0.000", "0.00"]),
    ],
)
def test_units_that_read_well(gflops: float, seconds: float, expected: list[str], tmp_path: Path) -> None:
    _, rows, _ = report_of(tmp_path, schedule_of([replace(LAST, gflops=gflops, seconds=seconds)]))
    assert [*rows[0][-2:], *rows[-1][-2:]] == expected


TARGET = replace(SANDWICH, chosen=0.95)
SECOND = replace(SANDWICH, teacher=0.85, candidates=candidates(at_90=0.85, at_95=0.7), chosen=0.9)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (MAXIDISC, "Of 5 trials the one with the assistant at 60 % made the best student: accuracy 72.50 %."),
        (
            schedule_of(one_trial(0.5, 0.7), one_trial(0, 0.8), metric="exact_match"),
            "Of 2 trials the one with no assistant made the best student: exact match 80.00 %.",
        ),
        (FIXED, "The student was distilled with the assistant at 60 %: nothing was left to choose."),
        (
            schedule_of([one_trial(0.5, 0.7)[0], *one_trial(0.925, 0.7)]),
            "The student was distilled with the assistants at 50 % and 92.5 %: nothing was left to choose.",
        ),
        (
            schedule_of(one_trial(0, 0.7)),
            "The student was distilled with no assistant: nothing was left to choose.",
        ),
        (
            schedule_of([TARGET]),
            "Of 3 candidates the student itself at 95 % has the largest tradeoff, metric + lambda * sparsity = "
            "0.7000 + 0.2 * 0.95 = 0.8900.",
        ),
        (
            schedule_of([SANDWICH, SECOND, LAST]),
            "Of 3 candidates the assistant at 85 % has the largest tradeoff, metric + lambda * sparsity = 0.8750 + "
            "0.2 * 0.85 = 1.0450. Of 2 candidates the assistant at 90 % has the largest tradeoff, metric + lambda * "
            "sparsity = 0.8500 + 0.2 * 0.9 = 1.0300.",
        ),
    ],
)
def test_why_a_student_came_about(
    schedule: Schedule, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minidisc_pages, "_pictures", lambda schedule: [])
    markdown, rows, sentences = report_of(tmp_path, schedule)
    assert sentences[0] == expected and f"\n\n{expected}\n\n" in markdown
    assert len(rows) == 2 + len(schedule.rounds) and rows[-1][5] == str(schedule.steps)


@pytest.fixture
def panels_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Schedule], list[Any]]:
    """panels_of(schedule): the panels of its picture, which is not painted."""
    figures: list[Any] = []
    monkeypatch.setattr(FigureCanvasAgg, "print_png", lambda canvas, *_: figures.append(canvas.figure))

    def panels(schedule: Schedule) -> list[Any]:
        assert [picture.png for picture in minidisc_pages._pictures(schedule)] == [b""]
        return figures[-1].axes

    return panels


def points(line: Any) -> list[tuple[float, float]]:
    return [(round(x, 9), round(y, 9)) for x, y in zip(*line.get_data(), strict=True)]


def test_the_tradeoff_is_drawn(panels_of: Callable[[Schedule], list[Any]]) -> None:
    held_out, tradeoff = panels_of(MINIDISC)
    assert held_out.get_xlabel() == tradeoff.get_xlabel() == "sparsity (%)"
    assert held_out.get_ylabel() == "held-out accuracy (%)"
    assert tradeoff.get_ylabel() == "tradeoff: metric + 0.2 * sparsity"
    curve, ring = held_out.lines
    assert points(curve) == [(50, 90), (85, 87.5), (95, 70)] and points(ring) == [(95, 75)]
    assert [text.get_text() for text in held_out.get_legend().get_texts()] == ["sandwich", "student"]
    curve, star = tradeoff.lines
    assert points(curve) == [(50, 1.0), (85, 1.045), (95, 0.89)]
    assert points(star) == [(85, 1.045)] and star.get_marker() == "*"
    assert [(text.get_text(), text.xy) for text in tradeoff.texts] == [("85 %", (85, 1.045))]


def test_each_round_has_its_own_marker(panels_of: Callable[[Schedule], list[Any]]) -> None:
    rounds = [replace(SANDWICH, name=f"_${i}") for i in range(9)]
    held_out, tradeoff = panels_of(schedule_of([*rounds, LAST]))
    assert len({line.get_marker() for line in held_out.lines[:7]}) == 7 and len(held_out.lines) == 10
    assert len(held_out.get_legend().get_texts()) == 10 and len(tradeoff.texts) == 9


def test_trials_are_drawn(panels_of: Callable[[Schedule], list[Any]]) -> None:
    (axes,) = panels_of(MAXIDISC)
    assert axes.get_xlabel() == "assistant's sparsity (%)"
    assert axes.get_ylabel() == "held-out accuracy of the student (%)"
    curve, without, star = axes.lines
    assert points(curve) == [(50, 71), (60, 72.5), (70, 72.5), (90, 68)]
    assert without.get_label() == "no assistant" and without.get_linestyle() == "--"
    assert [y for _, y in points(without)] == [70, 70]
    assert points(star) == [(60, 72.5)] and [text.get_text() for text in axes.texts] == ["60 %"]

    (axes,) = panels_of(schedule_of(one_trial(0.5, 0.7), one_trial(0, 0.8)))
    assert [line.get_label() for line in axes.lines] == ["student", "no assistant (best)"] and not axes.texts
    (axes,) = panels_of(schedule_of(one_trial(0.5, 0.7), one_trial(0, math.nan)))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["student"]  # no line for what is lost
    assert len(panels_of(schedule_of(one_trial(0.5, 0.7), [SANDWICH, LAST]))) == 3


def test_long_names_of_metrics_fit(panels_of: Callable[[Schedule], list[Any]]) -> None:
    name = "mean of rouge1 and rouge2 and rougeL and rougeLsum"
    (axes,) = panels_of(schedule_of(one_trial(0.5, 0.7), one_trial(0, 0.8), metric=name))
    label = axes.yaxis.label
    assert label.get_text().split() == f"held-out {name} of the student (%)".split()
    assert label.get_window_extent().height < axes.figure.bbox.height


def test_no_picture_without_a_choice(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    markdown, _, _ = report_of(tmp_path / "run", FIXED)
    assert not list((tmp_path / "run").glob("*.png")) and "![" not in markdown
    assert minidisc_pages._pictures(schedule_of(one_trial(0, 0.7))) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_metrics_that_are_not_finite(value: float, tmp_path: Path) -> None:
    """A sandwich whose chosen candidate, and students whose metric, is lost."""
    lost = replace(SANDWICH, candidates=candidates(at_50=0.9, at_85=value, at_95=0.7))
    last = replace(LAST, candidates=candidates(at_95=value))
    schedule = schedule_of([lost, last], one_trial(0, value), one_trial(0.5, 0.7))
    _, rows, _ = report_of(tmp_path, schedule)
    assert [row[4] for row in rows[1:3]] == [f"{value:.2f}"] * 2
    assert (tmp_path / "tradeoff_curve.png").read_bytes()[:4] == b"\x89PNG"
    rounds = strict(tmp_path / "metrics.json")["schedule"]["trials"][0]["rounds"]
    assert [candidate["metric"] for candidate in rounds[0]["candidates"]] == [0.9, None, 0.7]


def test_nasty_rounds(tmp_path: Path) -> None:
    markdown, rows, _ = report_of(tmp_path, schedule_of([replace(SANDWICH, name=NASTY), LAST]))
    assert rows[1][0] == NASTY.replace("\ud800", "\\ud800")
    assert "script" not in {tag for tag, _ in Page(tmp_path / "report.html").tags}
    assert len([line for line in markdown.splitlines() if line.startswith("|")]) == 5


# Comparisons


def test_comparison_of_three_runs(make_run: Callable[..., Path], tmp_path: Path) -> None:
    given: dict[str, Any] = {"parameters": 5_000_000, "steps": 0, "seconds_per_step": None, "history": []}
    a = make_run("a/run", [teacher(), SCRATCH, student()])
    b = make_run("b/run", [teacher(seconds_per_step=0.2, cost=None), student(loss=4.5)], seed=2, extra=True)
    c = make_run("c", [teacher(**given), student(name="mlmkd", history=[])], method="mlmkd")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    out = tmp_path / "new" / "folder"
    table = comparison.compare([a, b, c], out)

    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert [row[0] for row in rows[2:]] == ["teacher of a/run", "teacher of c", "a/run", "b/run", "c"]
    losses = rows[0].index("held-out loss (nats/token)")
    assert [row[losses] for row in rows[2:]] == ["4.6100", "4.6100", "4.7500", "4.5000", "4.7500"]
    assert {path.name for path in out.iterdir()} == {"comparison.md", "comparison.html", "comparison.png"}
    assert {path: path.read_bytes() for path in before} == before

    markdown, page = (out / "comparison.md").read_text(), Page(out / "comparison.html")
    assert table in markdown and "](comparison.png)" in markdown
    differences = [[text for text, _ in row] for row in page.rows][-4:]
    expected = [["method", "kd", "kd", "mlmkd"], ["seed", "1", "2", "1"], ["extra", "-", "True", "-"]]
    assert differences == [["", "a/run", "b/run", "c"], *expected]
    assert all(re.search(r"\| *".join(map(re.escape, ["", row[0]])), markdown) for row in expected)
    source = next(attributes["src"] for tag, attributes in page.tags if tag == "img") or ""
    assert base64.b64decode(source.removeprefix(ADDRESS)) == (out / "comparison.png").read_bytes()
    assert "not evaluated on the same data" not in markdown


def test_a_teacher_that_all_share_is_shown_once(make_run: Callable[..., Path], tmp_path: Path) -> None:
    lost, kept = teacher(loss=math.nan, history=[]), student(history=[])  # NaN equals nothing
    table = comparison.compare([make_run("a", [lost, kept]), make_run("b", [lost, kept])], tmp_path / "out")
    assert [line.split()[1] for line in table.splitlines()[2:]] == ["teacher", "a", "b"]
    assert "What differs" not in (tmp_path / "out" / "comparison.md").read_text()
    table = comparison.compare([tmp_path / "a", make_run("teacher", [lost])], tmp_path / "out")
    assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]] == ["teacher of a", "a", "teacher"]


def test_runs_with_a_schedule_are_compared(tmp_path: Path) -> None:
    outcomes = [teacher(history=[]), student(history=[])]
    for name, schedule in {"minidisc": MINIDISC, "kd": None}.items():
        (tmp_path / name).mkdir()
        report.write(tmp_path / name, outcomes, {"method": name}, **shown(schedule))
    table = comparison.compare([tmp_path / "minidisc", tmp_path / "kd"], tmp_path / "out")
    assert [line.split()[1] for line in table.splitlines()[2:]] == ["teacher", "minidisc", "kd"]
    page = Page(tmp_path / "out" / "comparison.html")
    assert [[text for text, _ in row] for row in page.rows][-2:] == [
        ["", "minidisc", "kd"],
        ["method", "minidisc", "kd"],
    ]
    assert page.said_in("h2") == ["What differs", "Loss curves"]


@pytest.mark.parametrize(("fact", "what"), [("task", "task"), ("held_out_data", "held-out data")])
def test_figures_of_different_data_do_not_stand_in_one_table(
    fact: str, what: str, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    a, b, c = (make_run(name, **{fact: value}) for name, value in (("a", "this"), ("b", "that"), ("c", "this")))
    with pytest.raises(InputError) as raised:
        comparison.compare([a, b, c], tmp_path / "out")
    expected = f"expected runs with the same {what}, got {a}, {c}: this; {b}: that; compare each group by itself"
    assert str(raised.value) == f"--compare: {expected}" and not (tmp_path / "out").exists()
    assert "| c" in comparison.compare([a, c], tmp_path / "out")


def test_losses_of_different_tokens_are_pointed_out(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """The task's figures, of the same texts, do compare."""
    said = comparison.compare([make_run("a", pieces=5), make_run("b", pieces=6)], tmp_path / "out")
    for text in (said, *((tmp_path / "out" / f"comparison.{end}").read_text() for end in ("md", "html"))):
        assert "different tokenizers, so their held-out losses and token accuracies do not compare" in text


def test_odd_folders(make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run("_$x^{$<b>|")
    make_run("x/../y/run")
    monkeypatch.chdir(tmp_path / "y" / "run")
    table = comparison.compare([Path("."), tmp_path / "_$x^{$<b>|"], Path("here"))
    assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]] == ["teacher", "run", "_$x^{$<b>\\"]
    page = Page(tmp_path / "y" / "run" / "here" / "comparison.html")
    assert "_$x^{$<b>|" in [text for text, _ in page.rows[0]] and "b" not in {tag for tag, _ in page.tags}


def test_folders_that_cannot_be_compared(make_run: Callable[..., Path], tmp_path: Path) -> None:
    good = make_run("good")
    complete = json.loads((good / "metrics.json").read_text())
    old = {key: value for key, value in complete.items() if key != "format"}
    contents = {
        "absent": (None, "no metrics.json"),
        "cut off": ('{"format": 3, "mod', "is broken"),
        "bytes": ("\xff", "is broken"),
        "list": ("[1]", "is broken"),
        "no run": (json.dumps({**complete, "run": None}), "is broken"),
        "no models": (json.dumps({**complete, "models": []}), "no models"),
        "half a model": (json.dumps({**complete, "models": [{"name": "kd"}]}), "is broken (KeyError"),
        "text": (json.dumps({**complete, "models": [{**complete["models"][0], "loss": "low"}]}), "'low'"),
        "cost": (json.dumps({**complete, "models": [{**complete["models"][0], "cost": {"price": 1}}]}), "price"),
        "old": (json.dumps(old), "has format 1, expected 3"),
        "newer": (json.dumps({**complete, "format": 4}), "has format 4, expected 3"),
    }
    for name, (content, expected) in contents.items():
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "metrics.json").write_text(content, encoding="latin-1")
        with pytest.raises(InputError) as raised:
            comparison.compare([good, tmp_path / name], tmp_path / "out")
        message = str(raised.value)
        assert str(tmp_path / name) in message and expected in message and "\n" not in message, message
    with pytest.raises(InputError, match="holds no metrics"):
        comparison.compare([tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(InputError, match="given twice"):
        comparison.compare([good, good / ".." / "good"], tmp_path / "out")
    with pytest.raises(InputError, match="at least one"):
        comparison.compare([], tmp_path / "out")
    with pytest.raises(InputError, match="is a file"):
        comparison.compare([good], good / "metrics.json")
    assert not (tmp_path / "out").exists()


# Model cards


def make_card(folder: Path, **changes: Any) -> ModelCard:
    settings: dict[str, Any] = {
        "summary": "both", "teacher": None, "outcomes": [teacher(), student()], "facts": FACTS,
        "task": "summarization", "prefix": "summarize: ",
    }  # fmt: skip
    settings |= changes
    settings["facts"] = {"task": settings.pop("task"), "source_prefix": settings.pop("prefix"), **settings["facts"]}
    card.write_card(folder, **settings)
    return ModelCard.load(folder / "README.md")


def test_a_card_is_read_back(tmp_path: Path) -> None:
    card = make_card(
        tmp_path, teacher="google/t5-v1_1-base", facts={**FACTS, "training_examples": 12345}, notes=["Mind."]
    )
    assert card.data.to_dict() == {
        "base_model": "google/t5-v1_1-base",
        "library_name": "transformers",
        "tags": ["fastkd", "distillation", "t5"],
        "metrics": ["rouge1"],
    }
    for part in (
        "from `google/t5-v1_1-base` by fastkd's method `kd`: both.", pages.table([teacher(), student()]),
        "'summarize: your text'", "12,345 examples", "\n- Mind.\n", "- seed: 1\n- torch: 2.13\n",
        "one task, summarization",
    ):  # fmt: skip
        assert part in card.text, part
    assert "standard library" not in card.text and "fill in spans" not in card.text


def test_only_hub_names_become_base_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "t5").mkdir(parents=True)
    for given in ("my/t5", "./my/t5", str(tmp_path / "my" / "t5"), "C:\\t5", None):
        card = make_card(tmp_path, teacher=given)
        assert "base_model" not in card.data.to_dict() and "a T5 that is not published with it" in card.text
        assert given is None or given not in card.text
    assert make_card(tmp_path, teacher="t5-small").data.get("base_model") == "t5-small"
    card = make_card(tmp_path, outcomes=[student(metrics={})], task="span_corruption")
    assert "without a teacher" in card.text and "metrics" not in card.data.to_dict() and "```yaml" not in card.text


def test_limits_are_those_that_hold(tmp_path: Path) -> None:
    facts = {"texts": "documentation of Python's standard library", "training_chunks": 2000}
    card = make_card(tmp_path, facts=facts, task="span_corruption")
    for part in ("2,000 chunks", "documentation of Python's standard library", "fill in spans"):
        assert part in card.text, part
    assert "chunks" not in make_card(tmp_path, facts={"training_chunks": None}).text.split("## How it was made")[0]


def test_nasty_cards(tmp_path: Path) -> None:
    nasty = NASTY + "\n---\n"
    outcomes = [student(name=nasty, metrics={nasty: 1.0})]
    card = make_card(tmp_path, outcomes=outcomes, facts={nasty: nasty}, prefix=nasty, summary="{{ 7*7 }}")
    assert card.data.get("library_name") == "transformers" and "49" not in card.text
    assert "\n`````python\n" in card.text and len(card.data.get("metrics")) == 1


@pytest.mark.parametrize("task", ["span_corruption", "translation"])
def test_the_snippet_runs(
    tmp_path: Path, tiny: Callable[..., Any], tokenizer: Any, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    card = make_card(tmp_path, task=task, prefix="translate \"English\" to 'Spanish': ")
    code = re.findall(r"```python\n(.*?)\n```", card.text, re.DOTALL)[0]
    scope: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        exec(code.replace('"path/to/this/folder"', repr(str(tmp_path))), scope)
    source = tokenizer.decode(scope["inputs"]["input_ids"][0])
    assert ("<extra_id_0>" in source) == (task == "span_corruption") and scope["model"].config.d_model == 32
    assert capsys.readouterr().out


def test_the_snippet_loads_every_kind_of_t5(
    tmp_path: Path, tiny: Callable[..., Any], tokenizer: Any, transformers_forks: Forks
) -> None:
    """In processes that know no kind of T5 but transformers' own, with the model's own answer."""
    classes, snippets, expected = ["no", "maybe", "yes"], [], []
    kinds: dict[str, Any] = {"t5": tiny(), "pruned": tiny(), "enct5": enct5_from(tiny(), classes)}
    kinds["pruned"] = sliced(kinds["pruned"], {name: part.units // 2 for name, part in parts(tiny()).items()})
    for kind, model in kinds.items():
        model.eval().save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        text = make_card(tmp_path / kind, task="classification" if kind == "enct5" else "span_corruption").text
        code = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)[0]
        assert ("fastkd" in code) == (kind != "t5")  # whoever has a plain T5 needs nothing of fastkd
        snippets.append(code.replace("path/to/this/folder", str(tmp_path / kind)))
        if kind == "enct5":
            answer = int(model(**tokenizer("summarize: your text", return_tensors="pt")).logits.argmax())
            expected.append(classes[answer])
        else:
            inputs = tokenizer("The capital of <extra_id_0> is Paris.", return_tensors="pt")
            expected.append(tokenizer.decode(model.generate(**inputs)[0]))

    unknown = "import sys; assert 'fastkd.train.models' not in sys.modules\n"
    answers = [transformers_forks.run("-c", unknown + snippet) for snippet in snippets]
    assert not any(done.returncode for done in answers), [done.stderr for done in answers]
    assert [done.stdout.strip() for done in answers] == expected and all(expected)
