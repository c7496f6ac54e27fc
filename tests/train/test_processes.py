"""Training in several processes (DDP, FSDP2, a sharded teacher): the numbers of one process, its files, its errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from families import TEXTS, folder
from safetensors.torch import load_file
from train_flags import SIZES, with_inputs
from transformers import T5Config

from fastkd.train import LAUNCHERS
from fastkd.train.common import processes
from fastkd.train.common.errors import InputError
from fastkd.train.flags.arguments import TransformersArguments, parse
from fastkd.train.models.student import new_model
from fastkd.train.models.tokenizer import padded_size
from fastkd.train.training.checkpoints import last_checkpoint

ROOT = Path(__file__).parents[2]
STEPS = 12
BATCH = 12  # of all processes together
PATIENCE_OF_OTHERS = 10  # seconds, with a process that hangs

COMMON = [
    "--use_cpu",
    "true",
    "--disable_tqdm",
    "true",
    "--vocabulary_size",
    "512",
    "--sequence_length",
    "32",
    "--max_steps",
    str(STEPS),
    "--logging_steps",
    "1",
    "--teacher_layers",
    "2",
    "--teacher_d_model",
    "64",
    "--teacher_steps",
    "8",
    "--student_layers",
    "1",
    "--student_d_model",
    "32",
    "--eval_strategy",
    "steps",
    "--eval_steps",
    str(STEPS // 2),
    "--save_steps",
    str(STEPS // 2),
    "--report_examples",
    "2",
    "--per_device_eval_batch_size",
    "4",
    "--ddp_timeout",
    "30",
]
# With a head of its own, as T5 v1.1 and Flan-T5, which transformers may tie in a model made of the config alone.
FLAN: dict[str, Any] = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_heads": 4,
    "num_layers": 2,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}
METHODS = {
    "miniend-e": ["--method", "miniend-e", "--gradient_accumulation_steps", "2"],
    "hsm-cka": ["--method", "hsm-cka", "--cka_over_processes", "--learning_rate", "1e-3"],
    "bart": ["--method", "hsm-cka", "--cka_over_processes", "--learning_rate", "1e-3", "--max_steps", "6"],
    "qwen2": ["--method", "mlmkd+minilm", "--relation_heads", "2", "--gradient_accumulation_steps", "2"],
}
SAME_FILES = ("miniend-e-one", "miniend-e-ddp", "miniend-e-fsdp")


class Runs:
    """Runs of fastkd-train in one folder, and what became of them."""

    def __init__(self, folder: Path, texts: Path):
        self.folder = folder
        self.scenarios: list[dict[str, Any]] = []
        self.common = ["--train_file", str(texts), *COMMON, "--cache_dir", str(folder / "cache")]

    def add(self, name: str, processes: int, method: str, *flags: str, **more: Any) -> None:
        """Add a run of 12 examples a step, however many processes; the first one trains the teacher of all."""
        steps = 2 if "--gradient_accumulation_steps" in METHODS.get(method, []) else 1
        argv = [
            *self.common,
            *METHODS.get(method, ["--method", method]),
            "--output_dir",
            str(self.folder / name),
            *flags,
        ]
        argv += ["--per_device_train_batch_size", str(BATCH // processes // steps)]
        draws = {"pictures": True} if name in SAME_FILES else {}
        self.scenarios.append({"name": name, "processes": processes, "argv": with_inputs(*argv), **draws, **more})

    def run(self) -> None:
        """Run all scenarios."""
        (self.folder / "scenarios.json").write_text(json.dumps(self.scenarios), encoding="utf-8")
        words = [sys.executable, "-m", "tests.train.several_processes", str(self.folder)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def ends(self, name: str) -> list[Any]:
        """Return (exit code, lines on stderr) of each process, None for one that left nothing."""
        processes = next(s["processes"] for s in self.scenarios if s["name"] == name)
        files = [self.folder / f"{name}.{rank}.json" for rank in range(processes)]
        return [json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None for file in files]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """Return the weights of a run's student."""
        return load_file(self.folder / name / "model.safetensors")

    def log(self, name: str) -> dict[int, dict[str, float]]:
        """Return what was logged of each step: losses, gradient norms, held-out figures."""
        last = last_checkpoint(self.folder / name)
        assert last is not None
        entries = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        kept = ("loss", "grad_norm", "eval_loss", "eval_token", "learning_rate")
        log: dict[int, dict[str, float]] = {}
        for entry in entries:
            log.setdefault(entry["step"], {}).update({k: v for k, v in entry.items() if k.startswith(kept)})
        return log


def launched() -> dict[str, str]:
    """Return what `accelerate launch` tells the processes of our configuration for FSDP2."""
    settings = load_config_from_file(str(LAUNCHERS / "fsdp2.yaml")).fsdp_config
    return {"ACCELERATE_USE_FSDP": "true", **{name.upper(): str(value) for name, value in settings.items()}}


