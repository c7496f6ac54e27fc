"""--teacher_cache from the command line: what is refused, runs without their teacher, and runs that are killed."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_flags import with_inputs
from transformers import T5ForConditionalGeneration

from fastkd.train import cli
from fastkd.train.common.errors import InputError
from fastkd.train.flags.arguments import parse
from fastkd.train.models import loading
from fastkd.train.plan import plan
from fastkd.train.stages import caching
from fastkd.train.teaching.store import Manifest
from fastkd.train.training.trainer import DistillTrainer

pytestmark = pytest.mark.usefixtures("no_pictures")
CACHE = ["--teacher_cache", "hidden"]


# ---- Flags ----


REFUSED = {
    "--teacher_cache all": "expected hidden, topk:K or sampled:K with K at least 1, got 'all'",
    "--teacher_cache topk": "got 'topk'",
    "--teacher_cache topk:0": "got 'topk:0'",
    "--teacher_cache hidden:4": "got 'hidden:4'",
    "--teacher_cache sampled:4 --divergence reverse_kl": "expected forward_kl or skew_kl",
    "--teacher_cache sampled:4 --divergence forward_kl=1,reverse_kl=1": "expected forward_kl or skew_kl",
    "--teacher_cache hidden --method miniend-e": "decoder_self, encoder_self compares states of its layers",
    "--teacher_cache hidden --method hsm-cka": "hidden_cka compares states",
    "--teacher_cache hidden --method mixkd": "every step mixes other examples",
    "--teacher_cache hidden --method minidisc --task text2text": "each round has another teacher",
    "--teacher_cache hidden --method scratch": "no effect with --method scratch",
    "--teacher_cache hidden --streaming --max_steps 2": "not supported with --streaming",
    "--teacher_cache hidden --task text2text --labelled_examples 3": "not supported with --labelled_examples",
    "--teacher_cache hidden --task text2text --teacher_cache_epochs 2": "pairs are the same in every epoch",
    "--teacher_cache hidden --interpolated --teacher_cache_dir x": "--interpolated has two",
    "--teacher_cache_dir x": "no effect without --teacher_cache",
    "--teacher_cache_epochs 2": "no effect without --teacher_cache",
    "--teacher_cache hidden --teacher_cache_epochs 0": "must be at least 1, got 0",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_a_cache_cannot_do_is_refused(flags: str) -> None:
    method = [] if "--method" in flags else ["--method", "kd"]
    with pytest.raises(InputError, match=REFUSED[flags]):
        parse([*flags.split(), *method, "--use_cpu", "--train_file", "x.txt", "--teacher", "t5-base"])


def test_a_plan_counts_the_head_alone() -> None:
    words = ["--method", "kd", "--train_file", "x", "--teacher", "t5-small", "--student_layers", "1", "--use_cpu"]
    with pytest.raises(InputError, match="only hidden can be planned"):
        plan(*parse([*words, "--teacher_cache", "topk:4"]), device="cpu")
    kept = plan(*parse([*words, *CACHE]), device="cpu")
    assert kept.moments["loss"]["teacher's weights"] == 32128 * 512 * 4
    assert kept.moments["teacher"]["teacher's activations"] == 8 * 26 * 512 * 4


# ---- Whole runs ----


SMALL = [
    "--use_cpu", "--disable_tqdm", "true", "--logging_steps", "1", "--eval_strategy", "no", "--save_strategy", "no",
    "--sequence_length", "16", "--max_train_examples", "24", "--max_eval_examples", "8",
    "--report_examples", "1", "--per_device_train_batch_size", "8", "--student_layers", "1", "--student_d_model", "32",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A folder with a teacher."""
    folder = tmp_path_factory.mktemp("cached")
    sizes = ["--student_layers", "2", "--student_d_model", "64", "--max_steps", "3", "--vocabulary_size", "512"]
    words = with_inputs("--method", "scratch", *SMALL, *sizes, "--train_file", text_file)
    assert cli.main([*words, "--output_dir", str(folder / "teacher")]) == 0
    return folder


