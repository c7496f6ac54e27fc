"""fastkd-train from the outside: what it writes, what it reuses, and one clear line for every bad input."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from train_flags import RECIPE, with_inputs
from transformers import AutoTokenizer, T5ForConditionalGeneration

import fastkd
from fastkd.train import cli
from fastkd.train.common.errors import InputError
from fastkd.train.common.family import FAMILIES
from fastkd.train.data import tasks
from fastkd.train.flags import arguments, config
from fastkd.train.flags import fields as own
from fastkd.train.flags.arguments import parse
from fastkd.train.models.student import t5_config
from fastkd.train.objectives.methods import METHODS
from fastkd.train.stages.planning import planned_config

SMALL = [
    "--use_cpu", "--student_layers", "1", "--student_d_model", "32", "--teacher_layers", "1", "--teacher_d_model", "32",
    "--sequence_length", "16", "--vocabulary_size", "512", "--teacher_steps", "4", "--max_steps", "4",
    "--per_device_train_batch_size", "4", "--save_steps", "2", "--eval_steps", "0.2",
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("no_pictures")


def run(*flags: object) -> int:
    return cli.main(with_inputs(*SMALL, *flags))


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()
    }


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to stderr, which must be one line of ours."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastkd-train: "), lines
    return lines[0]


@pytest.mark.long
def test_demo_twice(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # with pictures
    out = tmp_path / "runs" / "demo"
    assert run("--demo", "--train_file", text_file, "--output_dir", out) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert [m["name"] for m in metrics["models"]] == ["teacher", "scratch", metrics["run"]["method"]]
    for model in metrics["models"]:
        assert f"| {100 * model['token_accuracy']:.1f} %" in printed
        assert f"{model['loss']:.4f}" in (out / "report.md").read_text()
        assert model["steps"] == 4 and model["seconds_per_step"] > 0
    for picture in ("loss_curves.png", "term_curves.png"):
        assert (out / picture).read_bytes()[:4] == b"\x89PNG" and picture in (out / "report.md").read_text()
    for name in ("teacher", "student", "scratch"):
        model = T5ForConditionalGeneration.from_pretrained(out / name)
        tokenizer = AutoTokenizer.from_pretrained(out / name)
        assert (out / name / "generation_config.json").is_file()
        assert model.lm_head.weight is model.shared.weight and len(tokenizer) <= model.config.vocab_size
        model.generate(**tokenizer("ta re <extra_id_0> mon", return_tensors="pt"), max_new_tokens=3)

    cache, first = snapshot(tmp_path / "runs" / "cache"), (out / "student" / "model.safetensors").read_bytes()
    kinds = {p.name.split("-")[0] for p in (tmp_path / "runs" / "cache").iterdir()}
    assert kinds == {"outcome", "rows", "teacher", "tokenised", "tokenizer"}
    assert run("--demo", "--train_file", text_file, "--output_dir", out) == 0
    assert "reusing" in capsys.readouterr().out
    assert snapshot(tmp_path / "runs" / "cache") == cache
    assert (out / "student" / "model.safetensors").read_bytes() == first  # and the whole demo is deterministic

    assert run("--demo", "--train_file", text_file, "--output_dir", out, "--teacher_steps", "5") == 0
    assert "reusing" not in capsys.readouterr().out  # another teacher was asked for
    assert json.loads((out / "metrics.json").read_text())["models"][0]["steps"] == 5


def test_train_refuse_resume_overwrite(tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    flags = ["--method", "scratch", "--train_file", text_file, "--output_dir", out]
    assert run(*flags) == 0
    assert T5ForConditionalGeneration.from_pretrained(out).config.d_model == 32
    assert (out / "checkpoint-4").is_dir() and (out / "report.md").is_file()
    capsys.readouterr()
    before = snapshot(tmp_path)

    assert run(*flags) == 2
    message = one_line(capsys)
    assert str(out) in message and "--resume_from_checkpoint" in message and "--overwrite_output_dir" in message
    assert run(*flags, "--resume_from_checkpoint", "last", "--student_d_model", "64") == 2
    assert "student_d_model 32" in capsys.readouterr().err
    assert run("--demo", "--output_dir", out) == 2
    assert "already holds" in one_line(capsys)
    assert snapshot(tmp_path) == before

    for changed in (["--per_device_train_batch_size", "2"], ["--optim", "adafactor"], ["--data_seed", "7"]):
        assert run(*flags, "--resume_from_checkpoint", "last", *changed) == 2
        assert f"started with {changed[0][2:]} " in one_line(capsys)
    other = ["--method", "scratch", "--train_file", text_file, "--output_dir", tmp_path / "other"]
    assert run(*other, "--max_steps", "2") == 0
    capsys.readouterr()
    assert run(*other, "--resume_from_checkpoint", out / "checkpoint-4") == 2
    assert "checkpoint of another run" in one_line(capsys)

    assert run(*flags, "--resume_from_checkpoint", "last", "--max_steps", "6") == 0
    assert (out / "checkpoint-6").is_dir()
    assert "resume_from_checkpoint" not in (out / "config.yaml").read_text()  # it would not repeat the run
    assert run(*flags, "--overwrite_output_dir") == 0
    assert not (out / "checkpoint-6").exists() and (out / "checkpoint-4").is_dir()


@pytest.mark.parametrize("mode", [["--demo"], ["--method", "scratch", "--overwrite_output_dir"]])
def test_files_of_others_stay(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str], mode: list[str]
) -> None:
    """Neither a demo nor --overwrite_output_dir touches a folder that fastkd-train did not make."""
    (tmp_path / "mine" / "student").mkdir(parents=True)
    (tmp_path / "mine" / "student" / "thesis.txt").write_text("years of work")
    before = snapshot(tmp_path)
    assert run(*mode, "--train_file", text_file, "--output_dir", tmp_path / "mine") == 2
    assert "files that no" in one_line(capsys)
    assert run(*mode, "--train_file", text_file, "--output_dir", text_file) == 2
    assert "is a file" in one_line(capsys)
    assert snapshot(tmp_path) == before


def test_a_given_teacher_and_an_evaluation_file(tmp_path: Path, text_file: Path, texts: list[str]) -> None:
    run("--method", "scratch", "--train_file", text_file, "--output_dir", tmp_path / "teacher")
    (tmp_path / "eval.txt").write_text("\n\n".join(texts[:30]))
    flags = ["--teacher", tmp_path / "teacher", "--train_file", text_file, "--eval_file", tmp_path / "eval.txt"]
    assert run(*flags, "--method", "mlmkd", "--student_d_model", "64", "--output_dir", tmp_path / "student") == 0
    assert T5ForConditionalGeneration.from_pretrained(tmp_path / "student").config.d_model == 64
    assert not any(p.name.startswith("teacher") for p in (tmp_path / "cache").glob("*"))


def test_both_arms_of_a_demo_start_from_the_given_student(tmp_path: Path, text_file: Path) -> None:
    def history(out: Path, *flags: object) -> list[dict[str, float]]:
        common = [
            "--train_file",
            text_file,
            "--teacher",
            tmp_path / "t",
            "--student",
            tmp_path / "t",
            "--output_dir",
            out,
        ]
        common += RECIPE  # in place of the demo's own
        assert run(*common, "--learning_rate", "1e-2", "--logging_steps", "1", "--save_strategy", "no", *flags) == 0
        models = json.loads((out / "metrics.json").read_text())["models"]
        return [entry["loss"] for entry in models[-1]["history"] if "loss" in entry]

    run("--method", "scratch", "--train_file", text_file, "--output_dir", tmp_path / "t")
    assert history(tmp_path / "demo", "--demo", "--method", "kd") == history(tmp_path / "kd", "--method", "kd")
    card = (tmp_path / "demo" / "scratch" / "README.md").read_text()
    assert "without a teacher" in card and str(tmp_path) not in card


def test_a_trained_teacher_is_its_own_flags_alone(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--method", "kd", "--train_file", text_file, "--cache_dir", tmp_path / "cache"]
    assert run(*flags, "--output_dir", tmp_path / "a") == 0 and "reusing" not in capsys.readouterr().out
    assert run(*flags, "--output_dir", tmp_path / "b", "--learning_rate", "1e-2", "--generation_num_beams", "2") == 0
    assert "reusing" in capsys.readouterr().out
    assert run(*flags, "--output_dir", tmp_path / "c", "--weight_decay", "0.5") == 0
    assert "reusing" not in capsys.readouterr().out


def test_attention_distillation(tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def flags(method: str) -> list[object]:
        return [
            "--method",
            method,
            "--train_file",
            text_file,
            "--output_dir",
            tmp_path / method,
            "--logging_steps",
            "1",
        ]

    assert run(*flags("miniend-e"), "--divergence", "jsd", "--weights", "decoder_self=0.5") == 0
    assert run(*flags("miniend-d-nologit")) == 0
    note = "no vocabulary term"
    assert note in capsys.readouterr().out
    for method, terms, loss in (
        ("miniend-e", ("logit_kl", "decoder_self", "encoder_self"), "1 logit_kl + 0.5 decoder_self + 1 encoder_self"),
        ("miniend-d-nologit", ("decoder_self", "decoder_cross"), "1 decoder_self + 1 decoder_cross"),
    ):
        out = tmp_path / method
        assert T5ForConditionalGeneration.from_pretrained(out).config.d_model == 32
        metrics, report = json.loads((out / "metrics.json").read_text()), (out / "report.md").read_text()
        assert metrics["run"]["loss"] == loss and f"- loss: {loss}" in report
        assert (note in report) == ("nologit" in method) and (out / "term_curves.png").is_file()
        curves = [entry for entry in metrics["models"][-1]["history"] if "loss" in entry]
        assert [entry["step"] for entry in curves] == [1, 2, 3, 4]
        for entry in curves:
            assert sum(entry[f"loss_{term}"] for term in terms) == pytest.approx(entry["loss"], rel=1e-4)
            assert entry["grad_norm_encoder"] > 0 and entry["grad_norm_decoder"] > 0

    resume = ["--resume_from_checkpoint", "last", "--max_steps", "6"]
    assert run(*flags("miniend-d-nologit"), *resume, "--divergence", "tvd") == 2
    assert "divergence None" in capsys.readouterr().err
    assert run(*flags("miniend-d-nologit"), *resume) == 0
    history = json.loads((tmp_path / "miniend-d-nologit" / "metrics.json").read_text())["models"][-1]["history"]
    assert [entry["step"] for entry in history if "loss_decoder_cross" in entry] == [1, 2, 3, 4, 5, 6]


def test_half_made_artefacts_do_not_count(tmp_path: Path) -> None:
    from fastkd.train.common.cache import cached, replace_folder

    def fail(folder: Path) -> None:
        (folder / "part").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, "teacher", {"a": 1}, fail)
    assert not list(tmp_path.iterdir())

    def make(folder: Path) -> dict[str, int]:
        (folder / "x").touch()
        return {"second": 2, "first": 1}

    folder, facts = cached(tmp_path, "teacher", {"a": 1}, make)
    assert (folder / "x").exists() and list(facts.items()) == [("second", 2), ("first", 1)]
    assert cached(tmp_path, "teacher", {"a": 1}, fail) == (folder, facts)
    assert cached(tmp_path, "teacher", {"a": 2}, lambda f: None)[0] != folder
    with pytest.raises(KeyboardInterrupt):
        replace_folder(folder, fail)
    assert (folder / "x").exists() and not (folder / "part").exists()


def test_bad_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    cases: list[tuple[list[object], list[str]]] = [
        (["--method", "mlmdk"], ["mlmdk", "did you mean 'mlmkd'"]),
        (["--method", "qqq"], ["qqq", "scratch, mlmkd, kd"]),
        (["--learning_rat", "1"], ["--learning_rat", "did you mean '--learning_rate'"]),
        (["--student_layer=3"], ["did you mean '--student_layers'"]),
        (["surplus"], ["surplus"]),
        (["--max_steps", "many"], ["max_steps", "many"]),
        (["--max_steps", "0"], ["--max_steps"]),
        (["--max_steps", "7", "--num_train_epochs", "1"], ["not both"]),
        (["--lr_scheduler_type", "cosin"], ["cosin"]),
        (["--temperature", "0"], ["--temperature"]),
        (["--student_layers", "0"], ["--student_layers"]),
        (["--demo", "--method", "scratch"], ["--demo"]),
        (["--method", "miniend-f"], ["miniend-f", "did you mean 'miniend-"]),
        (["--divergence", "foward_kl"], ["foward_kl", "did you mean 'forward_kl'", "tvd"]),
        (["--divergence", "foward_kl=1,jsd=1"], ["foward_kl", "did you mean 'forward_kl'", "tvd"]),
        (["--divergence", "jsd=1,tvd=-1"], ["--divergence", "expected tvd=NUMBER"]),
        (["--divergence", "jsd=0"], ["--divergence", "one of them above 0"]),
        (["--divergence_beta", "1"], ["--divergence_beta"]),
        (["--weights", "logit=1"], ["'logit'", "did you mean 'logit_kl'"]),
        (["--weights", "logit_kl=-1"], ["--weights", "logit_kl=-1"]),
        (["--weights", "logit_kl=inf"], ["--weights", "finite and 0 or above, got 'logit_kl=inf'"]),
        (["--weights", "logit_kl"], ["--weights", "logit_kl=NUMBER"]),
        (["--weights", "logit_kl=0"], ["--weights", "every term of mlmkd"]),
        (["--method", "minilm", "--relation_heads", "48"], ["--relation_heads", "(1, 2, 4, 8, 16, 32, 64)", "got 48"]),
        (["--method", "minilm", "--teacher_layer", "3"], ["--teacher_layer", "1 to 2", "got 3"]),
        (["--student_init", "top"], ["--student_init", "slice, random", "'top'"]),
        (["--method", "scratch", "--student_init", "slice"], ["--student_init", "no teacher", "random"]),
        (["--method", "hsm-cka", "--student_d_model", "256"], ["--student_d_model", "at most 128", "256"]),
        (["--method", "kd", "--student_init", "slice", "--student_layers", "3"], ["--student_layers", "at most 2"]),
        (["--projection_learning_rate", "0"], ["--projection_learning_rate"]),
        (["--train_file", tmp_path / "missing.txt"], [str(tmp_path / "missing.txt"), "no such file"]),
        (["--eval_file", tmp_path], [str(tmp_path), "no data files"]),
        (["--teacher", tmp_path / "missing"], [str(tmp_path / "missing")]),
        (["--method", "interpolated"], ["--interpolated and a --method"]),
        (["--interpolated"], ["--interpolated", "--teacher"]),
        (["--method", "scratch", "--interpolated", "--teacher", "x"], ["scratch has no teacher"]),
        (["--task", "glu"], ["--task", "'glu'", "did you mean 'glue'"]),
        (["--task", "sst2"], ["--task sst2", "--train_file or --dataset_name"]),
        (["--task", "translation"], ["--task translation", "--train_file or --dataset_name"]),
        (["--streaming", "--max_steps", "3"], ["--streaming", "--train_file"]),
        (["--streaming", "--train_file", "x"], ["--streaming", "--max_steps"]),
        (["--streaming", "--train_file", "x", "--max_steps", "3"], ["--streaming", "--teacher or --student"]),
        (["--train_file", "x", "--dataset_name", "y"], ["not both"]),
        (["--student", "x", "--interpolated", "--teacher", "y"], ["not both"]),
        (["--teacher_dtype", "float8"], ["--teacher_dtype", "float8", "bfloat16"]),
        (["--mixup_distance", "l1"], ["--mixup_distance", "l1", "mse, divergence"]),
        (["--mixup_alpha", "0"], ["--mixup_alpha"]),
        (["--config", "no_such"], ["--config", "no_such", "miniend-e"]),
        (["--config", tmp_path / "list.yaml"], ["list.yaml", "no mapping"]),
        (["--config", tmp_path / "broken.yaml"], ["broken.yaml", "line 1"]),
        (["--config", tmp_path / "twice.yaml"], ["twice.yaml", "seed is given twice"]),
        (["--config", tmp_path / "typo.yaml"], ["typo.yaml", "unknown key 'studen_layers'", "'student_layers'"]),
        (["--config", tmp_path / "word.yaml"], ["word.yaml: max_steps: invalid", "many"]),
        (["--compare", tmp_path], [str(tmp_path), "no metrics.json"]),
        (["--config", tmp_path / "nested.yaml"], ["nested.yaml", "unknown key 'config'"]),
        (["--learning_rate", "-1"], ["--learning_rate: must be above 0, got -1"]),
        (["--learning_rate", "0"], ["--learning_rate: must be above 0, got 0"]),
        (["--learning_rate", "inf"], ["--learning_rate: must be finite and above 0, got inf"]),
        (["--num_train_epochs", "0", "--train_file", "x"], ["--num_train_epochs must be above 0"]),
        (["--seed", "-1"], ["--seed: must be at least 0"]),
        (["--warmup_steps", "nan"], ["--warmup_steps: must be finite and at least 0, got nan"]),
        (["--weight_decay", "nan"], ["--weight_decay: must be finite and at least 0, got nan"]),
        (["--max_grad_norm", "-1"], ["--max_grad_norm: must be at least 0, got -1"]),
        (["--num_train_epochs", "inf"], ["--num_train_epochs: must be finite and at least 0, got inf"]),
        (["--per_device_train_batch_size", "0"], ["--per_device_train_batch_size: must be at least 1"]),
        (["--max_source_length", "1"], ["--max_source_length: must be at least 2"]),
        (["--optim", "lomo"], ["--optim", "lomo_optim"]),
        (["--lr_scheduler_type", "warmup_stable_decay"], ["--lr_scheduler_type"]),
        (["--label_smoothing_factor", "0.1"], ["--label_smoothing_factor is not supported"]),
        (["--eval_do_concat_batches", "false"], ["--eval_do_concat_batches is not supported"]),
        (["--include_for_metrics", "inputs"], ["--include_for_metrics is not supported"]),
        (["--bf16_full_eval", "--use_cpu"], ["--bf16_full_eval is not supported"]),
        (["--push_to_hub"], ["--push_to_hub is not supported", "hf upload"]),
        (["--hub_token", "secret"], ["--hub_token is not supported"]),
        (["--deepspeed", "zero3.json"], ["--deepspeed is not supported", "--fsdp"]),
        (["--parallelism_config", "x"], ["--parallelism_config"]),
        (["--ddp_find_unused_parameters", "true"], ["--ddp_find_unused_parameters is not supported"]),
        (["--enable_jit_checkpoint"], ["--enable_jit_checkpoint is not supported", "SIGTERM"]),
        (["--auto_find_batch_size"], ["--auto_find_batch_size is not supported", "fastkd.train.plan"]),
        (["--save_only_model"], ["--save_only_model is not supported"]),
        (["--use_cache"], ["--use_cache is not supported"]),
        (["--remove_unused_columns", "false"], ["--remove_unused_columns is not supported"]),
        (["--fp16", "--use_cpu"], ["--fp16 needs a GPU", "--bf16"]),
        (["--source_column", "a"], ["--source_column has no effect with --task span_corruption"]),
        (
            ["--task", "summarization", "--source_column", "a", "--text_column", "b"],
            ["--text_column has no effect with --task summarization beside --source_column"],
        ),
        (
            ["--task", "classification", "--source_column", "a", "--text_column", "b"],
            ["--source_column has no effect with --task classification beside --text_column"],
        ),
        (
            ["--task", "classification", "--target_column", "a", "--label_column", "b"],
            ["--target_column has no effect with --task classification beside --label_column"],
        ),
        (["--max_source_length", "32"], ["--max_source_length has no effect with --task span_corruption"]),
        (["--load_best_model_at_end", "--save_strategy", "no"], ["--load_best_model_at_end", "match"]),
        (["--load_best_model_at_end", "--eval_steps", "3", "--save_steps", "4"], ["4", "multiple", "3"]),
        (["--batch_size", "3"], ["unknown flag '--batch_size'; did you mean '--per_device_train_batch_size'"]),
        (["--lr", "3"], ["did you mean '--learning_rate'"]),
        (["--beta", "0.1"], ["did you mean '--divergence_beta'"]),
        (["--epochs=3"], ["did you mean '--num_train_epochs'"]),
        (["--max-length", "64"], ["did you mean '--max_source_length or --sequence_length'"]),
        (["--qwertz", "64"], ["unknown flag '--qwertz'\n"]),
        (["--config", tmp_path / "alias.yaml"], ["alias.yaml: unknown key 'lr'; did you mean 'learning_rate'"]),
        (
            ["--config", tmp_path / "fraction.yaml"],
            ["fraction.yaml: student_layers: expected a whole", "'2.5'"],
        ),
        (["--config", tmp_path / "several.yaml"], ["several.yaml: seed: expected one value, got [1, 2]"]),
        (
            ["--config", tmp_path / "truth.yaml", "--max_steps", "1"],
            ["truth.yaml: train_file: expected a word, got True"],
        ),
        (
            ["--divergence", "forward_kl=1,forward_kl=2"],
            ["--divergence", "expected each name once, got forward_kl twice"],
        ),
        (
            ["--config", tmp_path / "weights.yaml"],
            ["weights.yaml: weights: expected logit_kl=NUMBER, finite and 0 or above"],
        ),
        (["--gradient_checkpointing_kwargs", '{"use_reentrant": true}'], ["use_reentrant is not supported"]),
        (["--train_sampling_strategy", "group_by_length"], ["no effect with span_corruption"]),
        (["--task", "sst2", "--train_file", "x", "--train_split", "trian"], ["--train_split has no effect", "sst2"]),
        (["--cache_dir", out / "cache"], ["--cache_dir", "lies in --output_dir"]),
        (["--teacher", out / "teacher"], ["--teacher", "lies in --output_dir"]),
        (["--resume_from_checkpoint", "last"], ["no checkpoint", str(out)]),
        (["--resume_from_checkpoint", tmp_path], ["no checkpoint", str(tmp_path)]),
    ]
    (tmp_path / "config.yaml").write_text("method: kd")
    cases.append((["--config", tmp_path], ["expected a file", f"give {tmp_path / 'config.yaml'}"]))
    for name, content in (
        ("list", "- kd"),
        ("broken", "a: [b"),
        ("twice", "seed: 1\nmethod: kd\nseed: 2"),
        ("typo", "studen_layers: 3"),
        ("word", "max_steps: many"),
        ("nested", "config: kd"),
        ("alias", "lr: 1"),
        ("fraction", "student_layers: 2.5"),
        ("several", "seed: [1, 2]"),
        ("truth", "train_file: true"),
        ("weights", "weights: {logit_kl: -1}"),
    ):
        (tmp_path / f"{name}.yaml").write_text(content)
    sizes = ["--student_layers", 2, "--student_d_model", 64, "--teacher_layers", 2, "--teacher_d_model", 128]
    sizes += ["--teacher_steps", 4]
    for flags, expected in cases:
        assert cli.main(with_inputs(*sizes, "--output_dir", out, *flags)) == 2, flags
        captured = capsys.readouterr()
        assert len(captured.err.splitlines()) == 1 and captured.err.startswith("fastkd-train: "), captured.err
        assert all(part in captured.err for part in expected), captured.err
        assert not out.exists()


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No data and no teacher are ever made up."""
    sizes = ["--student_layers", "1", "--student_d_model", "32"]
    for flags, expected in (
        (["--teacher", "t"], "nothing to learn from: give --train_file FILE, --dataset_name NAME, --embedded_data"),
        (["--resume_from_checkpoint", "last"], f"to resume a run, give --config {tmp_path / 'out'}/config.yaml"),
        (["--train_file", "x"], "--method mlmkd needs a teacher: give --teacher FOLDER_OR_NAME, or --train_teacher"),
        (["--config", "hsm-cka", "--train_file", "x"], "--method hsm-cka needs a teacher"),
        (["--train_file", "x", "--train_teacher"], "--teacher_layers and --teacher_d_model and --teacher_steps"),
        (["--train_file", "x", "--method", "scratch"], "give its --student_layers and --student_d_model"),
        (["--train_file", "x", "--method", "scratch", "--train_teacher", *sizes], "--train_teacher has no effect"),
        (["--train_file", "x", "--embedded_data", "docs", "--teacher", "t"], "or --embedded_data, not both"),
        (["--train_file", "x", "--train_teacher", "--teacher", "t"], "give --teacher or --train_teacher, not both"),
        (["--embedded_data", "dcs", "--teacher", "t"], "--embedded_data: unknown 'dcs'; did you mean 'docs'"),
    ):
        assert cli.main([*flags, "--output_dir", str(tmp_path / "out")]) == 2
        assert expected in one_line(capsys)
    assert not list(tmp_path.iterdir())