@pytest.fixture(scope="module")
def runs(text_file: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return the runs of this file, done: one subprocess makes all of them."""
    runs = Runs(tmp_path_factory.mktemp("runs"), text_file)
    flan = tmp_path_factory.mktemp("flan")
    new_model(T5Config(**FLAN, vocab_size=padded_size(tokenizer)), 3, tied=False).save_pretrained(flan)
    tokenizer.save_pretrained(flan)
    for method, ranks, teacher in (("miniend-e", 2, []), ("hsm-cka", 3, ["--teacher", str(flan)])):
        runs.add(f"{method}-one", 1, method, *teacher)
        runs.add(f"{method}-ddp", ranks, method, *teacher)
        runs.add(f"{method}-fsdp", ranks, method, *teacher, "--fsdp")
    cached = ["--teacher_cache", "hidden", "--teacher_cache_epochs", "2"]
    runs.add("kd-one", 1, "kd")
    runs.add("kd-ddp", 2, "kd", *cached, patch="small shards")  # by a teacher that is sharded
    runs.add("kd-fsdp", 3, "kd", *cached, "--fsdp")  # read
    # Of two processes, then three; with every weight gathered in between, as it need not be.
    first_half = {"copy": "miniend-e-ddp", "without": [f"checkpoint-{STEPS}"]}
    again = ["--resume_from_checkpoint", "last"]
    runs.add("resumed-ddp", 3, "miniend-e", *again, "--teacher_sharding", "none", **first_half)
    runs.add("other-kind", 2, "miniend-e", *again, "--fsdp", **first_half)
    first_half["copy"] = "miniend-e-fsdp"
    runs.add("resumed-fsdp", 3, "miniend-e", *again, **first_half, patch="nothing stays", environment=launched())
    # Prompt and classifier have fewer rows than there are processes.
    classes = tmp_path_factory.mktemp("classes") / "rows.jsonl"
    rows = [{"text": f"{word} {i}", "label": label} for i in range(60) for word, label in (("yes", "a"), ("no", "b"))]
    classes.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    enct5 = ["--task", "classification", "--architecture", "enct5", "--train_file", str(classes), "--max_steps", "6"]
    runs.add("enct5-one", 1, "scratch", *enct5)
    runs.add("enct5-fsdp", 3, "scratch", *enct5, "--fsdp")
    # Other families, in one epoch of equally long targets: a shorter last batch is shared otherwise, and of a batch's
    # longest target the last position has no place.
    for name, ranks, pairs in (("bart", 3, "summarization"), ("qwen2", 2, "text2text")):
        rows = tmp_path_factory.mktemp(name) / "rows.jsonl"
        given = [{"source": f"{i} {text}", "target": TEXTS[0]} for i in range(40) for text in TEXTS]
        rows.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
        own = ["--task", pairs, "--train_file", str(rows), "--teacher", str(folder(name, rows.parent / "model"))]
        runs.add(f"{name}-one", 1, name, *own)
        runs.add(f"{name}-ddp", ranks, name, *own)
        runs.add(f"{name}-fsdp", ranks, name, *own, "--fsdp")
    runs.add("killed", 2, "miniend-e", patch="kill")
    runs.add("after-killed", 2, "miniend-e", *again, copy="killed", without=[])
    runs.add("signalled", 2, "miniend-e", patch="signal")
    own = ["--ddp_timeout", str(PATIENCE_OF_OTHERS), "--cache_dir", str(runs.folder / "aside")]
    for patch in ("hang over data", "hang over a step"):
        runs.add(patch, 2, "scratch", *own, patch=patch, aside=True)
    runs.run()
    return runs


SAME = [
    *((f"{method}-{mode}", method) for method in METHODS for mode in ("ddp", "fsdp")),
    *((name, "miniend-e") for name in ("resumed-ddp", "resumed-fsdp", "after-killed")),
    ("enct5-fsdp", "enct5"),
    ("kd-ddp", "kd"),
    ("kd-fsdp", "kd"),
]


@pytest.mark.long
@pytest.mark.parametrize(("name", "method"), SAME)
def test_processes_train_as_one_does_on_the_whole_batch(runs: Runs, name: str, method: str) -> None:
    """Losses, terms, gradient norms and held-out figures of every step, and the weights after the last."""
    assert [(end["code"], end["lines"]) for end in runs.ends(name)] == [(0, [])] * len(runs.ends(name))
    ours, expected = runs.log(name), runs.log(f"{method}-one")
    assert ours.keys() == expected.keys() == set(range(1, (6 if method in ("enct5", "bart") else STEPS) + 1))
    for step, entry in expected.items():
        assert ours[step] == pytest.approx(entry, rel=1e-4, abs=1e-6), step
    weights, wanted = runs.weights(name), runs.weights(f"{method}-one")
    assert weights.keys() == wanted.keys()
    for key, weight in wanted.items():
        torch.testing.assert_close(weights[key], weight, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_the_first_process_writes_what_one_does(runs: Runs) -> None:
    """The same files, but for a checkpoint's own of each process, and the same figures, but for times."""
    one, *others = SAME_FILES
    for name in others:
        assert {path.name for path in (runs.folder / name).iterdir()} == {
            path.name for path in (runs.folder / one).iterdir()
        }
        ours, expected = (
            json.loads((runs.folder / folder / "metrics.json").read_text(encoding="utf-8"))["models"][-1]
            for folder in (name, one)
        )
        for figure in ("parameters", "steps", "loss", "token_accuracy"):
            assert ours[figure] == pytest.approx(expected[figure], rel=1e-4), figure
    assert not list((runs.folder / "cache").glob(".making-*"))
    assert len(list((runs.folder / "cache").glob("teacher-*"))) == 1  # of one process, and good for all


@pytest.mark.long
def test_a_process_that_is_killed_ends_the_others_with_one_line(runs: Runs) -> None:
    first, killed = runs.ends("killed")
    assert killed is None
    assert first["code"] == 1
    (line,) = first["lines"]
    assert "another process of this run has ended or does not answer" in line
    assert line.endswith("checkpoint-6 is whole, --resume_from_checkpoint last continues from it")


@pytest.mark.long
def test_a_first_process_that_hangs_is_waited_for_as_long_as_the_flag_says(runs: Runs) -> None:
    """It hangs until the other has ended."""
    for patch, more in (("hang over data", ""), ("hang over a step", "checkpoint-6 is whole, ")):
        first, other = runs.ends(patch)
        assert other["code"] == 1 and other["seconds"] > PATIENCE_OF_OTHERS and first["seen"] == [True]
        (line,) = other["lines"]
        said = "fastkd-train, rank 1: another process of this run has ended or does not answer"
        assert line.startswith(said) and more in line and (more or line == said)


@pytest.mark.long
def test_a_signal_to_one_process_stops_and_saves_all_at_one_step(runs: Runs) -> None:
    for rank, end in enumerate(runs.ends("signalled")):
        assert end["code"] == 143, rank
        assert re.search(r"interrupted at step (9|10), saved in \S+checkpoint-\1;", end["lines"][0]), end
    saved = {path.name for path in (runs.folder / "signalled").glob("checkpoint-*")}
    assert saved in ({"checkpoint-6", "checkpoint-9"}, {"checkpoint-6", "checkpoint-10"})


@pytest.mark.long
def test_a_checkpoint_of_the_other_kind_is_an_error_of_all(runs: Runs) -> None:
    for end in runs.ends("other-kind"):
        assert end["code"] == 2
    (line,) = runs.ends("other-kind")[0]["lines"]
    assert line == "fastkd-train: cannot resume: the run was started with fsdp False, now it is True"
    assert runs.ends("other-kind")[1]["lines"] == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "minidisc", "--task", "classification"], "--method minidisc runs in one process, got 2"),
        (["--demo"], "--demo runs in one process, got 2"),
        (["--method", "kd", "--fsdp", "--torch_compile", "true"], "--torch_compile is not supported with FSDP"),
        (["--method", "kd", "--cka_over_processes"], "--cka_over_processes has no effect with --method kd"),
        (
            ["--method", "hsm-cka", "--cka_over_processes", "--average_tokens_across_devices", "false"],
            "needs --average",
        ),
    ],
)
def test_flags_that_several_processes_cannot_follow(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransformersArguments, "world_size", 2)
    with pytest.raises(InputError, match=re.escape(message)):
        parse(with_inputs(*flags, *SIZES, "--use_cpu", "true"))


def test_one_that_works_for_all_is_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it calls may be work that one does for all, too: nobody else is there to be told."""
    told: list[Any] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(processes, "patient_group", lambda: None)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda values, **_: told.append(values[0]))
    assert processes.by_first(lambda: processes.by_first(lambda: processes.agreed(3)) + processes.count()) == 4
    assert told == [(4, None)]
    with pytest.raises(InputError, match="no such file"):
        processes.by_first(_fails)
    assert processes.count() == 2 and isinstance(told[1][1], InputError)


def _fails() -> None:
    raise InputError("no such file")


def test_every_process_reads_its_part_of_a_stream(text_file: Path) -> None:
    """Or one would have to cut its batches up for all, which have to be equally long for that."""
    flags = ["--method", "kd", "--streaming", "--teacher", "t", "--train_file", str(text_file), "--eval_file", "e"]
    loading: Any = parse([*flags, "--max_steps", "2", "--use_cpu", "true"])[1].accelerator_config
    assert loading.dispatch_batches is False
