"""The folders of runs: what is replaced and when, what is never lost, and what a resumed run shares with the first."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from fastkd.train.common import processes
from fastkd.train.common.cache import replace_folder
from fastkd.train.common.errors import InputError, writing
from fastkd.train.data.tasks import TASKS
from fastkd.train.flags.arguments import parse
from fastkd.train.flags.fields import FastkdArguments
from fastkd.train.report import reports
from fastkd.train.runs import left, prepared
from fastkd.train.stages import folders, students, teachers
from fastkd.train.training.checkpoints import continued
from fastkd.train.training.trainer import DistillTrainer

SAVING = ["--save_strategy", "steps", "--save_steps", "2"]
RESUME = ["--resume_from_checkpoint", "last"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What we said on stderr, beside progress bars."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]
    assert len(lines) == 1 and lines[0].startswith("fastkd-train: "), lines
    return lines[0]


@pytest.fixture
def disturb(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """disturb(step, do): do() is called at the start of that step of every training, counted from 1."""
    train = DistillTrainer.training_step

    def at(step: int, do: Callable[[], object]) -> None:
        def disturbed(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.state.global_step + 1 == step:
                do()
            return train(self, *args, **kwargs)

        monkeypatch.setattr(DistillTrainer, "training_step", disturbed)

    return at


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def scratch(tool: Callable[..., int], text_file: Path, place: Path) -> Callable[..., int]:
    """scratch("--flag", value, ...): the exit code of a run into `out` of the working directory."""
    data = ["--train_file", text_file, "--max_eval_examples", 4]
    return lambda *flags: tool("--method", "scratch", *data, "--output_dir", "out", *flags)


@pytest.fixture
def distil(
    tool: Callable[..., int], saved: Callable[..., Path], tiny: Callable[..., Any], text_file: Path, place: Path
) -> Callable[..., int]:
    """distil("--flag", value, ...): as `scratch`, by kd from the teacher `t5` on texts.txt, both in that directory."""
    saved(tiny(), place / "t5")
    shutil.copy(text_file, place / "texts.txt")
    common = ["--method", "kd", "--teacher", "t5", "--train_file", "texts.txt", "--max_eval_examples", 4]
    common += ["--output_dir", "out", "--lr_scheduler_type", "constant", *SAVING]
    return lambda *flags: tool(*common, *flags)


# ---- What is never lost ----


@pytest.fixture
def used(place: Path) -> Path:
    """The folder of a run, which holds what later runs may read, and links that lead there."""
    for name in ("out", "out/keep", "elsewhere", "linked"):
        (place / name).mkdir()
    for name in ("out/run.json", "out/texts.txt", "out/settings.yaml", "out/keep/config.json", "elsewhere/config.json"):
        (place / name).write_text("{}")
    (place / "link").symlink_to("out")
    (place / "out" / "away").symlink_to("../elsewhere")
    (place / "linked" / "model.safetensors").symlink_to("../out/keep/config.json")
    return place / "out"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("teacher", "out/keep"),
        ("teacher", "out/../out/keep"),
        ("teacher", "missing/../out/keep/."),
        ("teacher", "{}/out/keep"),
        ("teacher", "link/keep"),
        ("teacher", "out"),
        ("teacher", "link"),
        ("teacher", "out/away"),  # only the link is in the folder, but without it nothing is found
        ("teacher", "out/away/../elsewhere"),
        ("teacher", "."),  # it would lose a part
        ("teacher", "linked"),  # a link in it leads into the folder
        ("student", "elsewhere/../out/keep"),
        ("train_file", "link/texts.txt"),
        ("train_file", "ou?/*.txt"),
        ("train_file", "**/texts.txt"),
        ("eval_file", "elsewhere/../out/texts.txt"),
        ("dataset_name", "link/keep"),
        ("cache_dir", "link/../out/cache"),
        ("cache_dir", "out"),
        ("config", "link/settings.yaml"),
        ("fsdp_config", "link/settings.yaml"),
    ],
)
@pytest.mark.parametrize("output", ["out", "link", "elsewhere/../out/", "{}/link"])
def test_nothing_that_a_run_reads_is_replaced_however_it_is_spelled(
    flag: str, value: str, output: str, used: Path
) -> None:
    from fastkd.train.common.errors import InputError

    value, output = (text.format(used.parent) for text in (value, output))
    cache = Path(value) if flag == "cache_dir" else Path("cache")
    flags = FastkdArguments(transformers_flags={flag: value})
    setattr(flags, flag, value)
    before = files(used.parent)
    with pytest.raises(InputError, match=rf"--{flag} .* --output_dir .*, which the run replaces: choose another place"):
        folders.check_outside(Path(output), flags, cache, True)
    assert files(used.parent) == before


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("teacher", "out/../elsewhere"),
        ("teacher", "google/flan-t5-small"),
        ("teacher", "outer"),
        ("train_file", "elsewhere/*"),
        ("config", "out"),  # ours, as there is no such file
        ("cache_dir", "."),  # artefacts have folders of their own
    ],
)
def test_what_lies_elsewhere_is_read(flag: str, value: str, used: Path) -> None:
    flags = FastkdArguments()
    setattr(flags, flag, value)
    folders.check_outside(Path("out"), flags, Path(value if flag == "cache_dir" else "cache"), True)


def test_a_run_in_the_folder_of_another_is_not_replaced_with_it(used: Path) -> None:
    from fastkd.train.common.errors import InputError

    (used / "previous-run").mkdir()
    (used / "previous-run" / "run.json").write_text("{}")
    assert folders.is_used(FastkdArguments(overwrite_output_dir=True), used, False)
    (used / "keep" / "run.json").write_text("{}")
    with pytest.raises(InputError, match=r"out holds another run, .*keep: move that, or give another folder"):
        folders.is_used(FastkdArguments(overwrite_output_dir=True), used, False)


def test_a_run_is_continued_by_the_settings_in_its_folder(used: Path) -> None:
    folders.check_outside(Path("out"), FastkdArguments(config="out/settings.yaml"), Path("cache"), False)


def test_the_teacher_in_the_old_run_stays(
    tool: Callable[..., int],
    distil: Callable[..., int],
    text_file: Path,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(place / "t5", place / "out" / "keep")
    (place / "out" / "keep" / "run.json").write_text("{}")
    before = files(place)
    assert distil("--output_dir", "out/keep", "--overwrite_output_dir", "--teacher", "out/../out/keep") == 2
    assert "--teacher out/../out/keep lies in --output_dir out/keep" in one_line(capsys)
    assert files(place) == before
    demo = ["--demo", "--method", "kd", "--teacher", "out/../out/keep", "--train_file", text_file]
    (place / "out" / "demo.json").write_text("{}")
    assert tool(*demo, "--output_dir", "out") == 2
    assert "lies in --output_dir out" in one_line(capsys)
    shutil.copytree(place / "out" / "keep", place / "parts" / "student")
    assisted = ["--interpolated", "--method", "mlmkd", "--teacher", "parts/student", "--output_dir", "parts"]
    assert distil(*assisted, "--overwrite_output_dir") == 2
    assert "lies in --output_dir parts" in one_line(capsys)
    assert files(place / "out" / "keep") == {
        name.removeprefix("out/keep/"): content for name, content in before.items() if name.startswith("out/keep/")
    }


# ---- What is replaced ----


@pytest.mark.parametrize(
    ("held", "flags", "message"),
    [
        ("out/model.safetensors", [], "out already holds files: give --resume_from_checkpoint last, --overwrite_"),
        ("out/assistant/run.json", [], "out/assistant already holds files: give --resume"),
        ("out/student/run.json", [], "out/student already holds files: give --resume"),
        ("out/run.json", ["--overwrite_output_dir"], "out holds more than assistant and student (run.json): give"),
        ("out/run.json", RESUME, "nothing to resume from: out holds no run"),
        ("elsewhere/run.json", RESUME, "nothing to resume from: out holds no run"),
        ("out/run.json", ["--resume_from_checkpoint", "out"], "with --resume_from_checkpoint last: it finds"),
    ],
)
def test_a_run_of_two_parts_refuses_a_used_folder_as_others_do(
    held: str,
    flags: list[str],
    message: str,
    distil: Callable[..., int],
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (place / held).parent.mkdir(parents=True)
    (place / held).write_text("{}")
    before = files(place)
    assert distil("--method", "mlmkd", "--interpolated", *flags) == 2
    assert message in one_line(capsys)
    assert files(place) == before


def fail() -> None:
    raise RuntimeError("a mistake")


def test_the_old_run_is_there_until_the_new_one_is(
    scratch: Callable[..., int], place: Path, disturb: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert scratch() == 0
    out, again = place / "out", [*SAVING, "--overwrite_output_dir", "--seed", 7]
    (out / "notes.txt").write_text("what a user wrote")
    before = files(out)
    seen: list[Any] = []
    disturb(1, lambda: seen.append(files(out / "previous-run")))
    capsys.readouterr()
    # Before its first checkpoint, what it replaces comes back, whatever ends it.
    assert scratch(*again, "--learning_rate", "1e30", "--embedding_learning_rate", "1e30", "--warmup_steps", 0) == 1
    assert seen == [before] and files(out) == before
    assert "no checkpoint was saved; what out held before is there again" in one_line(capsys)
    disturb(2, fail)
    with pytest.raises(RuntimeError, match="a mistake"):
        scratch(*again)
    assert files(out) == before
    disturb(1, lambda: signal.raise_signal(signal.SIGTERM))
    assert scratch(*again, "--save_strategy", "no") == 143
    assert files(out) == before and "there again" in one_line(capsys)
    # With a checkpoint, the new run is what is continued, and the old one waits.
    disturb(3, fail)
    with pytest.raises(RuntimeError, match="a mistake"):
        scratch(*again)
    assert files(out / "previous-run") == before and (out / "checkpoint-2").is_dir()
    disturb(99, fail)
    assert scratch(*SAVING, "--seed", 7, *RESUME) == 0
    assert not (out / "previous-run").exists() and json.loads((out / "run.json").read_text())["seed"] == 7
    assert (out / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert (out / "notes.txt").read_bytes() == before["notes.txt"]


def test_a_demo_that_fails_leaves_the_one_before(
    distil: Callable[..., int], place: Path, disturb: Callable[..., None]
) -> None:
    (place / "out" / "student").mkdir(parents=True)
    for name in ("demo.json", "student/config.json", "notes.txt"):
        (place / "out" / name).write_text("{}")
    before, seen = files(place / "out"), []

    def fail_later() -> None:
        seen.append(files(place / "out" / "previous-run"))
        fail()

    disturb(1, fail_later)
    with pytest.raises(RuntimeError, match="a mistake"):
        distil("--demo")
    assert seen == [before] and files(place / "out") == before


@pytest.mark.parametrize("moves", range(6))
def test_a_kill_while_files_move_loses_none(moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three files on their way aside, or back."""
    out = tmp_path / "out"
    (out / "deep").mkdir(parents=True)
    for name in ("run.json", "model.safetensors", "deep/file"):
        (out / name).write_text(name)
    before, rename, left = files(out), Path.rename, [moves]

    def killed(self: Path, target: Path) -> Path:
        if not left[0]:
            raise SystemExit  # nothing below catches it
        left[0] -= 1
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(SystemExit):
            folders._set_aside(out)
            (out / "run.json").write_text("of the new run")
            folders._bring_back(out)
    flags = FastkdArguments(overwrite_output_dir=True)
    assert folders.is_used(flags, out, False)
    held = files(out) if (out / "model.safetensors").exists() else files(out / "previous-run")
    assert held == before
    with pytest.raises(KeyError), folders.running(out, True, {}, ""):
        raise KeyError
    held = files(out) if (out / "model.safetensors").exists() else files(out / "previous-run")
    assert held == before