IDLE = {  # what does nothing -> beside what
    "--teacher_steps 3": "without --train_teacher",
    "--teacher_learning_rate 1e-3": "without --train_teacher",
    "--student_layers 2 --student s": "beside --student",
    "--student_init slice --student s": "beside --student",
    "--student_d_model 32 --method prune-kd": "with a student that is its teacher pruned",
    "--assistant_layers 2": "without --interpolated",
    "--vocabulary_size 512": "beside a model, which brings its tokenizer",
    "--sequence_length 64 --task text2text": "with --task text2text: pairs have --max_source",
    "--label_column c --task text2text": "with --task text2text",
    "--source_lang en --task classification": "with --task classification",
    "--train_split a --task text2text": "without --dataset_name",
    "--shuffle_buffer 9": "without --streaming",
    "--teacher_dtype float32 --method scratch": "with --method scratch, which has no teacher",
    "--temperature 3 --method minilm": "with --method minilm, none of whose terms it is for",
    "--temperature 3 --method mixkd": "with --method mixkd, none of whose terms it is for",
    "--divergence jsd --method scratch": "with --method scratch, none of whose terms",
    "--divergence_beta 0.3": "with --divergence forward_kl",
    "--divergence_beta 0.3 --divergence tvd=1,reverse_kl=2": "with --divergence 1 tvd",
    "--relation_heads 8": "with --method mlmkd, none of whose terms it is for",
    "--match_first_position": "with --method mlmkd, none of whose terms it is for",
    "--mixup_alpha 1": "with --method mlmkd, none of whose terms it is for",
    "--projection_learning_rate 1 --method hsm-cka": "with --method hsm-cka, none of whose terms",
}


