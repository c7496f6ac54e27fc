"""How a command ends that is stopped outside of training, or whose standard output takes no more."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

from fastkd.train import cli
from fastkd.train.runs import prepared
from fastkd.train.stages import judging
from fastkd.train.training.trainer import DistillTrainer

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def _signals_of_a_terminal() -> Iterator[None]:
    """Shells start background jobs with SIGINT ignored, and then it is not ours to handle."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def scratch(
    tool: Callable[..., int], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """scratch("--flag", value, ...): the exit code of a run into `out` of the working directory."""
    monkeypatch.chdir(tmp_path)
    data = ["--train_file", text_file, "--max_eval_examples", 4, "--output_dir", "out"]
    return lambda *flags: tool("--method", "scratch", *data, *flags)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to stderr beside progress bars, which must be one line of ours."""
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line)
    assert line.startswith("fastkd-train: ")
    return line.removeprefix("fastkd-train: ")


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("number", SIGNALS)
def test_before_a_run_begins_it_is_stopped_as_if_it_had_not_been_started(
    number: int,
    scratch: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    handlers = [signal.getsignal(each) for each in SIGNALS]
    identity = prepared.identity

    def stopped(*given: Any) -> Any:
        signal.raise_signal(number)
        return identity(*given)

    monkeypatch.setattr(prepared, "identity", stopped)
    assert scratch("--cache_dir", "cache") == 128 + number
    expected = 'interrupted during "Data: span_corruption"; the same command starts, or resumes, again'
    assert said(capsys) == expected and not (tmp_path / "out").exists()
    cache = names(tmp_path / "cache")
    assert cache and not [name for name in cache if ".making" in name]
    assert [signal.getsignal(each) for each in SIGNALS] == handlers


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("flags", "way"),
    [
        (["--save_strategy", "steps", "--save_steps", 2], "--resume_from_checkpoint last continues"),
        ([], "no checkpoint was saved"),
    ],
)
def test_the_evaluation_at_the_end_is_stopped(
    number: int,
    flags: list[Any],
    way: str,
    scratch: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(judging, "score", lambda *_: signal.raise_signal(number))
    assert scratch(*flags) == 128 + number
    assert said(capsys) == f"interrupted during the evaluation of scratch; {way}"
    assert names(tmp_path / "out") >= {"run.json", "config.yaml"} and not (tmp_path / "out" / "report.md").exists()


@pytest.mark.usefixtures("no_pictures")
def test_the_configuration_of_a_run_that_was_cut_off_continues_it(
    scratch: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(judging, "score", lambda *_: signal.raise_signal(signal.SIGTERM))
        assert scratch("--save_strategy", "steps", "--save_steps", 2) == 143
    assert cli.main(["--config", "out/config.yaml", "--resume_from_checkpoint", "last"]) == 0
    assert names(tmp_path / "out") >= {"model.safetensors", "report.md"}


@pytest.mark.parametrize("name", ["README.md", "metrics.json", "loss_curves.png", "report.html"])
def test_a_file_of_the_report_is_whole_or_absent(
    name: str,
    scratch: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = Path.write_bytes

    def stopped(self: Path, data: bytes) -> int:
        if name in self.name:
            write(self, data[: len(data) // 2])
            signal.raise_signal(signal.SIGTERM)
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", stopped)
    assert scratch() == 143
    assert "; the student in out is whole, not its report; no checkpoint was saved" in said(capsys)
    assert not [found for found in names(tmp_path / "out") if name in found or found.startswith(".")]


@pytest.mark.parametrize("number", SIGNALS[:2])
def test_a_second_signal_in_training_is_a_line_too(
    number: int, scratch: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But of SIGHUP, which both shell and kernel may send."""

    def twice(*_: Any, **__: Any) -> None:
        signal.raise_signal(number)
        signal.raise_signal(number)

    monkeypatch.setattr(DistillTrainer, "training_step", twice)
    assert scratch() == 128 + number
    line = said(capsys)
    assert line.startswith('interrupted during "Student: scratch') and line.endswith("; no checkpoint was saved")


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored(
    scratch: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "check_optimizer", lambda _: signal.raise_signal(signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as by nohup
    try:
        assert scratch("--max_steps", 1) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- Standard output ----


def full() -> TextIO:
    return open("/dev/full", "w", encoding="utf-8")


def unbuffered() -> TextIO:
    return open("/dev/full", "w", buffering=1, encoding="utf-8")


def closed() -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", encoding="utf-8")


@pytest.mark.parametrize("words", [["--list_methods"], ["--help"], ["--version"], ["--help_all"]])
@pytest.mark.parametrize(("stream", "code"), [(full, 1), (unbuffered, 1), (closed, 141)])
def test_what_cannot_be_told_is_one_line_or_none(
    words: list[str],
    stream: Callable[[], TextIO],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with stream() as output:  # closing it would raise again, if anything waited to be written
        monkeypatch.setattr(sys, "stdout", output)
        assert cli.main(words) == code
    if code == 141:
        assert capsys.readouterr().err == ""
    else:
        assert said(capsys) == "could not write to standard output: No space left on device"


def test_a_full_standard_output_of_a_run_is_not_the_fault_of_its_folder(
    scratch: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with unbuffered() as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert scratch() == 1
    assert said(capsys) == "could not write to standard output: No space left on device"
