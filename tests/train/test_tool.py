"""fastkd-train as people use it: every task, every way to give models and data, small, in this process."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import sysconfig
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from scipy.stats import spearmanr
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5ForConditionalGeneration

from fastkd.train import cli
from fastkd.train.common.errors import InputError
from fastkd.train.data import corpus
from fastkd.train.data.tasks import TASKS, figure_names
from fastkd.train.flags import config
from fastkd.train.flags.arguments import parse
from fastkd.train.judge.metrics import GLUE_COLUMNS, score_rows
from fastkd.train.models.tokenizer import train_tokenizer
from fastkd.train.objectives.methods import METHODS
from fastkd.train.stages import judging
from fastkd.train.training.trainer import DistillTrainer

SAVING = ["--save_strategy", "steps", "--save_steps", "2"]
CONSTANT = ["--lr_scheduler_type", "constant", "--warmup_steps", "0"]  # so that a run may become longer
ROUGE = {"rouge1", "rouge2", "rougeL", "rougeLsum"}


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def student_of(folder: Path) -> dict[str, Any]:
    """What metrics.json says of the student."""
    return metrics_of(folder)["models"][-1]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def files(folder: Path) -> dict[str, int]:
    """Name and time of the last change of all files."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to stderr, which must be one line of ours."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastkd-train: "), lines
    return lines[0]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as JSONL or CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def written(folder: Path, sources: Sequence[str], most: int) -> list[str]:
    """What the student in a folder writes, one source at a time."""
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForSeq2SeqLM, AutoTokenizer))
    outputs = [model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=most)[0] for text in sources]
    return [str(tokenizer.decode(output, skip_special_tokens=True)).strip() for output in outputs]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tool")


@pytest.fixture(scope="module")
def teacher(tokenizer: Any, saved: Callable[..., Path], place: Path) -> Path:
    """A teacher 128 wide, of 3 layers a side, as it comes from the generator: nobody trained it."""
    from fastkd.train.models.student import new_model, t5_config

    return saved(new_model(t5_config(512, 128, 3), seed=9), place / "teacher")


@pytest.fixture(scope="module")
def summaries(texts: list[str], place: Path) -> list[Any]:
    """The flags of documents with summaries to learn from, and of others to evaluate on."""
    rows = [{"document": text, "summary": " ".join(text.split()[:3])} for text in texts[:30]]
    train, held_out = write(place / "train.jsonl", rows[:24]), write(place / "eval.jsonl", rows[24:])
    return ["--task", "summarization", "--train_file", train, "--eval_file", held_out]


# ---- The embedded tasks ----