@pytest.mark.parametrize("words", IDLE)
def test_a_flag_without_effect_is_refused_where_it_was_typed(words: str, tmp_path: Path) -> None:
    """And not in a file, which may serve many runs."""
    flag, *rest = words.split()
    value = [rest.pop(0)] if rest and not rest[0].startswith("--") else []
    given = ["--train_file", "x", "--teacher", "t", *rest]
    with pytest.raises(InputError, match=f"^{flag} has no effect {IDLE[words]}"):
        parse([flag, *value, *given])
    (tmp_path / "c.yaml").write_text(f"{flag[2:]}: {value[0] if value else 'true'}")
    parse(["--config", str(tmp_path / "c.yaml"), *given])


def test_the_demo_is_its_file_and_what_is_given_takes_the_place() -> None:
    flags, args = parse(["--demo"])
    assert flags.train_teacher and flags.embedded_data and flags.teacher_steps and args.max_steps > 0
    flags, args = parse(["--demo", "--train_file", "x", "--teacher", "t", "--num_train_epochs", "2", "--seed", "5"])
    assert (flags.embedded_data, flags.train_teacher, args.max_steps, args.seed) == (None, False, -1, 5)


def test_the_defaults_are_those_of_a_run_with_a_teacher_and_data() -> None:
    flags, args = parse(["--teacher", "t", "--train_file", "x"])
    assert (flags.student_layers, flags.student_d_model, flags.embedding_learning_rate) == (None, None, 80 * 3e-4)
    assert (args.num_train_epochs, args.max_steps, args.learning_rate) == (3, -1, 3e-4)
    _, args = parse(["--teacher", "t", "--train_file", "x", "--load_best_model_at_end"])
    assert args.eval_steps == args.save_steps


