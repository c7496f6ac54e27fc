"""EncT5 in fastkd-train: what it learns, starts from, is distilled into and scored by, and what it costs."""

from __future__ import annotations

import json
import re
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, T5Config

import fastkd.train.models  # noqa: F401 (registers EncT5)
from fastkd.train.data import corpus
from fastkd.train.judge import cost
from fastkd.train.minidisc.prune import sliced
from fastkd.train.models.architectures import enct5_config, enct5_from, parts
from fastkd.train.models.loading import load_model
from fastkd.train.models.student import new_model, t5_config

# The words of each class, of syllables that the tokenizer knows. No class comes in the order of the alphabet.
WORDS = {
    "mon": ["mon", "tamon", "remon", "silmon", "lymon"],
    "ing": ["ing", "taing", "reing", "siling", "lying"],
    "phi": ["phi", "taphi", "rephi", "silphi", "lyphi"],
}
CLASSES = sorted(WORDS)
ENCT5 = ["--architecture", "enct5"]
SAVING = ["--save_strategy", "steps", "--save_steps", "2"]


def rows_of(count: int, seed: int, classes: Sequence[str] = tuple(WORDS)) -> list[dict[str, str]]:
    """That many rows of each class: a few of its words."""
    rng = np.random.default_rng(seed)
    labels = list(classes) * count
    return [{"text": " ".join(rng.choice(WORDS[label], rng.integers(3, 9))), "label": label} for label in labels]


