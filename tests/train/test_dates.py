"""Dates as people write them, and the demo that learns them from few labels."""

from __future__ import annotations

import datetime
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastkd.train.data import dates
from fastkd.train.data.corpus import is_held_out
from fastkd.train.judge.evaluate import generate


class First(random.Random):
    """Chooses what stands at one place."""

    def __init__(self, place: int):
        super().__init__(0)
        self.place = place

    def choice(self, options: Any) -> Any:
        return options[self.place]


def test_every_way_to_write_a_date() -> None:
    assert [dates._written(datetime.date(1668, 10, 28), First(place)) for place in range(6)] == [
        "the twenty-eighth of october, sixteen sixty-eight",
        "october twenty-eighth, sixteen sixty-eight",
        "28 october, sixteen sixty-eight",
        "28 oct 1668",
        "oct 28, 1668",
        "10/28/1668",
    ]
    years = {1500: "fifteen hundred", 1904: "nineteen oh four", 1813: "eighteen thirteen", 1790: "seventeen ninety"}
    assert {year: dates._year(year) for year in years} == years
    days = {1: "first", 2: "second", 3: "third", 5: "fifth", 8: "eighth", 9: "ninth", 12: "twelfth", 19: "nineteenth"}
    days |= {20: "twentieth", 21: "twenty-first", 24: "twenty-fourth", 30: "thirtieth", 31: "thirty-first"}
    assert {day: dates._ordinal(day) for day in days} == days


def test_every_pair_is_of_another_day() -> None:
    """So that held-out pairs share no date with the others, whichever they are."""
    pairs = dates.date_pairs()
    digits = [target for _, target in pairs]
    assert len(set(digits)) == len(pairs) == 20_000 and digits[0] != digits[1]
    days = {datetime.date.fromisoformat(text.replace(" ", "")) for text in digits}
    assert min(days).year == 1500 and max(days).year == 1999
    assert all(" ".join(day.isoformat()) in set(digits) for day in list(days)[:100])
    numbers = [(re.findall(r"\d+", source), target.replace(" ", "")) for source, target in pairs if "/" in source]
    assert all(f"{year}-{int(month):02}-{int(day):02}" == target for (month, day, year), target in numbers)
    held_out = [target for source, target in pairs if is_held_out(source)]
    assert 900 < len(held_out) < 1100 and not set(held_out) & {t for s, t in pairs if not is_held_out(s)}
    assert dates.date_pairs(50) == dates.date_pairs(50) != dates.date_pairs(50, seed=2)


def test_a_demo_of_few_labels(
    tool: Callable[..., int], trainers: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Students without a teacher see the labelled examples alone; its answers stand for the labels of the others."""
    out, flags = tmp_path / "demo", ["--max_train_examples", 80, "--max_eval_examples", 6, "--report_examples", 2]
    few = ["--embedded_data", "dates", "--task", "text2text", "--labelled_examples", 10, "--method", "hsm-cka"]
    assert tool("--demo", *few, *flags, "--output_dir", out) == 0
    teacher, _, scratch, start, distilled = trainers
    known = dict(dates.date_pairs())
    assert len(scratch.train_dataset) == len(start.train_dataset) == 10
    rows = distilled.train_dataset.rows
    assert rows[:10] == scratch.train_dataset.rows[:10] == start.train_dataset.rows[:10]
    assert all(known[row["source"]] == row["target"] for row in rows.take(10))
    assert len(rows) == 10 + 4 * 4  # as many as four steps of four read
    answered = rows.skip(10)
    options: Any = {"max_new_tokens": max(map(len, scratch.eval_dataset.rows["labels"])), "num_beams": 1, "kept": set()}
    texts = generate(teacher.model, teacher.processing_class, answered["input_ids"], batch_size=16, **options)
    assert list(answered["target"]) == texts != [known[source] for source in answered["source"]]
    decoded = teacher.processing_class.batch_decode(list(answered["labels"]), skip_special_tokens=True)
    assert [text.strip() for text in decoded] == texts

    (own,), (none,) = ([rate for _, rate in trainer._own_rates[:1]] for trainer in (scratch, start))
    assert own == 80 * scratch.args.learning_rate and none is None
    metrics = json.loads((out / "metrics.json").read_text())
    assert [model["name"] for model in metrics["models"]] == ["teacher", "scratch", "sliced start", "hsm-cka"]
    assert metrics["run"]["texts"] == "dates as people write them, made here"
    assert {"teacher", "scratch", "sliced-start", "student"} < {path.name for path in out.iterdir()}
    said = capsys.readouterr().out.splitlines()
    table = said.index(next(line for line in said if "exact match" in line and "answer to: " in line))
    assert [line.split("|")[1].strip() for line in said[table + 2 : table + 7]] == [
        "teacher", "scratch", "sliced start", "hsm-cka", "right answer"
    ]  # fmt: skip
    assert "10 labelled examples alone" in "".join(said) and "Held-out exact match of hsm-cka" in "".join(said)


@pytest.mark.parametrize("flags", [["--task", "span_corruption"], ["--streaming", "--max_steps", 4]])
def test_labels_of_what_has_none(flags: list[Any], tool: Callable[..., int], text_file: Path, capsys: Any) -> None:
    flags = ["--method", "scratch", "--train_file", text_file, "--labelled_examples", 5, *flags]
    assert tool(*flags, "--output_dir", text_file.parent / "none") == 2
    assert "--labelled_examples" in capsys.readouterr().err