@pytest.mark.parametrize("start", ["random", "slice"])
def test_a_student_has_half_the_layers_of_its_teacher_at_its_width(start: str) -> None:
    teacher = t5_config(640, 96, 5)
    teacher.d_kv, teacher.num_heads, teacher.d_ff, teacher.num_decoder_layers = 24, 4, 200, 3
    teacher.feed_forward_proj, teacher.is_gated_act, teacher.dense_act_fn = "gated-gelu", True, "gelu_new"
    method = dataclasses.replace(METHODS["kd"], student_init=start)
    found = planned_config(method, teacher, None, None)
    shape = ("d_model", "d_kv", "num_heads", "d_ff", "is_gated_act", "num_layers", "num_decoder_layers")
    assert [getattr(found, name) for name in shape] == [96, 24, 4, 200, True, 2, 1]
    narrow = planned_config(method, teacher, 48, 3)
    assert (narrow.d_model, narrow.num_layers, narrow.num_decoder_layers) == (48, 3, 3)


def test_bad_files_and_teachers(tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("empty.txt", b""), ("latin.txt", b"caf\xe9 ol\xe9"), ("short.txt", b"word")):
        (tmp_path / name).write_bytes(content)
        assert run("--method", "scratch", "--train_file", tmp_path / name, "--output_dir", tmp_path / "out") == 2
        capsys.readouterr()
    models = {
        "not_a_model": {},
        "bert": {"config.json": {"model_type": "bert"}},
        "weightless": {"config.json": {"model_type": "t5", "vocab_size": 512, "d_model": 32}},
        "garbled": {"config.json": "not json"},
        "cut off": {"config.json": {"model_type": "t5", "vocab_size": 512}, "model.safetensors": "half a file"},
    }
    for name, files in models.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_text(content if isinstance(content, str) else json.dumps(content))
        assert run("--teacher", tmp_path / name, "--train_file", text_file, "--output_dir", tmp_path / "out") == 2
        assert str(tmp_path / name) in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_help_is_short_and_its_defaults_are_those_that_apply(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "--demo, --method or --config" in one_line(capsys)
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 110 and max(map(len, text.splitlines())) <= 110
    assert text.index("--method") < text.index("--learning_rate") < text.index("examples")
    assert "--fsdp \\\n           --bf16" in text  # the line break that makes it a command to copy
    flags, args = parse(["--train_file", "x", "--teacher", "t"])
    entries = re.split(r"\n  --", text)[1:]
    shown = {e.split()[0]: m.group(1) for e in entries if (m := re.search(r"\(default:\s+(\S+)\)", e))}
    for flag in ("source_lang", "target_lang", "whole_word_masking"):  # of what models are taught
        assert f"  --{flag} " in text
    assert {"method", "num_train_epochs", "learning_rate", "eval_steps", "sequence_length"} <= shown.keys()
    for name, default in shown.items():
        actual = getattr(flags, name, getattr(args, name, None))
        assert str(getattr(actual, "value", actual)) == default, name
    assert cli.main(["--help-all"]) == 0
    everything = capsys.readouterr().out
    for name in (*(f.name for f in dataclasses.fields(flags)), "adam_beta1", "ddp_timeout"):
        assert name == "transformers_flags" or f"  --{name}" in everything


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--list-methods"]) == 0
    listed, families, more = capsys.readouterr().out.split("\n\n")
    lines = listed.splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS)
    columns, *rows = [line.split() for line in families.splitlines()[1:]]
    cells = {row[0]: dict(zip(columns, row[1:], strict=False)) for row in rows}
    assert columns == [family.name for family in FAMILIES] and cells.keys() >= METHODS.keys()
    for method, row in itertools.islice(cells.items(), len(METHODS)):
        for family in FAMILIES:
            why = METHODS[method].lacks(family).partition(", for")[0]
            assert row[family.name] == "yes" if not why else f"{row[family.name]} it has {why}" in families
    assert "--interpolated" in more and all(name in more for name in METHODS)  # a configuration for each of them
    assert "1 logit_kl + 1 decoder_self + 1 encoder_self" in next(x for x in lines if x.startswith("miniend-e "))


