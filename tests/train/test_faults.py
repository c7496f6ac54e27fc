"""What a run survives: kills, signals, full disks and numbers gone bad, at any moment, to the bit."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_flags import with_inputs
from transformers import T5ForConditionalGeneration, TrainerCallback

from fastkd.train import cli
from fastkd.train.common.errors import Interrupted, RunError
from fastkd.train.training import checkpoints
from fastkd.train.training import trainer as trainer_module
from fastkd.train.training.callbacks import WindowedValues
from fastkd.train.training.checkpoints import STAGING, fault, last_checkpoint, recover
from fastkd.train.training.guards import NonFinite, Signals
from fastkd.train.training.trainer import DistillTrainer

pytestmark = pytest.mark.usefixtures("no_pictures")
TIMES = ("runtime", "per_second")
# 64 examples: with these, an epoch has 4 steps, and 11 steps end inside the third.
ACCUMULATE = ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--max_steps", "11"]
NEVER = ["--save_strategy", "no", "--eval_strategy", "no"]


@pytest.fixture(autouse=True)
def _signals_of_a_terminal() -> Any:
    """Shells start background jobs with SIGINT ignored, and then it is not ours to handle."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def curve(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log entries without what a clock made, nor the summary of one call of train()."""
    entries = [entry for entry in entries if "train_loss" not in entry]
    return [{key: value for key, value in entry.items() if not key.endswith(TIMES)} for entry in entries]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def said(error: str) -> list[str]:
    """The lines on stderr that are no progress bars, without the name of the program."""
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line and "|" not in line and "%" not in line]
    assert all(line.startswith("fastkd-train: ") for line in lines), lines
    return [line.removeprefix("fastkd-train: ") for line in lines]