@pytest.mark.parametrize("is_there", [True, False])
def test_an_output_folder_that_is_a_link(is_there: bool, scratch: Callable[..., int], place: Path) -> None:
    if is_there:
        (place / "disk").mkdir()
    (place / "out").symlink_to("disk")
    for more in ([], ["--overwrite_output_dir"]):
        assert scratch(*more) == 0
        assert (place / "out").is_symlink() and (place / "disk" / "model.safetensors").is_file()
        assert not (place / "disk" / "previous-run").exists()


def test_a_folder_whose_name_not_every_library_can_write_is_refused_at_once(
    scratch: Callable[..., int], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in ("--output_dir", "--cache_dir"):
        name = os.fsdecode(b"l\xe4ufe")  # as under a locale of one byte a letter
        assert scratch(flag, name) == 2
        assert f"{flag} l" in (line := one_line(capsys)) and "LC_ALL=C.UTF-8" in line
        assert not list(place.iterdir())


def test_two_runs_do_not_write_to_one_folder(
    scratch: Callable[..., int], place: Path, disturb: Callable[..., None]
) -> None:
    """Both found it empty, or resumed it; no lock stays behind."""
    message = "another run is writing to out: give another folder, or wait for its end"

    def meanwhile() -> None:
        with pytest.raises(InputError, match=message), folders.running(Path("out"), False, {}, ""):
            raise AssertionError

    disturb(3, meanwhile)
    assert scratch() == 0
    before = files(place / "out")
    os.close(folders._locked(Path("out")))
    assert files(place / "out") == before


# ---- What is continued ----


def test_a_resumed_run_must_read_the_same_however_it_is_spelled(
    distil: Callable[..., int],
    saved: Callable[..., Path],
    tiny: Callable[..., Any],
    text_file: Path,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(place / "t5", place / "copy")
    assert distil() == 0
    assert distil(*RESUME, "--max_steps", 5, "--teacher", place / "copy", "--train_file", "./texts.txt") == 0
    assert distil(*RESUME, "--max_steps", 6, "--teacher", "./t5/") == 0
    before = files(place / "out")

    def refused(*more: Any) -> str:
        capsys.readouterr()
        assert distil(*RESUME, "--max_steps", 8, *more) == 2
        assert files(place / "out") == before
        return capsys.readouterr().err.splitlines()[-1]

    saved(tiny(seed=5), place / "other")
    start = "fastkd-train: cannot resume: the run was started with "
    assert refused("--teacher", "other") == f"{start}another teacher: t5, now it is other"
    shutil.copy(place / "other" / "model.safetensors", place / "t5" / "model.safetensors")
    assert refused() == f"{start}another teacher: t5 as it was then, now it holds something else"
    shutil.copy(place / "copy" / "model.safetensors", place / "t5" / "model.safetensors")
    with open("texts.txt", "a", encoding="utf-8") as file:
        file.write("\n\nAnd one more.")
    assert refused() == f"{start}another train_file: texts.txt as it was then, now it holds something else"
    shutil.copy(text_file, "texts.txt")
    assert refused("--temperature", 3) == f"{start}temperature None, now it is 3.0"
    assert refused("--eval_file", "texts.txt") == f"{start}another eval_file: nothing, now it is texts.txt"


def test_a_resumed_run_goes_by_its_own_flags_and_warns_of_none(
    scratch: Callable[..., int], place: Path, monkeypatch: pytest.MonkeyPatch, trainers: list[Any]
) -> None:
    """Shares of all steps are no other intervals, nor is a step another that is divided otherwise."""
    shares = ["--save_strategy", "steps", "--save_steps", 0.5, "--logging_steps", 0.25, "--eval_steps", 0.5]
    best = ["--load_best_model_at_end", "--lr_scheduler_type", "constant"]
    assert scratch(*shares, *best) == 0
    shutil.rmtree(place / "out" / "checkpoint-4")
    (place / "out").rename(place / "moved")
    warned: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda self, *words: warned.append(words[0]), raising=False)
    monkeypatch.setattr(logging.getLogger("transformers.trainer"), "warning", lambda *words: warned.append(words[0]))
    again = [*RESUME, *best, "--save_strategy", "steps", "--output_dir", "moved", "--max_steps", 5]
    divided = ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
    assert scratch(*again, *divided, "--save_steps", 1, "--eval_steps", 1, "--logging_steps", 2) == 0
    assert warned == []
    log = trainers[-1].state.log_history
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [2, 3, 4, 5]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 4]
    assert (place / "moved" / "checkpoint-5").is_dir()
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    assert trainers[-1].state.best_global_step == min(losses, key=losses.__getitem__)