class Page(HTMLParser):
    """The text of a page whose every tag is closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, self.open
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag not in ("meta", "img", "br", "hr", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("task", ["span_corruption", "text2text", "summarization", "classification"])
def test_a_demo_of_every_embedded_task(
    task: str, tool: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["difflib", "doctest", "statistics", "threading"]
    library = [Path(sysconfig.get_path("stdlib")) / f"{name}.py" for name in names]
    monkeypatch.setattr(corpus, "source_files", lambda root=None: library)
    out = tmp_path / "demo"
    assert tool("--demo", "--task", task, "--report_examples", 3, "--max_eval_examples", 5, "--output_dir", out) == 0
    metrics, page = metrics_of(out), Page((out / "report.html").read_text(encoding="utf-8"))
    assert [model["name"] for model in metrics["models"]] == ["teacher", "scratch", "mlmkd"]
    assert len(metrics["examples"]) == 3
    shown = [text for example in metrics["examples"] for text in example.values()]
    for model in metrics["models"]:
        assert set(model["metrics"]) == set(TASKS[task].metrics) and all(
            0 <= v <= 100 for v in model["metrics"].values()
        )
        assert len(model["outputs"]) == 3 and model["steps"] == 4
        shown += [*model["outputs"], f"{model['loss']:.4f}"]
    assert all(" ".join(text.split()) in page.text for text in shown)
    if task == "span_corruption":
        assert all("<extra_id_0>" in example["source"] for example in metrics["examples"])
        assert all(example["target"].startswith("<extra_id_0>") for example in metrics["examples"])
    assert metrics["run"]["texts"] == "documentation of Python's standard library" and metrics["run"]["task"] == task
    for folder in ("scratch", "student"):
        card = ModelCard.load(out / folder / "README.md")
        assert card.data.library_name == "transformers" and "distillation" in card.data.tags
        assert T5ForConditionalGeneration.from_pretrained(out / folder).config.d_model == 32
    assert sorted(card.data.metrics or []) == sorted(TASKS[task].metrics)


# ---- Data of the user's own ----


def test_summaries_by_a_student_sliced_from_its_teacher(
    tool: Callable[..., int], teacher: Path, summaries: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    flags = ["--method", "hsm-cka", "--teacher", teacher, *summaries, "--report_examples", 6, "--output_dir", out]
    assert tool(*flags) == 0
    metrics = metrics_of(out)
    assert [set(model["metrics"]) for model in metrics["models"]] == [ROUGE, ROUGE]
    assert metrics["run"]["training_examples"] == 24 and metrics["run"]["held_out_examples"] == 6
    sources, targets = ([example[side] for example in metrics["examples"]] for side in ("source", "target"))
    lines = [json.loads(line) for line in Path(summaries[-1]).read_text(encoding="utf-8").splitlines()]
    assert sources == ["summarize: " + line["document"] for line in lines]
    assert targets == [line["summary"] for line in lines]
    longest = max(len(AutoTokenizer.from_pretrained(teacher)(target)["input_ids"]) for target in targets)
    assert written(out, sources, longest) == student_of(out)["outputs"]
    assert written(teacher, sources, longest) == metrics["models"][0]["outputs"]
    history = student_of(out)["history"]
    assert all(entry["loss_hidden_cka"] > 0 and entry["loss_ce+logit_kl"] > 0 for entry in history if "loss" in entry)


def test_translations(tool: Callable[..., int], teacher: Path, texts: list[str], tmp_path: Path) -> None:
    rows = [{"translation": {"es": text.split()[0], "en": text, "fr": "non"}} for text in texts[:60]]
    data, out = write(tmp_path / "pairs.jsonl", rows), tmp_path / "run"
    flags = ["--task", "translation", "--train_file", data, "--source_lang", "en", "--target_lang", "es"]
    assert tool("--method", "kd", "--teacher", teacher, *flags, "--output_dir", out) == 0
    metrics = metrics_of(out)
    assert all(set(model["metrics"]) == {"bleu", "chrf"} for model in metrics["models"])
    assert metrics["run"]["source_prefix"] == "translate English to Spanish: "
    assert "version:" in metrics["run"]["bleu"]  # sacrebleu's signature
    pairs = {f"translate English to Spanish: {row['translation']['en']}": row["translation"]["es"] for row in rows}
    assert all(pairs[example["source"]] == example["target"] for example in metrics["examples"])
    assert "translate English to Spanish: " in (out / "README.md").read_text(encoding="utf-8")


def test_classes_from_csv(tool: Callable[..., int], texts: list[str], tmp_path: Path) -> None:
    rows = [{"id": i, "text": text, "label": ("ment", "sil")[i % 2]} for i, text in enumerate(texts[:90])]
    data, out = write(tmp_path / "classes.csv", rows), tmp_path / "run"
    flags = ["--method", "scratch", "--task", "classification", "--train_file", data, "--report_examples", 90]
    flags += ["--max_steps", 60, "--eval_steps", 60]
    assert tool(*flags, "--eval_file", data, "--output_dir", out) == 0
    metrics = metrics_of(out)
    labels = {row["text"]: row["label"] for row in rows}
    examples, outputs = metrics["examples"], student_of(out)["outputs"]
    assert len(examples) == metrics["run"]["training_examples"] == 90
    assert all(labels[example["source"]] == example["target"] for example in examples)
    right = sum(output == example["target"] for output, example in zip(outputs, examples, strict=True))
    assert student_of(out)["metrics"]["accuracy"] == pytest.approx(100 * right / len(examples))
    assert right  # or the comparison is of nothing with nothing


GLUE_HEADERS = {
    "SST-2": "sentence|label",
    "MRPC": "Quality|#1 ID|#2 ID|#1 String|#2 String",
    "STS-B": "index|genre|sentence1|sentence2|score",
    "QQP": "id|qid1|qid2|question1|question2|is_duplicate",
    "MNLI": "index|pairID|sentence1|sentence2|gold_label",
    "QNLI": "index|question|sentence|label",
    "RTE": "index|sentence1|sentence2|label",
}


def glue_row(task: str, i: int) -> tuple[list[str], str, str]:
    """One row of a task's TSV file, and the source and target that T5 makes of it."""
    a, b = f"first {i}.", f"second {i % 7}?"
    yes = i % 3 != 0
    if task == "SST-2":
        return [a, str(int(yes))], f"sst2 sentence: {a}", "positive" if yes else "negative"
    if task == "MRPC":
        target = "equivalent" if yes else "not_equivalent"
        return [str(int(yes)), "1", "2", a, b], f"mrpc sentence1: {a} sentence2: {b}", target
    if task == "STS-B":
        return ["0", "main", a, b, f"{i % 6}.000"], f"stsb sentence1: {a} sentence2: {b}", f"{i % 6}.0"
    if task == "QQP":
        target = "duplicate" if yes else "not_duplicate"
        return ["0", "1", "2", a, b, str(int(yes))], f"qqp question1: {a} question2: {b}", target
    if task == "MNLI":
        target = ("entailment", "neutral", "contradiction")[i % 3]
        return ["0", "x", a, b, target], f"mnli hypothesis: {b} premise: {a}", target
    target = "entailment" if yes else "not_entailment"
    fields = "question sentence" if task == "QNLI" else "sentence1 sentence2"
    first, second = fields.split()
    source = f"{task.lower()} {first}: {a} {second}: {b}"
    return ["0", a, b, target], source, target