class At(TrainerCallback):
    """Calls `do` at an event of a step, counted from 1."""

    def __init__(self, event: str, step: int, do: Callable[[], object]):
        self.steps_before = step - (event == "on_step_begin")
        self.do = do
        setattr(self, event, self.called)

    def called(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.steps_before:
            self.do()


@pytest.fixture
def make(tiny: Callable[..., Any], make_trainer: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """make(folder, flags, method): a trainer into tmp_path/folder whose student drops out at random."""

    def make(folder: str = "out", flags: list[str] = ACCUMULATE, method: str = "miniend-e") -> Any:
        student = tiny(32, 1)
        for module in student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        teacher = None if method == "scratch" else tiny(64, 2)
        return make_trainer(
            student,
            method,
            ["--output_dir", str(tmp_path / folder), "--save_total_limit", "99", *flags],
            teacher=teacher,
            embedding_learning_rate=0.1,
        )

    return make


def same_end(trainer: Any, whole: Any) -> None:
    assert curve(trainer.state.log_history) == curve(whole.state.log_history)
    for name, p in whole.model.named_parameters():
        assert torch.equal(trainer.model.get_parameter(name), p), name


# ---- The curve goes on ----


def test_a_run_resumed_from_any_step_logs_and_ends_as_the_uninterrupted_one(make: Any, tmp_path: Path) -> None:
    flags = [*ACCUMULATE, "--logging_steps", "3", "--eval_steps", "5"]
    whole = make("whole", [*flags, "--save_strategy", "no"])
    whole.train()
    entries = whole.state.log_history
    assert [e["step"] for e in entries if "loss" in e] == [3, 6, 9]
    assert [e["step"] for e in entries if "eval_loss" in e] == [5, 10, 11]
    saving = make("saved", [*flags, "--save_steps", "1"])
    saving.train()
    same_end(saving, whole)
    for step in (1, 4, 5, 11):  # between entries, the end of an epoch, an evaluation, the end
        resumed = make("saved", [*flags, "--save_strategy", "no"])
        resumed.train(resume_from_checkpoint=str(tmp_path / "saved" / f"checkpoint-{step}"))
        same_end(resumed, whole)


def test_what_an_epochs_end_logs_and_evaluates_is_not_lost_with_it(make: Any, tmp_path: Path) -> None:
    flags = [*ACCUMULATE, "--logging_strategy", "epoch", "--eval_strategy", "epoch", "--eval_on_start"]
    saving = make("saved", [*flags, "--save_steps", "1"], "scratch")
    saving.train()
    steps = [(e["step"], "loss" in e) for e in curve(saving.state.log_history)]
    assert steps == [(0, False), (4, True), (4, False), (8, True), (8, False), (11, True), (11, False)]
    for step in (3, 4, 11):
        resumed = make("saved", [*flags, "--save_strategy", "no"], "scratch")
        resumed.train(resume_from_checkpoint=str(tmp_path / "saved" / f"checkpoint-{step}"))
        same_end(resumed, saving)


def test_the_logged_loss_is_the_mean_of_the_steps_since_the_last_entry(make: Any) -> None:
    """By hand: every step's loss as its forward pass gave it, added up here."""
    losses: list[float] = []
    trainer = make("out", [*ACCUMULATE, "--logging_steps", "4", *NEVER])
    compute = trainer.compute_loss

    def spy(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.compute_loss = spy
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([sum(losses[:8]) / 4, sum(losses[8:16]) / 4], rel=1e-6)


def test_windowed_values_go_on_after_a_resume() -> None:
    window, resumed = WindowedValues(), WindowedValues()
    for value in (1.5, 2.25):
        window.add({"loss": torch.tensor(value)})
        window.peak({"max": torch.tensor(value)})
        window.on_step_end(None, None, None)
    resumed.load_state_dict(window.state_dict())
    resumed.add({"loss": torch.tensor(4.0)})
    resumed.on_step_end(None, None, None)
    values = resumed.pop()
    assert torch.equal(values["loss"], torch.tensor(7.75) / 3) and values["max"].item() == 2.25
    resumed.add({"loss": torch.tensor(1.0)})
    resumed.start()  # of a run that is not resumed
    assert resumed.steps == 0 and not resumed.sums


# ---- Signals ----


SIGNALLED = [*ACCUMULATE, "--logging_steps", "4", "--eval_steps", "5", "--save_steps", "6"]


@pytest.mark.parametrize(
    ("number", "event", "step"),
    [
        (signal.SIGTERM, "on_step_begin", 3),  # during a step
        (signal.SIGHUP, "on_step_begin", 4),  # as when a connection breaks
        (signal.SIGINT, "on_step_begin", 7),  # after a checkpoint, and between two log entries
        (signal.SIGINT, "on_evaluate", 5),  # during an evaluation: it is not repeated
        (signal.SIGTERM, "on_save", 6),  # during a checkpoint: it is enough
        (signal.SIGINT, "on_step_begin", 8),  # in the last step of an epoch
        (signal.SIGINT, "on_step_begin", 11),  # in the last step of all
        (signal.SIGTERM, "on_train_end", 11),  # after it
    ],
)
def test_signals_save_and_the_resumed_run_ends_as_the_uninterrupted_one(
    number: signal.Signals, event: str, step: int, make: Any, tmp_path: Path
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    first = make("parts", SIGNALLED, "scratch")
    first.add_callback(At(event, step, lambda: signal.raise_signal(number)))
    with pytest.raises(Interrupted, match=f"interrupted at step {step}, saved in .*checkpoint-{step}; --resume_") as e:
        first.train()
    assert e.value.exit_code == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    assert last_checkpoint(tmp_path / "parts") == tmp_path / "parts" / f"checkpoint-{step}"
    second = make("parts", SIGNALLED, "scratch")
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{step}"))
    if not UNINTERRUPTED:
        UNINTERRUPTED.append(make("whole", SIGNALLED, "scratch"))
        UNINTERRUPTED[0].train()
    same_end(second, UNINTERRUPTED[0])


UNINTERRUPTED: list[Any] = []  # made once


def test_a_second_sigint_stops_at_once(make: Any, tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trainer = make("out", ACCUMULATE, "scratch")
    trainer.add_callback(At("on_step_begin", 2, twice))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1 and last_checkpoint(tmp_path / "out") is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_sigint_during_the_checkpoint_leaves_no_piece_of_it(make: Any, tmp_path: Path) -> None:
    trainer = make("out", [*ACCUMULATE, "--save_steps", "2"], "scratch")
    trainer.add_callback(At("on_step_begin", 3, lambda: signal.raise_signal(signal.SIGINT)))
    save = trainer._save_rng_state

    def interrupted(folder: str) -> None:
        save(folder)
        if "checkpoint-3" in folder:
            signal.raise_signal(signal.SIGINT)

    trainer._save_rng_state = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]


def test_signals_where_nothing_is_saved_other_threads_and_ignored_signals(make: Any, tmp_path: Path) -> None:
    trainer = make("out", [*ACCUMULATE, *NEVER], "scratch")
    trainer.add_callback(At("on_step_begin", 2, lambda: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(Interrupted, match="step 2, not saved: this training keeps no checkpoints") as caught:
        trainer.train()
    assert caught.value.exit_code == 143 and not list(tmp_path.glob("out/*"))

    seen: list[Any] = []
    trainer = make("out", [*ACCUMULATE, *NEVER, "--max_steps", "1"], "scratch")
    trainer.add_callback(At("on_step_begin", 1, lambda: seen.append(signal.getsignal(signal.SIGTERM))))
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL] and trainer.state.global_step == 1

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and shells do
    with Signals(lambda number: None) as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == 0
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM


# ---- Whole checkpoints ----


def fails(error: Exception, at: int) -> Callable[..., None]:
    """A torch.save that writes a few bytes and then fails, from its call number `at` on."""
    save, calls = torch.save, [0]

    def failing(value: object, path: Any, *args: Any, **kwargs: Any) -> None:
        calls[0] += 1
        if calls[0] < at:
            save(value, path, *args, **kwargs)
            return
        Path(path).write_bytes(b"half")
        raise error

    return failing


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "error",
    [FULL, OSError(errno.EROFS, "Read-only file system"), RuntimeError("inline_container.cc: unexpected pos 5")],
)
def test_a_full_disk_leaves_the_last_checkpoint_whole(
    error: Exception, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    trainer = make("out", [*ACCUMULATE, "--save_steps", "2", "--save_total_limit", "1"], "scratch")
    before: dict[str, bytes] = {}
    trainer.add_callback(At("on_step_begin", 3, lambda: before.update(files(out))))
    # Six files of checkpoint-2 (arguments, optimizer, scheduler, random numbers, log window, and the arguments with the
    # folder's final name) and one of checkpoint-4.
    monkeypatch.setattr(torch, "save", fails(error, 8))
    with pytest.raises(
        RunError, match=r"cannot write .*checkpoint-4: .*; .*checkpoint-2 is whole, --resume_from_"
    ) as e:
        trainer.train()
    assert e.value.exit_code == 1 and "\n" not in str(e.value)
    assert any(
        word in str(e.value) for word in ("No space left on device", "Read-only file system", "a part of a file")
    )
    assert before and files(out) == before
    assert last_checkpoint(out) == out / "checkpoint-2"


def test_other_errors_while_saving_are_not_the_disks(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "save", fails(TypeError("a mistake of ours"), 2))
    trainer = make("out", [*ACCUMULATE, "--save_steps", "1"], "scratch")
    with pytest.raises(TypeError, match="a mistake of ours"):
        trainer.train()
    assert not list((tmp_path / "out").iterdir())


def test_a_checkpoint_of_that_name_is_replaced_and_comes_back_if_that_fails(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, old = tmp_path / "out", tmp_path / "out" / "checkpoint-2"
    flags = [*ACCUMULATE, "--save_steps", "2", "--max_steps", "2", "--eval_strategy", "no"]
    old.mkdir(parents=True)
    (old / "old.txt").write_text("old")
    (out / STAGING / "checkpoint-7").mkdir(parents=True)  # what a killed run leaves
    rename, renamed = os.rename, []

    def killed(source: Any, target: Any) -> None:
        if Path(target) == old and not (old / "old.txt").exists():
            renamed.append(target)
            raise SystemExit  # nothing below catches it, and with `recover` gone it is as good as a kill
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        patch.setattr(checkpoints, "recover", lambda run: None)
        with pytest.raises(SystemExit):
            make("out", flags, "scratch").train()
    assert renamed and not old.exists()
    recover(out)
    assert files(out) == {"checkpoint-2/old.txt": b"old"}

    make("out", flags, "scratch").train()
    assert [path.name for path in out.iterdir()] == ["checkpoint-2"]
    assert fault(old) is None and not (old / "old.txt").exists()


def test_the_best_checkpoint_is_kept_loaded_and_named_where_it_is(make: Any, tmp_path: Path) -> None:
    """Evaluations are given: 5, 3, 4, 6; so checkpoint-4 is the best one, and 2 and 6 go when others come."""
    flags = [*ACCUMULATE, "--save_steps", "2", "--eval_steps", "2", "--save_total_limit", "2", "--max_steps", "8"]
    trainer = make("out", [*flags, "--load_best_model_at_end", "true"], "scratch")
    losses, weights = iter([5.0, 3.0, 4.0, 6.0]), {}

    def evaluate(**_: Any) -> dict[str, float]:
        trainer.control.should_evaluate = False
        return {"eval_loss": next(losses)}

    trainer.evaluate = evaluate
    trainer.add_callback(
        At(
            "on_step_begin",
            5,
            lambda: weights.update({n: p.detach().clone() for n, p in trainer.model.named_parameters()}),
        )
    )
    trainer.train()
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-4", "checkpoint-8"]
    for step in (4, 8):
        state = json.loads((out / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(out / "checkpoint-4") and state["best_metric"] == 3.0
    assert trainer.state.best_model_checkpoint == str(out / "checkpoint-4")
    assert all(torch.equal(p, weights[name]) for name, p in trainer.model.named_parameters())


def test_a_student_is_never_saved_by_half(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "student"
    trainer = make("out", [*ACCUMULATE, *NEVER, "--max_steps", "2"], "scratch")
    trainer.save_model(str(out))
    before = files(out)
    assert STAGING not in {path.name for path in out.iterdir()}
    trainer.train()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(FULL))
        with pytest.raises(RunError, match=r"cannot write .*student: No space left on device; no checkpoint was saved"):
            trainer.save_model(str(out))
    assert files(out) == before
    trainer.save_model(str(out))
    loaded = T5ForConditionalGeneration.from_pretrained(out)
    assert torch.equal(loaded.shared.weight, trainer.model.shared.weight)
    assert files(out)["model.safetensors"] != before["model.safetensors"]


def test_what_is_a_whole_checkpoint(tmp_path: Path) -> None:
    weights = "\2\0\0\0\0\0\0\0{}"  # no tensors: the length of the header, and the header
    good = {"trainer_state.json": '{"global_step": 3}', "model.safetensors": weights, "optimizer.pt": ""}
    cases: list[tuple[dict[str, str], str | None]] = [
        (good, None),
        ({"trainer_state.json": '{"global_step": 3}', "global_step3": ""}, None),  # DeepSpeed's
        ({**good, "trainer_state.json": '{"global_st'}, "cannot be read"),
        ({**good, "trainer_state.json": "\0\0\0"}, "cannot be read"),
        ({**good, "trainer_state.json": "[]"}, "cannot be read"),
        ({k: v for k, v in good.items() if k != "trainer_state.json"}, "no trainer_state.json"),
        ({k: v for k, v in good.items() if k != "optimizer.pt"}, "no state of the optimizer"),
        ({k: v for k, v in good.items() if k != "model.safetensors"}, "no weights"),
        ({**good, "model.safetensors": weights[:-1]}, "weights cannot be read"),
    ]
    for number, (content, reason) in enumerate(cases):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
        assert reason in (fault(folder) or "") if reason else fault(folder) is None
    (tmp_path / "checkpoint-9").write_text("a file")
    (tmp_path / "checkpoint-12.bak").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    shutil.copytree(tmp_path / "checkpoint-0", tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"  # by number, not by name
    assert fault(tmp_path / "checkpoint-9") == fault(tmp_path / "missing") == "it has no trainer_state.json"
    assert last_checkpoint(tmp_path / "missing") is None


# ---- Numbers that are not finite ----


def test_a_term_that_is_not_finite_stops_the_run_before_the_weights_move(make: Any, tmp_path: Path) -> None:
    trainer = make("out", [*ACCUMULATE, "--save_steps", "2", "--logging_steps", "11"])
    terms, weights, poison = trainer._terms, {}, {"decoder_self": float("nan"), "encoder_self": float("inf")}

    def poisoned(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        bad = poison if trainer.state.global_step == 4 else {}
        return {name: value * bad.get(name, 1.0) for name, value in terms(*args, **kwargs).items()}

    def remember() -> None:
        weights.update({name: p.detach().clone() for name, p in trainer.model.named_parameters()})

    trainer._terms = poisoned
    trainer.add_callback(At("on_step_begin", 5, remember))
    expected = f"the loss term decoder_self is nan at step 5; last good checkpoint: {tmp_path}/out/checkpoint-4"
    with pytest.raises(RunError) as caught:
        trainer.train()
    assert str(caught.value) == expected and caught.value.exit_code == 1
    assert weights and all(torch.equal(p, weights[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize(
    ("weight", "side"),
    [
        ("encoder.final_layer_norm.weight", "encoder"),
        ("decoder.final_layer_norm.weight", "decoder"),
        ("shared.weight", r"embedding \(or what else is outside encoder and decoder\)"),
    ],
)
@pytest.mark.parametrize("clip", ["1.0", "0"])
def test_a_gradient_that_is_not_finite_names_its_side(weight: str, side: str, clip: str, make: Any) -> None:
    trainer = make("out", [*ACCUMULATE, *NEVER, "--max_grad_norm", clip], "scratch")
    parameter = trainer.model.get_parameter(weight)
    parameter.register_hook(lambda gradient: gradient * (float("inf") if trainer.state.global_step == 1 else 1.0))
    with pytest.raises(RunError, match=f"the gradient of the {side} is (nan|inf) at step 2; no checkpoint was saved"):
        trainer.train()
    assert torch.isfinite(parameter).all()


def test_gradients_under_a_scaler_are_left_to_it(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make("out", [*ACCUMULATE, *NEVER], "scratch")
    norms = {"encoder": torch.tensor(float("inf")), "decoder": torch.tensor(1.0), "rest": torch.tensor(1.0)}
    monkeypatch.setattr(trainer_module, "gradient_norms", lambda model, scaler: norms)
    monkeypatch.setattr(trainer, "_backward", lambda *_: torch.tensor(1.0))
    trainer.accelerator.scaler = object()
    trainer.training_step(trainer.model, {})
    assert trainer._non_finite.found() is None
    trainer.accelerator.scaler = None
    trainer.training_step(trainer.model, {})
    assert trainer._non_finite.found() == "the gradient of the encoder is inf at step 1"


@pytest.mark.parametrize("flags", [["--save_steps", "4"], ["--logging_steps", "4"], []])
def test_where_no_step_waits_nothing_bad_is_saved_or_logged(flags: list[str], make: Any, tmp_path: Path) -> None:
    """As on a GPU: looked at when saving, when logging, and at the end."""
    defaults = ["--save_steps", "50", "--logging_steps", "50", "--eval_strategy", "no"]
    trainer = make("out", [*ACCUMULATE, *defaults, *flags], "kd")
    trainer.remove_callback(NonFinite)

    def poison() -> None:
        trainer.model.decoder.final_layer_norm.weight.data[0] = float("nan")

    trainer.add_callback(At("on_step_begin", 3, poison))
    with pytest.raises(RunError, match=r"the loss term ce\+logit_kl is nan at step 3; no checkpoint was saved"):
        trainer.train()
    assert trainer.state.global_step == (4 if flags else 11)
    assert not any("loss" in entry for entry in trainer.state.log_history)
    assert last_checkpoint(tmp_path / "out") is None and not (tmp_path / "out" / STAGING).exists()


def test_weights_that_are_not_finite_are_not_saved(make: Any, tmp_path: Path) -> None:
    trainer = make("out", [*ACCUMULATE, "--save_steps", "2", "--eval_strategy", "no"], "scratch")

    def poison() -> None:
        trainer.model.encoder.final_layer_norm.weight.data[0] = float("inf")

    trainer.add_callback(At("on_step_end", 4, poison))
    with pytest.raises(
        RunError, match=r"the weight encoder\.final_layer_norm\.weight is not finite after step 4; .*-2$"
    ):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]
    with pytest.raises(RunError, match="not finite"):
        trainer.save_model(str(tmp_path / "student"))
    assert not (tmp_path / "student").exists()


def test_the_earliest_number_that_was_not_finite_is_found() -> None:
    watch = NonFinite()
    assert watch.found() is None
    one, nan, minus = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("-inf"))
    watch.watch({"a": one, "b": one}, 1)
    assert watch.found() is None
    watch.watch({"a": one, "b": minus.double()}, 2)
    watch.watch({"a": nan, "b": nan, "c": nan}, 3)
    assert watch.found() == "b is -inf at step 2"
    watch.watch({"a": one, "b": one}, 4)
    assert watch.found() == "b is -inf at step 2"


# ---- The command line ----

SMALL = [
    "--use_cpu", "--method", "scratch", "--student_layers", "1", "--student_d_model", "32", "--sequence_length", "16",
    "--vocabulary_size", "512", "--max_steps", "10", "--per_device_train_batch_size", "4", "--disable_tqdm", "true",
    "--save_steps", "2", "--logging_steps", "3", "--eval_steps", "4", "--save_total_limit", "1",
]  # fmt: skip
# Imports everything once, then forks a process for every line it reads; answers with how that process ended.
FORKS = """
import gc, json, os, resource, signal, sys, torch
import fastkd.functions
from pathlib import Path
from fastkd.train import cli
from fastkd.train.runs import encoder, interpolated, pruned, train
from fastkd.train.training.trainer import DistillTrainer
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)
gc.freeze()
save, training_step = torch.save, DistillTrainer.training_step

def disturb():
    if event == "FULL":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    else:
        os.kill(os.getpid(), getattr(signal, event))

def disturbed_save(value, path, *args, **kwargs):
    if f"checkpoint-{number}/" in str(path) and str(path).endswith("optimizer.pt"):
        Path(path).write_bytes(b"half a file")
        disturb()
    save(value, path, *args, **kwargs)

def disturbed_step(self, *args, **kwargs):
    if self.state.global_step + 1 == number:
        disturb()
    return training_step(self, *args, **kwargs)

for line in sys.stdin:
    event, during, number, flags, error = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(error, os.O_CREAT | os.O_WRONLY), 2)
        os.dup2(2, 1)
        sys.stdout = open(os.devnull, "w")
        if during == "save":
            torch.save = disturbed_save
        else:
            DistillTrainer.training_step = disturbed_step
        code = cli.main(flags)
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.long
def test_processes_killed_stopped_and_out_of_disk_end_as_an_undisturbed_one(tmp_path: Path, text_file: Path) -> None:
    flags = [*SMALL, "--train_file", str(text_file), "--output_dir"]
    assert cli.main([*flags, str(tmp_path / "whole")]) == 0
    out, resume = tmp_path / "parts", ["--resume_from_checkpoint", "last"]
    disturbances: list[tuple[str, str, int, int, str, int]] = [
        ("SIGKILL", "step", 4, -9, "", 2),
        ("SIGKILL", "save", 4, -9, "", 2),
        ("SIGTERM", "step", 5, 143, "interrupted at step 5, saved in ", 5),
        ("SIGTERM", "save", 6, 143, "interrupted at step 6, saved in ", 6),
        ("SIGINT", "step", 7, 130, "interrupted at step 7, saved in ", 7),
        ("SIGINT", "save", 8, 130, "interrupted at step 8, saved in ", 8),
        ("FULL", "save", 10, 1, f"cannot write {out / 'checkpoint-10'}: ", 8),
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([sys.executable, "-c", FORKS], **pipes) as forks:
        for number, (event, during, step, code, message, last) in enumerate(disturbances):
            stderr = tmp_path / f"{number}.txt"
            request = [event, during, step, [*flags, str(out), *(resume if number else [])], str(stderr)]
            print(json.dumps(request), file=forks.stdin, flush=True)
            ended, lines = forks.stdout.readline(), said(stderr.read_text())
            assert ended == f"{code}\n", (event, during, lines)
            assert len(lines) == bool(message), lines
            assert all(line.startswith(message) for line in lines), lines
            assert all("--resume_from_checkpoint last continues" in line for line in lines)
            assert last_checkpoint(out) == out / f"checkpoint-{last}"
            assert (out / STAGING).exists() == (event == "SIGKILL" and during == "save")
        forks.stdin.close()
    assert cli.main([*flags, str(out), *resume]) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())

    ends = [tmp_path / name / "checkpoint-10" / "trainer_state.json" for name in ("whole", "parts")]
    curves = [curve(json.loads(path.read_text())["log_history"]) for path in ends]
    assert curves[1] == curves[0] and [entry["step"] for entry in curves[0]] == [3, 4, 6, 8, 9, 10]
    for name in ("model.safetensors", "checkpoint-10/model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert cli.main([*flags, str(out), *resume]) == 0  # at its end already: not one step more
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_diverging_run_is_one_line(tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    flags = [*SMALL, "--train_file", str(text_file), "--output_dir", str(out), "--learning_rate", "1e30"]
    assert cli.main([*flags, "--warmup_steps", "0", "--embedding_learning_rate", "1e30"]) == 1
    (line,) = said(capsys.readouterr().err)
    assert "nan at step 2; no checkpoint was saved" in line
    assert not list(out.glob("checkpoint-*")) and not (out / "model.safetensors").exists()


def test_a_signal_stops_a_demo(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    training_step = DistillTrainer.training_step

    def signalled(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "training_step", signalled)
    flags = [*SMALL, "--method", "kd", "--demo", "--teacher_layers", 1, "--teacher_d_model", 32]
    flags += ["--train_file", text_file, "--output_dir", tmp_path / "runs" / "demo"]
    assert cli.main(with_inputs(*flags)) == 143
    lines = said(capsys.readouterr().err)
    assert lines == ["interrupted at step 2, not saved: this training keeps no checkpoints"]
    assert not list((tmp_path / "runs" / "cache").glob("teacher-*"))


def test_sigint_while_data_is_prepared_is_a_keyboard_interrupt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastkd.train.runs import prepared

    monkeypatch.setattr(prepared, "with_data", lambda *_: signal.raise_signal(signal.SIGINT))
    assert cli.main(with_inputs(*SMALL, "--output_dir", tmp_path / "out")) == 130
    assert "interrupted" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_checkpoints_that_are_not_whole(tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    flags = [*SMALL, "--max_steps", "4", "--save_total_limit", "9", "--train_file", str(text_file)]
    flags += ["--output_dir", str(out)]
    assert cli.main(flags) == 0
    (out / "checkpoint-4" / "trainer_state.json").write_text("{")
    (out / STAGING / "checkpoint-6").mkdir(parents=True)
    capsys.readouterr()
    assert cli.main([*flags, "--resume_from_checkpoint", str(out / "checkpoint-4")]) == 2
    assert "checkpoint-4 is no checkpoint that is whole (its trainer_state.json cannot" in capsys.readouterr().err
    assert cli.main([*flags, "--resume_from_checkpoint", "last"]) == 0
    assert f"continuing from {out / 'checkpoint-2'}; passing over" in capsys.readouterr().out
    assert not (out / STAGING).exists() and fault(out / "checkpoint-4") is None
    for path in out.glob("checkpoint-*/trainer_state.json"):
        path.unlink()
    assert cli.main([*flags, "--resume_from_checkpoint", "last"]) == 2
    error = capsys.readouterr().err
    assert "holds no checkpoint that is whole" in error and "checkpoint-2: it has no trainer_state.json" in error


@pytest.mark.parametrize("demo", [[], ["--demo", "--method", "kd"]])
def test_a_folder_that_cannot_be_written_is_one_line_before_anything_else(
    demo: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    places = [
        tmp_path / "file" / "run",
        tmp_path / ("long" * 100),
        *([Path("/proc/run")] if os.path.isdir("/proc") else []),
    ]
    for place in places:
        assert cli.main(with_inputs(*SMALL, *demo, "--output_dir", place)) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"fastkd-train: --output_dir {place} cannot be written to: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_error_of_the_system_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastkd.train.runs import prepared

    def refuse(error: OSError) -> None:
        raise error

    full = OSError(errno.EDQUOT, "Disk quota exceeded", "some/file")
    monkeypatch.setattr(prepared, "with_data", lambda *_: refuse(full))
    assert cli.main(with_inputs(*SMALL, "--output_dir", tmp_path / "out")) == 1
    cache = tmp_path / "cache"
    expected = f"cannot write to --cache_dir {cache} (some/file): Disk quota exceeded; make room there, or give another"
    assert capsys.readouterr().err == f"fastkd-train: {expected}\n"
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", "some/file")
    monkeypatch.setattr(prepared, "with_data", lambda *_: refuse(missing))
    assert cli.main(with_inputs(*SMALL, "--output_dir", tmp_path / "out")) == 1
    assert capsys.readouterr().err == f"fastkd-train: {missing}\n"
    monkeypatch.setattr(prepared, "with_data", lambda *_: refuse(OSError("a library's own")))
    with pytest.raises(OSError, match="a library's own"):
        cli.main(with_inputs(*SMALL, "--output_dir", tmp_path / "out"))