def write(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def student_of(folder: Path) -> dict[str, Any]:
    """What metrics.json says of the student."""
    return metrics_of(folder)["models"][-1]


def answers_of(folder: Path, rows: Sequence[dict[str, str]]) -> tuple[list[str], list[Tensor]]:
    """The classes that the model in a folder gives the rows, one at a time, and their logits [classes]."""
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    with torch.no_grad():
        logits = [model(**tokenizer(row["text"], return_tensors="pt")).logits[0] for row in rows]
    return [model.config.id2label[int(x.argmax())] for x in logits], logits


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("enct5")


# Of the held-out rows every ninth is wrong, so that no figure is simply 100.
HELD_OUT = [{**row, "label": CLASSES[i % 3]} if i % 9 == 0 else row for i, row in enumerate(rows_of(9, seed=1))]


@pytest.fixture(scope="module")
def data(place: Path) -> list[Any]:
    """The flags of texts that a small model tells apart."""
    train, held_out = write(place / "train.jsonl", rows_of(30, seed=0)), write(place / "eval.jsonl", HELD_OUT)
    return ["--task", "classification", "--train_file", train, "--eval_file", held_out]


@pytest.fixture(scope="module")
def t5(tokenizer: Any, saved: Callable[..., Path], place: Path) -> Path:
    """A T5 64 wide, of 2 layers a side, that nobody trained."""
    return saved(new_model(t5_config(512, 64, 2), seed=9), place / "t5")


@pytest.fixture(scope="module")
def teacher(tool: Callable[..., int], t5: Path, data: list[Any], place: Path) -> Path:
    """An EncT5 64 wide, of 2 encoder layers, that learnt the data."""
    flags = ["--method", "scratch", *ENCT5, "--student", t5, *data, "--max_steps", 20, "--learning_rate", "2e-3"]
    assert tool(*flags, "--per_device_train_batch_size", 16, "--output_dir", place / "teacher") == 0
    return place / "teacher"


# ---- What it learns --------------------------------------------------------------------------------------------------


def test_its_classes_need_not_be_what_a_tokenizer_can_write(
    tool: Callable[..., int], t5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "t.jsonl", [{"text": f"sil {i}", "label": "{" if i % 2 else "mon"} for i in range(8)])
    flags = ["--method", "scratch", "--student", t5, "--task", "classification", "--train_file", path]
    for architecture, warnings in ((ENCT5, 0), ([], 2)):
        out = tmp_path / f"{warnings}"
        assert tool(*flags, *architecture, "--eval_file", path, "--max_steps", 1, "--output_dir", out) == 0
        assert capsys.readouterr().err.count("not what the tokenizer makes") == warnings


def test_it_learns_from_nothing(tool: Callable[..., int], data: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--method", "scratch", *ENCT5, *data, "--max_steps", 40, "--per_device_train_batch_size", 16]
    assert tool(*flags, "--report_examples", 99, "--output_dir", out) == 0
    student = student_of(out)
    answers, logits = answers_of(out, HELD_OUT)
    assert student["outputs"] == answers and set(answers) == set(CLASSES)
    assert [example["target"] for example in metrics_of(out)["examples"]] == [row["label"] for row in HELD_OUT]

    right = [answer == row["label"] for answer, row in zip(answers, HELD_OUT, strict=True)]
    assert 0.8 < sum(right) / len(right) < 1
    assert student["metrics"].keys() == {"accuracy", "f1"}
    assert student["metrics"]["accuracy"] == pytest.approx(100 * sum(right) / len(right))
    assert student["token_accuracy"] == pytest.approx(sum(right) / len(right))
    nats = [-x.log_softmax(-1)[CLASSES.index(row["label"])] for x, row in zip(logits, HELD_OUT, strict=True)]
    assert student["loss"] == pytest.approx(torch.stack(nats).mean().item(), rel=1e-4)
    losses = [entry["loss"] for entry in student["history"] if "loss" in entry]
    assert losses[-1] < 0.1 < losses[0]

    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert (model.config.d_model, model.config.num_layers, model.config.num_decoder_layers) == (32, 1, 1)
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert student["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert student["cost"]["gflops"] == pytest.approx(cost.multiply_accumulates(model, 128, 1) / 1e9)


def test_reports_and_cards_speak_of_classes(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = metrics_of(teacher)["examples"]
    for name in ("report.md", "report.html"):
        page = (teacher / name).read_text(encoding="utf-8")
        assert all(part in page for example in shown for part in (example["source"], example["target"]))
    card = (teacher / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)[0]
    capsys.readouterr()
    exec(code.replace('"path/to/this/folder"', repr(str(teacher))).replace("your text", "tamon lymon"), {})
    assert capsys.readouterr().out == "mon\n"


def test_a_class_that_training_never_saw_is_wrong_and_no_error(
    tool: Callable[..., int], teacher: Path, data: list[Any], tmp_path: Path
) -> None:
    """The loss, and the accuracy beside it, are those of the other rows: no head stands for the class."""
    rows, others = rows_of(3, seed=2), [{"text": "ka lo", "label": "other"}] * 3
    held_out, out = write(tmp_path / "eval.jsonl", [*others, *rows]), tmp_path / "run"
    flags = ["--method", "scratch", "--student", teacher, *data, "--eval_file", held_out, "--learning_rate", 1e-30]
    assert tool(*flags, "--max_steps", 1, "--report_examples", 99, "--output_dir", out) == 0
    student = student_of(out)
    answers, logits = answers_of(teacher, [*others, *rows])
    assert student["outputs"] == answers and "other" not in answers
    right = sum(answer == row["label"] for answer, row in zip(answers[3:], rows, strict=True))
    assert right and student["metrics"]["accuracy"] == pytest.approx(100 * right / 12)
    assert student["token_accuracy"] == pytest.approx(right / 9)
    nats = [-x.log_softmax(-1)[CLASSES.index(row["label"])] for x, row in zip(logits[3:], rows, strict=True)]
    assert student["loss"] == pytest.approx(torch.stack(nats).mean().item(), rel=1e-4)


def test_figures_while_training(tool: Callable[..., int], data: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--method", "scratch", *ENCT5, *data, "--max_steps", 12, "--eval_steps", 4, "--predict_with_generate"]
    best = ["--save_strategy", "steps", "--save_steps", 4, "--load_best_model_at_end"]
    best += ["--metric_for_best_model", "eval_accuracy"]
    assert tool(*flags, *best, "--output_dir", out) == 0
    student = student_of(out)
    accuracies = {entry["step"]: entry["eval_accuracy"] for entry in student["history"] if "eval_accuracy" in entry}
    hits = {entry["step"]: entry for entry in student["history"] if "eval_token_accuracy" in entry}
    assert accuracies.keys() == {4, 8, 12} and accuracies.keys() <= hits.keys()
    for step, accuracy in accuracies.items():
        assert accuracy == pytest.approx(100 * hits[step]["eval_token_accuracy"])
    assert student["metrics"]["accuracy"] == max(accuracies.values())
    answers, _ = answers_of(out, HELD_OUT)
    right = sum(answer == row["label"] for answer, row in zip(answers, HELD_OUT, strict=True))
    assert student["metrics"]["accuracy"] == pytest.approx(100 * right / len(HELD_OUT))


def test_a_run_resumes_where_it_was(tool: Callable[..., int], teacher: Path, data: list[Any], tmp_path: Path) -> None:
    constant = ["--lr_scheduler_type", "constant", "--warmup_steps", 0]  # so that a run may become longer
    flags = ["--method", "kd", "--teacher", teacher, *data, *SAVING, *constant]
    whole, resumed = tmp_path / "whole", tmp_path / "parts"
    assert tool(*flags, "--output_dir", whole) == 0
    assert tool(*flags, "--output_dir", resumed, "--max_steps", 2) == 0
    before = (resumed / "model.safetensors").read_bytes()
    assert tool(*flags, "--output_dir", resumed, "--resume_from_checkpoint", "last") == 0
    after = (resumed / "model.safetensors").read_bytes()
    assert before != after == (whole / "model.safetensors").read_bytes()


# ---- What it starts from ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_teacher", [False, True])
def test_it_starts_from_a_t5(
    has_teacher: bool, tool: Callable[..., int], t5: Path, teacher: Path, data: list[Any], tmp_path: Path
) -> None:
    out, still = tmp_path / "run", ["--max_steps", 1, "--learning_rate", 1e-30]
    how = ["--method", "kd", "--teacher", teacher] if has_teacher else ["--method", "scratch", *ENCT5]
    assert tool(*how, "--student", t5, *data, *still, "--output_dir", out) == 0
    (source, _), (model, tokenizer) = load_model(t5, "student"), load_model(out, "student")
    weights, copied = source.state_dict(), 0
    for name, value in model.state_dict().items():
        if name in weights and name != "decoder.embed_tokens.weight":
            assert torch.equal(value, weights[name]), name
            copied += name.startswith("encoder.block.")
    assert copied == 2 * 8 + 1 and len(model.decoder.block) == 1
    assert torch.equal(model.encoder.embed_tokens.weight, source.shared.weight)
    assert torch.equal(model.decoder.embed_tokens.weight, source.shared.weight[:1])
    assert tokenizer.get_vocab() == load_model(t5, "student")[1].get_vocab()
    assert metrics_of(out)["run"]["student"] == str(t5)


def test_a_run_leaves_the_models_it_was_given_as_they_were(
    tool: Callable[..., int], t5: Path, data: list[Any], tmp_path: Path
) -> None:
    """Both students of a demo start from the same T5, and learn otherwise."""
    before = (t5 / "model.safetensors").read_bytes()
    flags = ["--demo", "--method", "mlmkd", *ENCT5, "--student", t5, *data, "--max_steps", 3, "--seed", 5]
    assert tool(*flags, "--output_dir", tmp_path / "demo") == 0
    assert (t5 / "model.safetensors").read_bytes() == before
    made = [load_model(tmp_path / "demo" / name, "student")[0] for name in ("scratch", "student")]
    assert not torch.equal(*(model.encoder.embed_tokens.weight for model in made))
    assert all(model.config.d_model == 64 for model in made)


def test_a_demo_of_classes(tool: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["difflib", "doctest", "statistics", "threading"]
    library = [Path(sysconfig.get_path("stdlib")) / f"{name}.py" for name in names]
    monkeypatch.setattr(corpus, "source_files", lambda root=None: library)
    out = tmp_path / "demo"
    flags = ["--demo", "--task", "classification", *ENCT5, "--report_examples", 3, "--max_eval_examples", 5]
    assert tool(*flags, "--output_dir", out) == 0
    models = metrics_of(out)["models"]
    assert [model["name"] for model in models] == ["teacher", "scratch", "mlmkd"]
    kinds = [
        AutoModelForSequenceClassification.from_pretrained(out / name) for name in ("teacher", "scratch", "student")
    ]
    classes = [set(kind.config.id2label.values()) for kind in kinds]
    assert classes[0] == classes[1] == classes[2] and len(classes[0]) > 1
    assert all(len(model["outputs"]) == 3 and set(model["outputs"]) <= classes[0] for model in models)


# ---- What it is distilled into ---------------------------------------------------------------------------------------


def by_hand(method: str, student: Any, teacher: Any, batch: dict[str, Tensor]) -> float:
    """The loss of a method with nothing but vocabulary terms, of the models' own logits."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        s, t = (model.eval()(**inputs).logits.double() for model in (student, teacher))
    temperature = 2.0 if method == "kd" else 1.0
    kl = F.kl_div(
        (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    ce = F.cross_entropy(s, batch["labels"].flatten()) if method == "kd" else 0.0
    return float(ce + temperature**2 * kl)


@pytest.mark.parametrize("method", ["kd", "mlmkd"])
def test_the_loss_is_that_of_the_models_own_logits(
    method: str, tool: Callable[..., int], teacher: Path, data: list[Any], tmp_path: Path, trainers: list[Any]
) -> None:
    flags = ["--method", method, "--teacher", teacher, *data, "--output_dir", tmp_path / "run"]
    assert tool(*flags) == 0
    trainer = trainers[-1]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(6)])
    assert batch["labels"].shape == (6, 1) and (batch["attention_mask"] == 0).any()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.eval(), batch).item()
    assert loss == pytest.approx(by_hand(method, trainer.model, load_model(teacher, "teacher")[0], batch), rel=1e-5)


TERMS = {
    "kd": {"loss_ce+logit_kl"},
    "mlmkd": {"loss_logit_kl"},
    "hsm-cka": {"loss_ce+logit_kl", "loss_hidden_cka"},
    "miniend-e": {"loss_logit_kl", "loss_decoder_self", "loss_encoder_self"},
}


@pytest.mark.parametrize("method", TERMS)
def test_a_smaller_student_of_an_enct5(
    method: str, tool: Callable[..., int], teacher: Path, data: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert tool("--method", method, "--teacher", teacher, *data, "--logging_steps", 1, "--output_dir", out) == 0
    teachers, students = metrics_of(out)["models"]
    assert students["parameters"] < teachers["parameters"] and students["cost"]["gflops"] < teachers["cost"]["gflops"]
    assert teachers["loss"] == pytest.approx(student_of(teacher)["loss"], rel=1e-5)
    logged = [entry for entry in students["history"] if "loss" in entry]
    assert len(logged) == 4
    for entry in logged:
        terms = {name: value for name, value in entry.items() if name.startswith("loss_")}
        assert terms.keys() == TERMS[method] and sum(terms.values()) == pytest.approx(entry["loss"], rel=1e-5)
        # A decoder that reads one token relates it to itself alone.
        assert all(value == 0 if name == "loss_decoder_self" else value > 0 for name, value in terms.items()), terms
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert (model.config.d_model, model.config.num_layers, len(model.decoder.block)) == (32, 1, 1)
    assert model.config.id2label == dict(enumerate(CLASSES))
    if method == "hsm-cka":
        assert metrics_of(out)["run"]["matched_states"] == "encoder 0 to 0, 1 to 2"


def test_a_slice_of_an_enct5(tool: Callable[..., int], teacher: Path, data: list[Any], tmp_path: Path) -> None:
    flags = ["--method", "hsm-cka", "--teacher", teacher, *data, "--max_steps", 1, "--learning_rate", 1e-30]
    assert tool(*flags, "--output_dir", tmp_path / "run") == 0
    (whole, _), (part, _) = load_model(teacher, "teacher"), load_model(tmp_path / "run", "student")
    attention = "encoder.block.0.layer.0.SelfAttention.q"
    for name in ("classifier", "decoder.embed_tokens", "encoder.embed_tokens", attention):
        mine, its = (model.get_submodule(name).weight for model in (part, whole))
        assert torch.equal(mine, its[: len(mine), :32]), name
    assert part.classifier.weight.shape == (3, 32)


def test_an_assistant_in_between(tool: Callable[..., int], teacher: Path, data: list[Any], tmp_path: Path) -> None:
    flags = ["--interpolated", "--method", "hsm-cka", "--teacher", teacher, *data, "--max_steps", 2]
    assert tool(*flags, "--output_dir", tmp_path) == 0
    models = [AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in ("assistant", "student")]
    assert [(model.config.d_model, model.config.num_layers) for model in models] == [(64, 2), (32, 1)]
    assert metrics_of(tmp_path / "student")["models"][0]["loss"] == student_of(tmp_path / "assistant")["loss"]


# ---- Which class is which --------------------------------------------------------------------------------------------


@pytest.fixture
def glue(place: Path) -> Path:
    """A folder of GLUE's layout with SST-2, of sentences that are easy to tell apart."""
    folder = place / "glue" / "SST-2"
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, seed in (("train", 40, 3), ("dev", 8, 4)):
        lines = [f"{row['text']}\t{int(row['label'] == 'mon')}" for row in rows_of(count, seed, ["mon", "ing"])]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n", encoding="utf-8")
    return folder.parent


def test_the_classes_of_a_teacher_in_another_order(
    tool: Callable[..., int],
    glue: Path,
    tokenizer: Any,
    saved: Callable[..., Path],
    tmp_path: Path,
    trainers: list[Any],
) -> None:
    """The data's are "negative" and "positive", in this order; the teacher's the other way round, and one more."""
    order = ["positive", "other", "negative"]
    start = saved(new_model(enct5_config(t5_config(512, 64, 1), order), seed=3), tmp_path / "start")
    task = ["--task", "sst2", "--train_file", glue, "--per_device_train_batch_size", 16, "--report_examples", 99]
    learnt = ["--method", "scratch", "--student", start, "--max_steps", 40, "--learning_rate", "2e-3"]
    assert tool(*learnt, *task, "--output_dir", tmp_path / "teacher") == 0
    assert student_of(tmp_path / "teacher")["metrics"] == {"accuracy": pytest.approx(100, abs=10)}

    out = tmp_path / "run"
    flags = ["--method", "mlmkd", "--teacher", tmp_path / "teacher", *task, "--max_steps", 40]
    assert tool(*flags, "--output_dir", out) == 0
    model, student, examples = load_model(out, "student")[0], student_of(out), metrics_of(out)["examples"]
    assert model.config.id2label == dict(enumerate(order))
    rows, train = trainers[-1].train_dataset.rows, trainers[-1].train_dataset
    assert [order[int(train[i]["labels"])] for i in range(len(train))] == rows["target"][:]
    answers, _ = answers_of(out, [{"text": example["source"]} for example in examples])
    right = sum(answer == example["target"] for answer, example in zip(answers, examples, strict=True))
    assert student["outputs"] == answers and {"positive", "negative"} == set(answers)
    assert student["metrics"]["accuracy"] == pytest.approx(100 * right / len(examples)) and right > 0.8 * len(examples)
    assert student["token_accuracy"] == pytest.approx(right / len(examples))


# ---- One line before anything is written -----------------------------------------------------------------------------


@pytest.fixture
def refused(tool: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refused("--flag", value, ...): the one line of a run that does not begin."""

    def error(*flags: Any) -> str:
        capsys.readouterr()
        assert tool(*flags, "--output_dir", tmp_path / "out") == 2
        lines = [
            line for line in capsys.readouterr().err.splitlines() if line and "/s]" not in line
        ]  # but progress bars
        assert len(lines) == 1 and lines[0].startswith("fastkd-train: ") and not (tmp_path / "out").exists(), lines
        return lines[0]

    return error


def test_what_an_enct5_cannot_do(
    refused: Callable[..., str], teacher: Path, t5: Path, data: list[Any], text_file: Path, place: Path
) -> None:
    many = write(place / "many.jsonl", [{"text": f"ta {i}", "label": str(i)} for i in range(1001)])
    few = write(place / "few.jsonl", [{"text": "ta 1", "label": "1"}])
    new = ["--method", "scratch", *ENCT5]
    cases: list[tuple[list[Any], list[str]]] = [
        ([*new, "--train_file", text_file], ["--architecture enct5", "pairs", "span_corruption"]),
        (["--method", "mixkd", *ENCT5, *data], ["EncT5 has no mixed examples", "mixup_kd"]),
        (["--method", "mixkd-sm", *ENCT5, *data], ["EncT5 has no mixed examples", "mixup_ce"]),
        (["--method", "mixkd", "--teacher", teacher, *data], ["EncT5 has no mixed examples", "mixup_kd"]),
        (
            ["--method", "kd", "--teacher", t5, *ENCT5, *data],
            ["--architecture enct5", f"teacher {t5}", f"--method scratch --architecture enct5 --student {t5}"],
        ),
        (["--method", "kd", "--teacher", t5, "--student", teacher, *data], ["--architecture t5", f"student {teacher}"]),
        (
            ["--method", "kd", "--teacher", teacher, "--student", t5, "--architecture", "t5", *data],
            ["--architecture t5", f"teacher {teacher}", "enct5"],
        ),
        (
            ["--method", "kd", *ENCT5, "--task", "classification", "--train_file", many, "--eval_file", few],
            ["at most 1000", "1001"],
        ),
        (["--method", "scratch", "--architecture", "enct", *data], ["--architecture", "'enct'", "'enct5'"]),
    ]
    for flags, expected in cases:
        error = refused(*flags)
        assert all(part in error for part in expected), error


def test_a_teacher_of_other_classes(refused: Callable[..., str], teacher: Path, data: list[Any], place: Path) -> None:
    other = write(place / "other.jsonl", [*rows_of(3, 0), {"text": "ka", "label": "other"}])
    for role in ("--teacher", "--student"):
        method = "kd" if role == "--teacher" else "scratch"
        error = refused("--method", method, role, teacher, *data, "--train_file", other)
        assert "ing, mon, phi" in error and "ing, mon, other, phi" in error and "classification" in error, error


def test_a_stream_has_no_classes(refused: Callable[..., str], teacher: Path, data: list[Any]) -> None:
    error = refused("--method", "scratch", "--student", teacher, *data, "--streaming")
    assert "--streaming" in error and "enct5" in error, error


def test_a_teacher_and_a_student_whose_classes_differ(
    refused: Callable[..., str], saved: Callable[..., Path], teacher: Path, data: list[Any], tmp_path: Path
) -> None:
    """Even in their order alone: a student would be taught that what it calls "ing" is "phi"."""
    for order in (CLASSES[::-1], [*CLASSES, "other"]):
        student = saved(new_model(enct5_config(t5_config(512, 32, 1), order), seed=3), tmp_path / str(len(order)))
        error = refused("--method", "kd", "--teacher", teacher, "--student", student, *data)
        assert ", ".join(order) in error and ", ".join(CLASSES) in error, error


def test_held_out_data_of_unknown_classes_alone(refused: Callable[..., str], data: list[Any], place: Path) -> None:
    """There is nothing to compute a loss of."""
    unknown = write(place / "unknown.jsonl", [{"text": "ka lo", "label": "other"}] * 3)
    error = refused("--method", "scratch", *ENCT5, *data, "--eval_file", unknown)
    assert "other" in error and "ing, mon, phi" in error, error


# ---- What it costs ---------------------------------------------------------------------------------------------------


def counted(model: Any, encoder_tokens: int, decoder_tokens: int, head: bool) -> int:
    """The multiply-accumulates that a forward pass of one example does in linear layers, counted on the way."""
    total, hooks = 0, []

    def count(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        total += inputs[0].shape[:-1].numel() * layer.weight.numel()

    for module in model.modules():
        if isinstance(module, nn.Linear) and (head or module is not model.get_output_embeddings()):
            hooks.append(module.register_forward_hook(count))
    ids = torch.ones(1, encoder_tokens, dtype=torch.long)
    with torch.no_grad():
        model.eval()(input_ids=ids, decoder_input_ids=ids.new_ones(1, decoder_tokens), use_cache=False)
    for hook in hooks:
        hook.remove()
    return total


def pruned(model: Any) -> Any:
    """Half of every part of a model, none of one attention, and none of one feed-forward layer's neurons."""
    widths = {name: part.units // 2 for name, part in parts(model).items()}
    gone = "encoder.block.0.layer.0.SelfAttention", "decoder.block.0.layer.2.DenseReluDense"
    return sliced(model, widths | dict.fromkeys(gone, 0))


@pytest.mark.parametrize("is_pruned", [False, True])
@pytest.mark.parametrize("projection", ["relu", "gated-gelu"])
def test_multiply_accumulates_are_those_of_a_forward_pass(projection: str, is_pruned: bool) -> None:
    start: dict[str, Any] = {"decoder_start_token_id": 0}
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=12, num_heads=4, d_ff=80, num_layers=3, num_decoder_layers=2,
        feed_forward_proj=projection, **start,
    )  # fmt: skip
    source = new_model(config, 0)
    for model, decoder_tokens in ((source, 5), (source, 11), (enct5_from(source, CLASSES), 1)):
        model = pruned(model) if is_pruned else model
        for head in (False, True):
            expected = counted(model, 7, decoder_tokens, head)
            assert cost.multiply_accumulates(model, 7, decoder_tokens, head=head) == expected > 0
        rows = decoder_tokens * model.get_output_embeddings().weight.numel()
        assert expected == counted(model, 7, decoder_tokens, False) + rows