def test_the_best_checkpoint_of_a_run_that_was_moved(tmp_path: Path) -> None:
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / "shards").mkdir(parents=True)
        was = {"best_global_step": 2, "best_model_checkpoint": "out/checkpoint-2", "train_batch_size": 3}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(was))
    before = files(tmp_path)
    for best in (str(tmp_path / "checkpoint-2"), None):
        with continued(tmp_path / "checkpoint-4", SimpleNamespace(train_batch_size=5)) as checkpoint:
            state = json.loads((checkpoint / "trainer_state.json").read_text())
            assert (state["best_model_checkpoint"], state["train_batch_size"]) == (best, 5)
            assert (checkpoint / "shards").is_dir()
        assert not checkpoint.exists() and (tmp_path / "checkpoint-4" / "shards").is_dir()
        if best:
            assert files(tmp_path) == before
            shutil.rmtree(best)


def test_a_flag_that_came_with_an_upgrade_resumes_at_its_default(
    scratch: Callable[..., int], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scratch(*SAVING, "--lr_scheduler_type", "constant") == 0
    record = place / "out" / "run.json"
    was = json.loads(record.read_text())
    for name in ("cka_over_processes", "max_train_examples", "contents"):  # as if they had not been there
        del was[name]
    record.write_text(json.dumps(was))
    flags = [*SAVING, "--lr_scheduler_type", "constant", *RESUME, "--max_steps", 5]
    capsys.readouterr()
    assert scratch(*flags, "--max_train_examples", 7) == 2
    assert one_line(capsys).endswith("cannot resume: the run was started with max_train_examples None, now it is 7")
    assert scratch(*flags) == 0
    record.unlink()
    assert scratch(*flags) == 2
    assert "out has no run.json, which says how the run was started" in capsys.readouterr().err


def test_a_run_beyond_the_steps_asked_for_stays_as_it_is(
    scratch: Callable[..., int], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scratch(*SAVING) == 0
    before = files(place / "out")
    epochs = ["--max_steps", -1, "--num_train_epochs", 0.01]
    for more, words in ((["--max_steps", 2], "--max_steps 2"), (epochs, "--num_train_epochs 0.01")):
        capsys.readouterr()
        assert scratch(*SAVING, *RESUME, *more) == 2
        assert "nothing to resume" in (line := one_line(capsys)) and words in line
        assert files(place / "out") == before


def test_an_interrupt_recommends_only_what_can_be(
    scratch: Callable[..., int], place: Path, disturb: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def twice() -> None:
        raise KeyboardInterrupt

    for step, words in ((2, "; no checkpoint was saved"), (4, "; --resume_from_checkpoint last")):
        disturb(step, twice)
        assert scratch(*SAVING, *(["--overwrite_output_dir"] if step == 4 else [])) == 130
        assert words in one_line(capsys)
    disturb(99, twice)
    assert scratch(*SAVING, *RESUME) == 0


# ---- What a teacher answers, and what is reported ----


def test_a_teacher_answers_once(
    distil: Callable[..., int],
    saved: Callable[..., Path],
    tiny: Callable[..., Any],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    cache = ["--cache_dir", "cache"]  # in which there is no answer yet
    judge = teachers.judge

    def counted(*given: Any) -> Any:
        asked.append(given[-1])
        return judge(*given)

    for stage in (teachers, students):
        monkeypatch.setattr(stage, "judge", counted)
    assert distil(*cache) == 0
    assert asked == ["teacher", "kd"]
    first = json.loads((place / "out" / "metrics.json").read_text())["models"][0]
    for more in (["--output_dir", "out", *RESUME, "--max_steps", 5], ["--output_dir", "b", "--seed", 3]):
        asked.clear()
        assert distil(*cache, "--teacher", "./t5", *more) == 0
        assert asked == ["kd"]
        again = json.loads((place / str(more[1]) / "metrics.json").read_text())["models"][0]
        assert {**again, "cost": None} == {**first, "cost": None}
    saved(tiny(seed=4), place / "t5")
    for more in ([], ["--max_eval_examples", 3], ["--report_examples", 2]):
        asked.clear()
        assert distil(*cache, *more, "--output_dir", "c", "--overwrite_output_dir") == 0
        assert asked == ["teacher", "kd"], more


class Tracker(TrainerCallback):
    """Takes down, as wandb would, which model's log comes while which of its runs is open."""

    runs: list[tuple[str | None, set[int]]]

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.runs or self.runs[-1] is None:
            self.runs.append((args.run_name, set()))
        self.runs[-1][1].add(state.max_steps)

    @classmethod
    def finish(cls) -> None:
        cls.runs.append(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--train_teacher", "--teacher_steps", 3], [("mine", {4})]),
        (["--teacher", "t5", "--interpolated"], [("mine, assistant", {4}), ("mine, student", {4})]),
    ],
)
def test_a_trackers_run_is_of_one_model(
    flags: list[Any],
    expected: list[Any],
    tool: Callable[..., int],
    saved: Callable[..., Path],
    tiny: Callable[..., Any],
    text_file: Path,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the student; the teacher's training and answers are not reported."""
    monkeypatch.setattr(Tracker, "runs", [], raising=False)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    monkeypatch.setitem(sys.modules, "wandb", Tracker)
    saved(tiny(64, layers=2), place / "t5")
    flags = ["--method", "mlmkd", *flags, "--report_to", "wandb", "--run_name", "mine"]
    assert tool(*flags, "--train_file", text_file, "--max_eval_examples", 4, "--output_dir", "out") == 0
    assert [run for run in Tracker.runs if run] == expected and Tracker.runs[-1] is None


@pytest.mark.parametrize(
    ("task", "flags", "sources", "prefix"),
    [
        ("text2text", {}, ["fatal error: a", "fatal error: b"], ""),
        ("text2text", {"source_prefix": "q: "}, ["q: a: b"], "q: "),
        ("classification", {}, ["note: a"], ""),
        ("span_corruption", {}, ["span_corruption x: a"], ""),
        ("summarization", {}, ["summarize: note: a"], "summarize: "),
        ("summarization", {"source_prefix": ""}, ["summarize: a"], ""),
        ("translation", {}, ["translate English to Old Norse: note: a"], "translate English to Old Norse: "),
        ("sst2", {}, ["sst2 sentence: note: a"], "sst2 sentence: "),
        ("mrpc", {}, ["mrpc sentence1: a sentence2: b"], "mrpc sentence1: "),
        ("glue", {}, ["sst2 sentence: a", "sst2 sentence: b"], ""),
    ],
)
def test_a_source_prefix_is_the_tasks_or_the_users(
    task: str, flags: dict[str, str], sources: list[str], prefix: str
) -> None:
    data = SimpleNamespace(task=TASKS[task], held_out_rows={"source": sources})
    assert left._source_prefix(SimpleNamespace(flags=FastkdArguments(**flags), data=data)) == prefix


# ---- Disks, locales and other processes ----


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "Error writing bytes to file"),
        OSError(errno.EROFS, "Read-only file system", "some/file"),
        ValueError("I/O error: File too large (os error 27)"),
    ],
)
@pytest.mark.parametrize(
    ("room", "stage", "flag"),
    [(prepared, "with_data", "--cache_dir cache"), (reports, "write", "--output_dir out")],
)
def test_a_disk_that_takes_no_more_is_named_by_its_flag(
    error: Exception,
    room: Any,
    stage: str,
    flag: str,
    scratch: Callable[..., int],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(room, stage, full)
    assert scratch("--cache_dir", "cache", "--max_steps", 1, "--eval_strategy", "no") == 1
    line = one_line(capsys)
    assert line.startswith(f"fastkd-train: cannot write to {flag}")
    assert any(words in line for words in ("No space left", "Read-only file system", "File too large"))
    assert "some/file" in line or getattr(error, "filename", None) is None


def test_errors_that_are_no_disks_stay_what_they_are() -> None:
    for error in (ValueError("a mistake"), FileNotFoundError(errno.ENOENT, "No such file", "x"), OSError("odd")):
        with pytest.raises(type(error)) as caught, writing("output_dir", "out"):
            raise error
        assert caught.value is error


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").write_text("old")
    (tmp_path / "link").symlink_to("real")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="Input/output"):
            replace_folder(tmp_path / "link", lambda made: (made / "new").write_text("new"))
    assert files(tmp_path / "real") == {"old": b"old"} and len(list(tmp_path.iterdir())) == 2
    replace_folder(tmp_path / "link", lambda made: (made / "new").write_text("new"))
    assert (tmp_path / "link").is_symlink() and [path.name for path in (tmp_path / "real").iterdir()] == ["new"]


def test_letters_that_the_terminal_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    processes.print_by_first_only()
    print("läufe", flush=True)
    assert written.getvalue() == b"l\\xe4ufe\n"


def test_other_processes_are_waited_for_as_long_as_the_flag_says(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(processes, "_patient", {})
    monkeypatch.setattr(processes, "_patience", None)
    monkeypatch.setattr(processes.dist, "new_group", lambda **options: made.append(options["timeout"]))
    processes.be_patient(7, on_cpus=True)  # alone, with nobody to wait for
    processes.patient_group()
    assert made == [timedelta(seconds=7)]


def test_what_is_pruned_is_a_teacher_whatever_the_method() -> None:
    flags = ["--method", "scratch", "--student_init", "prune", "--train_file", "x", "--use_cpu"]
    with pytest.raises(InputError, match="--method scratch with --student_init prune needs a teacher: give --teacher"):
        parse(flags)