def test_what_is_told_takes_no_packages() -> None:
    code = (
        "import sys; from fastkd.train.cli import main\n"
        "for word in ('--help', '--version', '--list_methods'): assert main([word]) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'sklearn', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    release = torch.__version__.split("+")[0]  # the build behind it need not be part of a package's version
    assert re.search(rf"fastkd {fastkd.__version__} \(torch {re.escape(release)}(\+\w+)?, transformers ", done.stdout)


def test_names_that_are_known_without_torch_are_those_that_there_are() -> None:
    assert fastkd.DIVERGENCES.keys() == set(own.DIVERGENCES) and tasks.TASKS.keys() == set(own.TASKS)
    assert list(fastkd.DIVERGENCES) == list(own.DIVERGENCES)


def test_every_alias_is_of_a_flag_and_no_flag_itself() -> None:
    groups = own.FastkdArguments, arguments.TransformersArguments
    known = {f.name for group in groups for f in dataclasses.fields(group)}
    for meant, others in config.texts("aliases").items():
        assert set(meant.replace("--", "").split(" or ")) <= known
        assert not known & set(others.split())


def test_yaml_says_weights_and_grids_as_yaml_does(tmp_path: Path) -> None:
    grid = "sparsity_grid: [0, 0.6, 0.5]\ntarget_sparsity: 0.6\ntruncation: 0\n"
    (tmp_path / "c.yaml").write_text("method: minidisc\nweights: {logit_kl: 0.25}\n" + grid)
    found, args = parse(["--config", str(tmp_path / "c.yaml"), "--teacher", "t", "--train_file", "x", "--task", "sst2"])
    assert found.weights == {"logit_kl": 0.25} and found.grid == [0, 0.5, 0.6]
    (tmp_path / "again.yaml").write_text(found.config_text(args))
    again, _ = parse(["--config", str(tmp_path / "again.yaml")])
    alike = {"config": again.config, "transformers_flags": again.transformers_flags}
    assert again == dataclasses.replace(found, **alike)
    (tmp_path / "mix.yaml").write_text("method: kd\nteacher: t\ntrain_file: x\ndivergence: {tvd: 1, forward_kl: 0.5}\n")
    found, args = parse(["--config", str(tmp_path / "mix.yaml")])
    assert found.objective.divergence == {"tvd": 1, "forward_kl": 0.5}
    (tmp_path / "again.yaml").write_text(found.config_text(args))
    again, _ = parse(["--config", str(tmp_path / "again.yaml")])
    assert again.divergence == found.divergence and again.objective.divergence_in_words == "1 tvd + 0.5 forward_kl"


def test_a_flag_that_transformers_has_renamed_is_given_under_its_new_name(tmp_path: Path) -> None:
    """So nothing warns, whichever of them a command line or a file says; the line goes before the file."""
    is_renamed = hasattr(arguments.TransformersArguments, "activation_checkpointing")
    name = "activation_checkpointing" if is_renamed else "gradient_checkpointing"
    said, given = ["--gradient_checkpointing", "--gradient-checkpointing=true", f"--{name}"], ["--teacher", "t"]
    (tmp_path / "c.yaml").write_text("method: kd\ntrain_file: x\ngradient_checkpointing: true\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for words in (*([word, "--train_file", "x"] for word in said), ["--config", str(tmp_path / "c.yaml")]):
            found, args = parse([*given, *words])
            assert args.gradient_checkpointing is getattr(args, name) is found.transformers_flags[name] is True, words
        kwargs = ["--gradient_checkpointing_kwargs", '{"use_reentrant": false}']
        args = parse([*given, "--config", str(tmp_path / "c.yaml"), f"--{name}", "false", *kwargs])[1]
        assert getattr(args, name) is False and getattr(args, f"{name}_kwargs") == {"use_reentrant": False}
        assert not parse([*given, "--train_file", "x"])[1].gradient_checkpointing


def test_evaluations_and_checkpoints_come_together_for_the_best_model() -> None:
    given = ["--teacher", "t", "--train_file", "x", "--load_best_model_at_end"]
    for words, expected in (
        ([], (0.1, 0.1, "steps")),
        (["--save_steps", "500"], (500, 500, "steps")),
        (["--eval_steps", "0.2"], (0.2, 0.2, "steps")),
        (["--eval_strategy", "epoch"], (0.1, 0.1, "epoch")),
    ):
        _, args = parse([*given, *words])
        assert (args.eval_steps, args.save_steps, args.save_strategy.value) == expected
        assert args.eval_strategy.value == args.save_strategy.value


@pytest.mark.parametrize("package", ["transformers", "sentencepiece", "matplotlib"])
def test_without_an_optional_package(package: str) -> None:
    block = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] == '{package}': raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    code = block + "from fastkd.train.cli import main\nsys.exit(main(['--demo']))"
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"fastkd-train: missing {package}: pip install 'fastkd[train]'\n"


def test_importing_the_package_loads_nothing_and_its_names_say_what_is_missing() -> None:
    code = (
        "import sys, fastkd.train\n"
        "assert not {'transformers', 'accelerate', 'sentencepiece', 'matplotlib'} & set(sys.modules)\n"
        "sys.modules['transformers'] = None\n"
        "try: fastkd.train.DistillTrainer\n"
        "except ImportError as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "transformers: pip install 'fastkd[train]'" in done.stdout


def test_python_m_and_a_traceback_free_exit(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    command = [sys.executable, "-m", "fastkd.train.cli", "--train_file", str(tmp_path / "no.txt")]
    command += ["--method", "scratch", "--student_layers", "1", "--student_d_model", "32"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "o")], capture_output=True, text=True, env=environment
    )
    # torchao and bitsandbytes, where they are installed, say more in being imported.
    ours = [line for line in done.stderr.splitlines() if line.startswith("fastkd-train: ")]
    assert done.returncode == 2 and len(ours) == 1 and "no.txt" in ours[0] and "Traceback" not in done.stderr