@pytest.fixture(scope="module")
def glue(place: Path) -> tuple[Path, list[tuple[str, str, str]]]:
    """A folder of GLUE's layout, and what is held out: the metric's column, source and target."""
    held_out = []
    for task, header in GLUE_HEADERS.items():
        (place / "glue" / task).mkdir(parents=True)
        parts = {"train": range(24), "dev": range(3, 12)}
        if task == "MNLI":
            parts = {"train": range(24), "dev_matched": range(3, 10), "dev_mismatched": range(4, 13)}
        for part, numbers in parts.items():
            rows = [glue_row(task, i) for i in numbers]
            lines = ["\t".join(fields) for fields in [header.split("|"), *(fields for fields, _, _ in rows)]]
            (place / "glue" / task / f"{part}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
            if part != "train":
                column = {"SST-2": "sst2", "STS-B": "stsb"}.get(task, part.replace("dev", task.lower()))
                held_out += [(column, source, target) for _, source, target in rows]
    return place / "glue", held_out


def test_all_of_glue(tool: Callable[..., int], glue: tuple[Path, list[tuple[str, str, str]]], tmp_path: Path) -> None:
    folder, held_out = glue
    out = tmp_path / "run"
    flags = ["--method", "scratch", "--task", "glue", "--train_file", folder, "--report_examples", 100]
    flags += ["--max_steps", 60, "--eval_steps", 60, "--per_device_train_batch_size", 16, "--learning_rate", "1e-2"]
    assert tool(*flags, "--output_dir", out) == 0
    metrics, student = metrics_of(out), student_of(out)
    assert [(e["source"], e["target"]) for e in metrics["examples"]] == [
        (source, target) for _, source, target in held_out
    ]
    assert metrics["run"]["training_examples"] == 7 * 24

    tokenizer = AutoTokenizer.from_pretrained(out)
    longest = max(len(tokenizer(target)["input_ids"]) for _, _, target in held_out)
    outputs = written(out, [source for _, source, _ in held_out], longest)
    assert outputs == student["outputs"]
    figures: dict[str, float] = {}
    for column in GLUE_COLUMNS:
        pairs = [(o, target) for o, (c, _, target) in zip(outputs, held_out, strict=True) if c == column]
        said, targets = zip(*pairs, strict=True)
        right = [o == target for o, target in pairs]
        if column == "stsb":
            numbers = [float(o) if re.fullmatch(r"\d(\.\d)?", o) else -1 for o in said]
            figures[column] = 0.0 if len(set(numbers)) == 1 else 100 * spearmanr(numbers, list(map(float, targets)))[0]
        elif column in ("mrpc", "qqp"):
            positive = "equivalent" if column == "mrpc" else "duplicate"
            hits = sum(o == target == positive for o, target in pairs)
            # An output that is no label counts as the wrong one.
            claimed = sum(o == positive or (o != f"not_{positive}" and t != positive) for o, t in pairs)
            figures[column] = 100 * 2 * hits / (claimed + targets.count(positive))
        else:
            figures[column] = 100 * sum(right) / len(right)
        assert student["metrics"][f"{column}_{GLUE_COLUMNS[column]}"] == pytest.approx(figures[column]), column
    assert len(figures) == 8 and sum(value > 0 for value in figures.values()) > 3
    assert student["metrics"]["glue_mean"] == pytest.approx(sum(figures.values()) / 8)


def test_fine_tuning_a_student_that_exists(
    tool: Callable[..., int],
    teacher: Path,
    saved: Callable[..., Path],
    glue: tuple[Path, Any],
    tiny: Callable[..., Any],
    tmp_path: Path,
) -> None:
    student = saved(tiny(64, 4, layers=2), tmp_path / "student")
    flags = ["--student", student, "--task", "sst2", "--train_file", glue[0]]
    before = load_file(student / "model.safetensors")
    for method, extra in (("scratch", []), ("kd", ["--teacher", teacher])):
        out = tmp_path / method
        assert tool("--method", method, *extra, *flags, "--output_dir", out) == 0
        after, run = load_file(out / "model.safetensors"), metrics_of(out)["run"]
        assert run["student"] == str(student) and run["learning_rate"] == run["embedding_learning_rate"] == 3e-4
        assert set(student_of(out)["metrics"]) == {"accuracy"} and before.keys() == after.keys()
        moves = torch.stack([(after[name] - value).abs().max() for name, value in before.items()])
        assert 0 < moves.max() < 4 * 2 * 3e-4  # AdamW moves no weight by much more than its rate, in 4 steps
    assert tool("--method", "kd", *extra, *flags, "--learning_rate", "1e-30", "--output_dir", tmp_path / "still") == 0
    assert weights(tmp_path / "still") == weights(student)
    assert weights(tmp_path / "kd") != weights(tmp_path / "scratch")


# ---- Configurations ----


@pytest.mark.usefixtures("no_pictures")
def test_the_configuration_that_a_run_leaves_repeats_it(
    tool: Callable[..., int], teacher: Path, text_file: Path, tmp_path: Path
) -> None:
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    flags = ["--method", "miniend-e", "--teacher", teacher, "--train_file", text_file, "--max_eval_examples", 8]
    flags += ["--weights", "encoder_self=0.5", "--seed", 3, "--gradient_accumulation_steps", 2, *CONSTANT]
    flags += ["--divergence", "jsd", "--learning_rate", "1e-3", "--max_grad_norm", 0.5]
    assert tool(*flags, "--output_dir", first) == 0
    left = first / "config.yaml"
    assert cli.main(["--config", str(left), "--output_dir", str(again)]) == 0
    assert weights(again) == weights(first) and student_of(again)["loss"] == student_of(first)["loss"]
    assert cli.main(["--config", str(left), "--output_dir", str(other), "--seed", "4"]) == 0
    assert metrics_of(other)["run"]["seed"] == 4 and weights(other) != weights(first)
    assert metrics_of(other)["run"]["loss"] == metrics_of(first)["run"]["loss"]


def test_flags_files_and_nulls(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "method: kd\ntrain_file: x\nteacher: t\nnum_train_epochs: 7\ntemperature: null\nstudent_layers: 3\n"
    )
    flags, args = parse(["--config", str(file)])
    assert (flags.method, flags.temperature, flags.student_layers) == ("kd", None, 3)
    assert (args.num_train_epochs, args.max_steps) == (7, -1)
    flags, args = parse(["--config", str(file), "--max_steps", "5", "--method=mlmkd", "--temperature", "3"])
    assert (flags.method, flags.temperature, args.max_steps) == ("mlmkd", 3, 5)
    assert args.num_train_epochs == 0
    file.write_text("train_file: x\nteacher: t\nmax_steps: 9\n")
    _, args = parse(["--config", str(file), "--num_train_epochs=2"])
    assert (args.num_train_epochs, args.max_steps) == (2, -1)


@pytest.mark.parametrize("name", METHODS)
def test_a_configuration_ships_for_every_method(name: str) -> None:
    assert config.shipped().keys() == {*METHODS, "demo", "demo-encoder"}
    flags, args = parse(["--config", name, "--teacher", "x", "--train_file", "y"])
    prunes = METHODS[name].student_init == "prune"  # the teacher's layers and width
    sizes = (flags.student_layers, flags.student_d_model)
    assert (flags.method, flags.teacher) == (name, "x")
    assert sizes == ((6, 384) if METHODS[name].student_init == "random" else (None, None))
    assert args.learning_rate == (1e-4 if prunes else 3e-4) and (args.max_steps > 0) != (args.num_train_epochs > 0)


# ---- Streams ----


@pytest.mark.parametrize("task", ["span_corruption", "summarization"])
def test_a_stream_resumes_where_it_was(
    task: str,
    tool: Callable[..., int],
    teacher: Path,
    summaries: list[Any],
    texts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = summaries
    if task == "span_corruption":
        train = write(tmp_path / "train.jsonl", [{"text": text} for text in texts[:40]])
        (tmp_path / "eval.txt").write_text("\n\n".join(texts[40:50]), encoding="utf-8")
        data = ["--train_file", train, "--eval_file", tmp_path / "eval.txt"]
    flags = ["--method", "kd", "--teacher", teacher, *data, "--streaming", "--shuffle_buffer", 8, *SAVING, *CONSTANT]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert tool(*flags, "--output_dir", whole) == 0
    assert tool(*flags, "--output_dir", parts, "--max_steps", 2) == 0
    assert weights(parts) != weights(whole)
    assert tool(*flags, "--output_dir", parts, "--resume_from_checkpoint", "last") == 0
    assert weights(parts) == weights(whole)
    assert student_of(parts)["loss"] == student_of(whole)["loss"]

    capsys.readouterr()
    at = data.index("--eval_file")
    without = ["--method", "kd", "--teacher", teacher, *data[:at], "--streaming", "--output_dir", tmp_path / "none"]
    assert tool(*without) == 2
    assert "--streaming needs --eval_file" in one_line(capsys) and not (tmp_path / "none").exists()


# ---- Teacher, assistant, student ----


def test_an_assistant_in_between(
    tool: Callable[..., int], teacher: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    stop_at: list[int] = []
    step = DistillTrainer.training_step

    def counted(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        steps.append(self.model.config.d_model)
        if len(steps) in stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "training_step", counted)
    flags = ["--interpolated", "--method", "mlmkd", "--teacher", teacher, "--train_file", text_file, *SAVING]
    flags += ["--max_eval_examples", 8]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert tool(*flags, "--output_dir", whole) == 0
    assert steps == [64] * 4 + [32] * 4
    sizes = {name: T5ForConditionalGeneration.from_pretrained(whole / name).config for name in ("assistant", "student")}
    assert (sizes["assistant"].d_model, sizes["assistant"].num_layers) == (64, 2)  # of 128 and 32, of 3 and 1
    assert (sizes["student"].d_model, sizes["student"].num_layers) == (32, 1)
    assert metrics_of(whole / "assistant")["run"]["teacher"] == str(teacher)
    assert metrics_of(whole / "student")["run"]["teacher"] == str(whole / "assistant")
    assert metrics_of(whole / "student")["models"][0]["loss"] == student_of(whole / "assistant")["loss"]

    steps.clear()
    stop_at.append(3)
    assert tool(*flags, "--output_dir", parts) == 143
    assert (parts / "assistant" / "checkpoint-3").is_dir() and not (parts / "student").exists()
    steps.clear()
    stop_at.clear()
    resume = [*flags, "--output_dir", parts, "--resume_from_checkpoint", "last"]
    assert tool(*resume) == 0
    assert steps == [64] + [32] * 4
    for name in ("assistant", "student"):
        assert weights(parts / name) == weights(whole / name)

    assistant = files(parts / "assistant")
    shutil.rmtree(parts / "student")
    steps.clear()
    assert tool(*resume) == 0
    assert steps == [32] * 4 and files(parts / "assistant") == assistant
    assert weights(parts / "student") == weights(whole / "student")


# ---- Generation while training ----


def test_the_best_model_by_what_it_writes(
    tool: Callable[..., int],
    teacher: Path,
    summaries: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trainers: list[Any],
) -> None:
    scores = iter([5.0, 10.0, 30.0, 20.0, 30.0])  # of the teacher, after steps 2, 4 and 6, and of what is kept
    monkeypatch.setattr(judging, "score_rows", lambda *_: {"rougeL": next(scores)})
    flags = ["--method", "kd", "--teacher", teacher, *summaries, *SAVING, "--max_steps", 6, "--eval_steps", 2]
    flags += ["--predict_with_generate", "--load_best_model_at_end", "--metric_for_best_model", "eval_rougeL"]
    assert tool(*flags, "--output_dir", tmp_path / "run") == 0
    student = student_of(tmp_path / "run")
    written = [entry["eval_rougeL"] for entry in student["history"] if "eval_rougeL" in entry]
    assert written == [10.0, 30.0, 20.0] and student["metrics"] == {"rougeL": 30.0}
    assert trainers[-1].state.best_global_step == 4
    assert weights(tmp_path / "run") == weights(tmp_path / "run" / "checkpoint-4")
    losses = {entry["step"]: entry["eval_loss"] for entry in student["history"] if "eval_loss" in entry}
    assert losses[4] != losses[6] and student["loss"] == losses[4]  # the table is about the model in the folder


def test_generation_while_training_by_its_real_figures(
    tool: Callable[..., int], teacher: Path, summaries: list[Any], tmp_path: Path
) -> None:
    flags = ["--method", "kd", "--teacher", teacher, *summaries, "--eval_steps", 2, "--predict_with_generate"]
    assert tool(*flags, "--output_dir", tmp_path / "run") == 0
    student = student_of(tmp_path / "run")
    last = [entry for entry in student["history"] if "eval_rougeL" in entry][-1]
    assert last["step"] == 4 and {f"eval_{name}" for name in ROUGE} <= last.keys()
    assert {name: last[f"eval_{name}"] for name in ROUGE} == student["metrics"]


def test_texts_have_no_figure_to_generate_for(
    tool: Callable[..., int], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--method", "scratch", "--train_file", text_file, "--max_eval_examples", 8, "--predict_with_generate"]
    plain, out = tmp_path / "plain", tmp_path / "run"
    assert tool(*flags[:-1], "--output_dir", plain) == 0
    assert tool(*flags, "--output_dir", out) == 0
    assert weights(out) == weights(plain)
    assert student_of(out)["metrics"] == {}
    keys = [[sorted(entry) for entry in student_of(folder)["history"]] for folder in (plain, out)]
    assert keys[0] == keys[1]
    capsys.readouterr()
    best = [*SAVING, "--eval_steps", 2, "--load_best_model_at_end", "--metric_for_best_model", "eval_rougeL"]
    assert tool(*flags, *best, "--output_dir", tmp_path / "best") == 2
    expected = "--metric_for_best_model: expected one of eval_loss, eval_token_accuracy, got 'eval_rougeL'"
    assert expected in one_line(capsys) and not (tmp_path / "best").exists()


@pytest.mark.parametrize(
    ("task", "metric", "found"),
    [
        ("summarization", "eval_rougeL", True),
        ("summarization", "eval_rougel", False),
        ("summarization", "loss", True),
        ("mnli", "mnli_matched_accuracy", True),
        ("mnli", "accuracy", False),
        ("glue", "eval_glue_mean", True),
    ],
)
def test_the_figure_of_the_best_model_must_be_one_that_there_is(task: str, metric: str, found: bool) -> None:
    flags = ["--task", task, "--train_file", "x", "--teacher", "t", "--metric_for_best_model", metric]
    if found:
        parse([*flags, "--predict_with_generate"])
    else:
        with pytest.raises(InputError, match=f"--metric_for_best_model: expected one of eval_loss, .*, got '{metric}'"):
            parse([*flags, "--predict_with_generate"])
    if metric != "loss":
        with pytest.raises(InputError, match="need --predict_with_generate"):
            parse(flags)


def test_the_names_of_figures_are_those_of_scores() -> None:
    for task in TASKS.values():
        assert task.is_text == (figure_names(task) == [])
        parts = [TASKS[name] for name in task.parts] or [task]
        columns = [column for part in parts for column in part.columns] or [task.name]
        if not task.is_text:
            assert set(figure_names(task)) == score_rows(columns, ["0"] * len(columns), ["0"] * len(columns)).keys()


# ---- The cache ----


def test_the_cache_knows_contents_and_lengths(tool: Callable[..., int], texts: list[str], tmp_path: Path) -> None:
    cache, mine, copy = tmp_path / "cache", tmp_path / "mine.txt", tmp_path / "elsewhere" / "copy.txt"
    mine.write_text("\n\n".join(texts[:100]), encoding="utf-8")
    copy.parent.mkdir()
    shutil.copy(mine, copy)

    def run(name: str, *flags: Any) -> dict[str, int]:
        where = ["--cache_dir", cache, "--output_dir", tmp_path / name]
        assert tool("--method", "scratch", "--max_steps", 2, *where, *flags) == 0
        # What rows become before they are tokenised is not kept for other lengths, but made again.
        return {name: time for name, time in files(cache).items() if not name.startswith("pairs-")}

    def kinds(before: dict[str, int], after: dict[str, int]) -> set[str]:
        assert before.items() <= after.items()  # nothing is made again
        return {name.split("-")[0] for name in after.keys() - before.keys()}

    first = run("first", "--train_file", mine)
    assert kinds({}, first) == {"rows", "tokenizer", "tokenised"}
    assert run("copy", "--train_file", copy) == first
    longer = run("longer", "--train_file", mine, "--sequence_length", 48)
    assert kinds(first, longer) == {"tokenised"}
    mine.write_text("\n\n".join(texts[:99]), encoding="utf-8")
    changed = run("changed", "--train_file", mine)
    assert kinds(longer, changed) == {"rows", "tokenizer", "tokenised"}
    assert weights(tmp_path / "changed") != weights(tmp_path / "first") == weights(tmp_path / "copy")

    pairs = write(tmp_path / "pairs.jsonl", [{"document": text, "summary": text[:40]} for text in texts[:40]])
    task = ["--task", "summarization", "--train_file", pairs]
    before = run("pairs", *task)
    for flag in ("--max_source_length", "--max_target_length"):
        after = run(flag, *task, flag, 12)
        assert kinds(before, after) == {"tokenised"}, flag
        before = after


# ---- One line before anything is written ----


def test_bad_data_and_models_that_do_not_go_together_are_one_line(
    tool: Callable[..., int],
    teacher: Path,
    saved: Callable[..., Path],
    tiny: Callable[..., Any],
    texts: list[str],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = '{"document": "a b c", "summary": "a"}\n'
    contents = {
        "torn.jsonl": (good * 3 + '{"document": "a", "summary"\n' + good).encode(),
        "latin.jsonl": b'{"document": "a", "summary": "b"}\n{"document": "caf\xe9", "summary": "a"}\n',
        "blank.jsonl": b'{"document": " ", "summary": "a"}\n{"document": "a", "summary": null}\n' * 3,
        "columns.jsonl": b'{"words": "a", "fewer": "b"}\n',
        "other.yaml": b"method: kd\nstudent_d_modell: 32\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    other = saved(tiny(32, 1), tmp_path / "other", train_tokenizer(texts[:100], vocabulary_size=300))
    pairs = ["--method", "kd", "--teacher", teacher, "--task", "summarization"]
    plain = ["--teacher", teacher, "--train_file", text_file]
    cases: list[tuple[list[Any], list[str]]] = [
        ([*pairs, "--train_file", tmp_path / "torn.jsonl"], ["torn.jsonl, line 4", "malformed JSON"]),
        ([*pairs, "--train_file", tmp_path / "latin.jsonl"], ["latin.jsonl", "UTF-8", "line 2"]),
        ([*pairs, "--train_file", tmp_path / "blank.jsonl"], ["no row has both a source and a target"]),
        ([*pairs, "--train_file", tmp_path / "columns.jsonl"], ["--source_column", "words, fewer"]),
        ([*plain, "--method", "kd", "--student", other], [str(teacher), str(other), "different tokenizers"]),
        ([*plain, "--method", "hsm-cka", "--student_d_model", 256], ["--student_d_model", "at most 128", "256"]),
        ([*plain, "--method", "hsm-cka", "--student_layers", 4], ["--student_layers", "at most 3", "4"]),
        (["--demo", *SAVING, "--eval_steps", 2, "--load_best_model_at_end"], ["--demo", "--load_best_model_at_end"]),
        ([*plain, "--config", tmp_path / "other.yaml"], ["other.yaml", "'student_d_modell'", "'student_d_model'"]),
    ]
    capsys.readouterr()
    for flags, expected in cases:
        assert tool(*flags, "--output_dir", tmp_path / "out") == 2, expected
        error = one_line(capsys)
        assert all(part in error for part in expected), error
        assert not (tmp_path / "out").exists()


def test_targets_longer_than_the_model_takes(
    tool: Callable[..., int], teacher: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"document": text, "summary": "ta"} for text in texts[:60]]
    rows[7]["summary"] = "ta " * 700
    data = write(tmp_path / "long.jsonl", rows)
    flags = ["--method", "kd", "--teacher", teacher, "--task", "summarization", "--train_file", data]
    flags += ["--eval_file", write(tmp_path / "short.jsonl", rows[:5]), "--output_dir", tmp_path / "out"]
    capsys.readouterr()
    assert tool(*flags) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "the target of pair 8 has" in lines[-1] and "at most 512" in lines[-1] and "--max_target_length" in lines[-1]
    assert not (tmp_path / "out").exists()
    assert tool(*flags, "--max_target_length", 16) == 0
    run = metrics_of(tmp_path / "out")["run"]
    assert (run["training_targets_cut"], run["held_out_targets_cut"], run["training_examples"]) == (1, 0, 60)