@pytest.fixture
def kd(root: Path, text_file: Path) -> Callable[..., int]:
    """kd(name, flag, ...): a run of kd into root/name; its exit code."""

    def run(name: str, *flags: object) -> int:
        inputs = ["--teacher", root / "teacher", "--train_file", text_file, "--output_dir", root / name]
        return cli.main(with_inputs("--method", "kd", *SMALL, "--max_steps", "4", *inputs, *flags))

    return run


def losses(folder: Path) -> list[float]:
    """What each step of a run logged, to the last bit."""
    student = json.loads((folder / "metrics.json").read_text())["models"][-1]
    return [entry["loss"] for entry in student["history"] if "loss" in entry]


def teachers() -> int:
    """How many models as wide as the teacher are in memory."""
    found = [x for x in gc.get_objects() if type(x) is T5ForConditionalGeneration]
    return sum(model.config.d_model == 64 for model in found)


def files(folder: Path) -> dict[str, int]:
    """Those that are whole, and when they changed last."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[!.]*.safetensors")}


@pytest.mark.long
def test_a_run_without_its_teacher_is_the_one_with_it(
    root: Path, kd: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = [*CACHE, "--teacher_cache_dir", root / "kept", "--teacher_cache_epochs", "2"]
    assert kd("plain") == 0
    capsys.readouterr()
    gc.collect()
    before, alive, step = teachers(), [], DistillTrainer.training_step

    def counting(trainer: DistillTrainer, *args: Any, **kwargs: Any) -> Any:
        alive.append(teachers() - before)
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "training_step", counting)
    assert kd("first", *cache) == 0
    monkeypatch.setattr(DistillTrainer, "training_step", step)
    assert alive == [0] * 4  # it has said what it says, and is gone
    said = capsys.readouterr().out
    assert "GiB are free in" in said and "positions of" in said and "% of it" in said
    written = files(root / "kept")

    load = loading.load_weights

    def no_teacher(name: Any, role: str, *rest: Any) -> Any:
        return pytest.fail("the teacher was loaded") if role == "teacher" else load(name, role, *rest)

    monkeypatch.setattr("fastkd.train.stages.given.load_weights", no_teacher)
    assert kd("second", *cache) == 0
    assert "without the teacher" in capsys.readouterr().out
    assert kd("other", *cache, "--student_d_model", "64", "--seed", "7", "--data_seed", "42") == 0

    assert losses(root / "plain") == losses(root / "first") == losses(root / "second") != losses(root / "other")
    assert len(losses(root / "plain")) == 4
    students = [load_file(root / name / "model.safetensors") for name in ("plain", "first", "second")]
    assert all(torch.equal(tensor, other[name]) for other in students for name, tensor in students[0].items())
    assert files(root / "kept") == written


KILLED = """
import sys, time
from fastkd.train import cli
from fastkd.train.stages import caching
from fastkd.train.teaching import store
caching.SHARD_BYTES = 1 << 12
write = store.write_whole
def slow(path, content):
    time.sleep(0.1)
    write(path, content)
store.write_whole = slow
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.long
def test_a_run_that_is_killed_loses_one_shard(root: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL at some moment of the writing; the next run goes on behind the last whole shard, with equal bytes."""
    inputs = ["--teacher", root / "teacher", "--train_file", text_file, "--max_steps", "2"]
    folder = root / "killed"
    words = with_inputs("--method", "kd", *SMALL, *inputs, *CACHE, "--teacher_cache_dir", folder)
    with subprocess.Popen([sys.executable, "-c", KILLED, *words, "--output_dir", str(root / "a")]) as process:
        while len(files(folder)) < 4 and process.poll() is None:  # the head is one
            time.sleep(0.01)
        process.kill()
    before = files(folder)
    manifest = Manifest(**json.loads((folder / "cache.json").read_text()))
    assert 4 <= len(before) < manifest.shards + 1
    assert cli.main([*words, "--output_dir", str(root / "b")]) == 0
    after = files(folder)
    assert len(after) == manifest.shards + 1 and before.items() <= after.items()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]

    monkeypatch.setattr(caching, "SHARD_BYTES", 1 << 12)
    words = [str(root / "whole") if word == str(folder) else word for word in words]
    assert cli.main([*words, "--output_dir", str(root / "c")]) == 0
    assert {name: (folder / name).read_bytes() for name in after} == {
        name: (root / "whole" / name).read_bytes() for name in after
    }
