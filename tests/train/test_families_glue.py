"""GLUE by encoders, from its TSV folders to its figures: those of the saved student, asked by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import families
import pytest
import torch
import transformers
from scipy.stats import spearmanr

from fastkd.train.data.tasks import LABEL_WORDS

pytestmark = pytest.mark.usefixtures("no_pictures")
TEXTS, ROWS = [text[:20] for text in families.TEXTS], 16
_SIDES = ["index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse",
          "sentence1_parse", "sentence2_parse", "sentence1", "sentence2", "label1", "gold_label"]  # fmt: skip
_SCORED = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score"]
# Of each task: the model, its columns, those of both sentences and of the label, and what is held out.
TASKS = {
    "mrpc": ("bert", ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], (3, 4), 0, ["dev"]),
    "mnli": ("roberta", _SIDES, (8, 9), 11, ["dev_matched", "dev_mismatched"]),
    "stsb": ("bert", _SCORED, (7, 8), 9, ["dev"]),
}


def rows_of(task: str, shift: int) -> list[tuple[str, str, str]]:
    """(sentence, sentence, label) of each row, as its file has it."""
    labels = {"mrpc": ["0", "1"], "mnli": ["neutral", "entailment", "contradiction"], "stsb": ["0.4", "4.8", "2.5"]}
    its = labels[task]
    return [(TEXTS[(i + shift) % 8], TEXTS[(i * 3 + 1) % 8], its[(i + shift) % len(its)]) for i in range(ROWS)]


@pytest.mark.parametrize("task", [pytest.param("mrpc", marks=pytest.mark.long), "mnli", "stsb"])
def test_figures_are_those_of_the_students_answers(task: str, tool: Callable[..., int], tmp_path: Path) -> None:
    name, header, places, label, held_out = TASKS[task]
    for shift, part in enumerate(["train", *held_out]):
        lines = ["\t".join(header)]
        for row in rows_of(task, shift):
            cells = ["x"] * len(header)
            cells[places[0]], cells[places[1]], cells[label] = row
            lines.append("\t".join(cells))
        (tmp_path / f"{part}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    out, model = tmp_path / "out", families.folder(name, tmp_path / "model", seed=7)
    flags = ["--method", "scratch", "--student", model, "--task", task, "--train_file", tmp_path]
    assert tool(*flags, "--learning_rate", "0.01", "--max_steps", "8", "--output_dir", out) == 0
    figures = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["models"][-1]["metrics"]

    student = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    expected: dict[str, float] = {}
    for shift, part in enumerate(held_out, start=1):
        said = []
        for first, second, _ in rows_of(task, shift):
            with torch.no_grad():
                said.append(student(**tokenizer(first, second, return_tensors="pt")).logits[0])
        labels = [row[2] for row in rows_of(task, shift)]
        if task == "stsb":
            rank = spearmanr([float(x) for x in said], [float(x) for x in labels]).statistic
            expected["spearman"] = 100 * float(rank)
            continue
        answers = [student.config.id2label[int(x.argmax())] for x in said]
        right = [LABEL_WORDS[task][int(x)] if x.isdigit() else x for x in labels]
        hits = 100 * sum(a == b for a, b in zip(answers, right, strict=True)) / ROWS
        expected[f"{task}_{part.removeprefix('dev_')}_accuracy" if task == "mnli" else "accuracy"] = hits
        if task == "mrpc":
            positive = LABEL_WORDS[task][1]
            true = sum(a == b == positive for a, b in zip(answers, right, strict=True))
            expected["f1"] = 200 * true / max(1, answers.count(positive) + right.count(positive))
    assert figures == pytest.approx(expected, rel=1e-4)
    assert task == "mrpc" or 0 not in figures.values()
