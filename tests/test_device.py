"""What fifteen minutes with a GPU are used for keeps its limits, whatever a phase does; and it can be rehearsed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.device import __main__ as device
from benchmarks.device import carried, checks, prepare, results
from benchmarks.device.lines import Lines, read
from benchmarks.device.phases import PHASES, RUNS
from benchmarks.device.pool import Worker, answers
from benchmarks.device.watchdog import Log
from tests import device_phases
from tests.cases import LOGIT_KL, Op
from tests.place import Place

ROOT = Path(__file__).parents[1]


def run(out: Path, phases: list, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(device, "gpu", lambda: (None, "90"))
    monkeypatch.setattr(device.carried, "to_be_built", lambda: False)
    return device.main(["--run", "right", "--out", str(out), "--carried", str(out / "none")], phases)


def test_a_phase_that_fails_takes_no_other_with_it(tmp_path: Path, monkeypatch, capsys) -> None:
    names = ("dies", "raises", "wrong", "skips", "hangs", "works")
    phases = [replace(phase, seconds=3) if phase.name == "hangs" else phase for phase in device_phases.of(*names)]
    assert run(tmp_path, phases, monkeypatch) == 1
    said = capsys.readouterr().out
    verdicts = dict(re.findall(r"^(\w+) +(\S.*?) +\d+ s of \d+$", said, re.MULTILINE))
    assert verdicts == {
        "dies": "DIED of SIGSEGV", "raises": "WRONG", "wrong": "WRONG", "skips": "skipped", "hangs": "OUT OF TIME",
        "works": "ok",
    }  # fmt: skip
    for text in ("  ValueError: broken", "  two: is wrong", "  it is not here", "works: ok, "):
        assert f"\n{text}" in said.split("\n\n")[-1], text
    lines = read(tmp_path / "right.jsonl")
    assert {"phase": "dies", "kind": "check", "case": "before it died", "problem": None} in lines
    assert [line["phase"] for line in lines if line["kind"] == "end"] == list(names)
    (child,) = [line["pid"] for line in lines if line["kind"] == "child"]
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)
    log = (tmp_path / "right.log").read_text()
    assert "Traceback" in log and log.index("==== raises") < log.index("ValueError: broken") < log.index("==== wrong")
    assert {path.name for path in tmp_path.iterdir()} == {"right.jsonl", "right.log"}


def alive(process: int) -> bool:
    """Whether it runs; one that has ended may wait for its parent."""
    stat = Path(f"/proc/{process}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_log_that_is_flooded_stays_small(tmp_path: Path, monkeypatch) -> None:
    assert run(tmp_path, device_phases.of("floods", "works", seconds=5), monkeypatch) in (0, 1)
    log = (tmp_path / "right.log").read_text()
    assert len(log) < 300_000
    first = log.index("the first line")
    assert first < log.index(" lines were cut here") < log.index("==== works") < log.index("said by what works")


def kept(lines: list[str], tmp_path: Path, **sizes: int) -> list[str]:
    path = tmp_path / "log"
    with path.open("w") as file:
        log = Log(file, **sizes)
        for line in lines:
            log.write(line)
        log.close()
    return path.read_text().splitlines()


def test_a_log_keeps_both_ends(tmp_path: Path) -> None:
    lines = kept([f"{i:09}" for i in range(1000)], tmp_path, first=100, last=50)
    assert lines == [*(f"{i:09}" for i in range(10)), "    ... 985 lines were cut here",
                     *(f"{i:09}" for i in range(995, 1000))]  # fmt: skip
    assert kept(["z" * 100_000], tmp_path) == ["z" * 480 + " ... (100000 characters)"]


def test_dumps_of_compilers_are_shortened(tmp_path: Path) -> None:
    """What Triton prints where a pass fails, with what is said around it."""
    dump = ["#blocked = #ttg.blocked<{sizePerThread = [1, 4]}>", "module attributes {}  {", "  tt.func public @f() {"]
    dump += [f"    %{i} = arith.addi %1, %2 : i32" for i in range(580)] + ["    tt.return", "  }", "}"]
    lines = kept(["kernel.py:7:0: error: Failures", *dump, "RuntimeError: PassManager::run failed"], tmp_path)
    assert lines == ["kernel.py:7:0: error: Failures", *dump[:5],
                     f"    ... {len(dump) - 5} more lines of a compiler's dump",
                     "RuntimeError: PassManager::run failed"]  # fmt: skip


def test_lines_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for phase in ("a", "b"):
        Lines(path, phase).write("begin")
        Lines(path, phase).write("check", case=phase)
    with path.open("a") as file:
        file.write('{"phase": "b", "kind"')
    assert [line["phase"] for line in read(path)] == ["a", "a", "b", "b"]
    path.write_text(path.read_text().rpartition("\n")[0] + "\n")
    Lines(path, "a").write("begin")  # once more
    assert [(line["phase"], line["kind"]) for line in read(path)] == [("b", "begin"), ("b", "check"), ("a", "begin")]
    assert read(tmp_path / "none") == []


WORKER = """
import json, os, sys, time
print(json.dumps({"problem": None}), flush=True)
for line in sys.stdin:
    case = line.strip()
    if case == "dies": os._exit(3)
    if case == "hangs": time.sleep(600)
    print(json.dumps({"problem": "CUDA error: spoilt" if case == "spoils" else None, "pid": os.getpid()}), flush=True)
"""


def test_a_case_that_dies_or_hangs_is_one_case() -> None:
    cases = ["one", "dies", "two", "spoils", "three", "hangs", "four"]
    found = list(answers(cases, lambda: Worker([sys.executable, "-c", WORKER]), 1, 1.0, time.monotonic() + 60))
    assert [answer["case"] for answer in found] == cases
    by_name = {answer["case"]: answer for answer in found}
    assert [by_name[name]["problem"] for name in ("dies", "spoils", "hangs")] == [
        "died: exit code 3", "CUDA error: spoilt", "hangs: no answer in 1 s",
    ]  # fmt: skip
    assert len({by_name[name]["pid"] for name in ("one", "two", "three", "four")}) == 4
    assert by_name["two"]["pid"] == by_name["spoils"]["pid"]
    late = answers(cases, lambda: Worker([sys.executable, "-c", WORKER]), 2, 1.0, time.monotonic() - 1)
    assert list(late) == []


# ---- what is checked -------------------------------------------------------------------------------------------------


def found_of(function, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What is said of an op that is logit_kl, but for its function."""
    monkeypatch.setitem(checks.BY_NAME, "made up", Op("made up", function, LOGIT_KL.make, LOGIT_KL.student))
    return checks.examine(checks.Case("made up", "", "float32", "forward_kl"), Place(torch.device("cpu")))["problem"]


def off_by_a_thousandth(impl: str, **arguments) -> torch.Tensor:
    loss = LOGIT_KL.function(impl=impl, **arguments)
    return loss if impl == "reference" else loss + 1e-3 * arguments["student_logits"].square().mean()


def never_the_same(impl: str, **arguments) -> torch.Tensor:
    loss = LOGIT_KL.function(impl=impl, **arguments)
    return loss if impl == "reference" else loss * (1 + 5e-7 * torch.rand(()))


def not_written(impl: str, **arguments) -> torch.Tensor:
    """Half of what it adds is whatever was in memory, most often zeros."""
    loss = LOGIT_KL.function(impl=impl, **arguments)
    return loss if impl == "reference" else loss + torch.where(torch.empty(()).isnan(), float("nan"), 0.0)


def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found_of(LOGIT_KL.function, monkeypatch) is None
    assert re.match(r"0: error \S+ over \S+; 1: error", found_of(off_by_a_thousandth, monkeypatch) or "")
    assert (found_of(never_the_same, monkeypatch) or "").startswith("repeats differ")
    assert "0: error inf" in (found_of(not_written, monkeypatch) or "")


def test_every_op_and_divergence_is_a_case() -> None:
    names = [case.name for case in checks.cases("triton", False)]
    assert len(names) == len(set(names)) == 3 * (6 * 6 + 1) + 7
    assert names[0].endswith("bfloat16; forward_kl")
    assert all(checks.Case(*name.split("; ")).name == name for name in names)
    assert {case.op for case in checks.cases("cuda", False)} == {"logit_kl", "linear_kl"}


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_two_runs_fit_in_fifteen_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    """With what a machine takes to start twice, two to three minutes; and every phase is a function."""
    sums = {run: sum(phase.seconds for phase in PHASES if phase.run == run) for run in RUNS}
    assert sums["right"] <= 330 and sums["peers"] <= 340
    assert device.main(["--list"]) == 0
    assert re.findall(r"^(\w+): (\d+) s$", capsys.readouterr().out, re.MULTILINE) == [
        (name, str(seconds)) for name, seconds in sums.items()
    ]
    for phase in PHASES:
        module, function = phase.function.split(":")
        assert re.search(rf"^def {function}\(here: Here\) -> bool:", Path(ROOT, *module.split(".")).with_suffix(
            ".py").read_text(), re.MULTILINE), phase.name  # fmt: skip


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert device.main(["--run", "right", "--out", str(tmp_path)]) == 2
    assert re.fullmatch(r"benchmarks.device: no GPU is visible to torch \S+\n", capsys.readouterr().out)
    assert not list(tmp_path.iterdir())


def test_what_came_back_becomes_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def result(title: str, **ours: float) -> dict:
        return {"problem": title, "rows": {"fastkd": ours}}

    for run_name, phase, title, time_s in (("right", "times", "a", 2.0), ("right", "times", "b", 3.0),
                                           ("peers", "logit", "a", 1.0), ("peers", "cka", "b", None)):  # fmt: skip
        ours = {} if time_s is None else {"min_s": time_s}
        Lines(tmp_path / f"{run_name}.jsonl", phase).write("result", result=result(title, **ours))
    assert results.publish(tmp_path, tmp_path) == 1 and "needs the phase versions" in capsys.readouterr().out
    machine = {"gpu": "NVIDIA H000", "versions": {}}
    right = Lines(tmp_path / "right.jsonl", "versions")
    right.write("machine", machine=machine, device="cuda")
    Lines(right.path, "limits").write("limit", limit="copy", unit="GB/s", rate=4000.0)
    assert results.publish(tmp_path, tmp_path) == 0
    record = json.loads((tmp_path / "nvidia-h000.json").read_text())
    assert record["device"] == "cuda" and record["machine"] == machine
    assert record["limits"] == [{"limit": "copy", "unit": "GB/s", "rate": 4000.0}]
    assert [(x["problem"], x["rows"]["fastkd"]["min_s"]) for x in record["results"]] == [("a", 1.0), ("b", 3.0)]
    right.write("begin", rehearsed=True)
    assert results.publish(tmp_path, tmp_path) == 1 and "holds a rehearsal" in capsys.readouterr().out


@pytest.mark.long
def test_rehearsal(tmp_path: Path) -> None:
    """The phases that need no compiler of torch's: kernels in Triton's interpreter, times on the CPU."""
    names = ["versions", "triton", "cuda", "limits", "times"]
    command = [sys.executable, "-m", "benchmarks.device", "--rehearse", "--only", *names, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout.split("\n\n")[-1]
    assert re.search(r"^triton: ok, \d+ s; 7 right, 0 wrong, 0 not reached", text, re.MULTILINE), text
    assert re.search(r"^cuda: (ok|skipped), ", text, re.MULTILINE) and "cka_loss N 200" in text


# ---- what is carried -------------------------------------------------------------------------------------------------


def test_what_was_carried_is_put_where_it_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carried, "ROOT", tmp_path / "root")
    monkeypatch.setattr(carried, "CACHE", tmp_path / "cache")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("PYTHONPATH", "before")
    (tmp_path / "root" / "fastkd").mkdir(parents=True)
    notes, _ = carried.unpacked(tmp_path / "none")
    assert notes == [f"carried: nothing, as nothing is in {tmp_path / 'none'}"]
    folder = tmp_path / "carried"
    (folder / "triton" / "KEY").mkdir(parents=True)
    (folder / "triton" / "KEY" / "rows_kernel.cubin").write_bytes(b"binary")
    (folder / "wheels").mkdir()
    with zipfile.ZipFile(folder / "wheels" / "peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("peer/__init__.py", "")
    (folder / carried.EXTENSION).write_bytes(b"\x7fELF .nv_fatbin")
    notes, _ = carried.unpacked(folder, for_gpu=False)
    assert notes == ["carried: peer-1.0, 1 binaries of Triton"] and not carried.built_extensions()
    notes, variables = carried.unpacked(folder)
    assert notes == ["carried: peer-1.0, the compiled extension, 1 binaries of Triton"]
    assert variables["TRITON_CACHE_DIR"] == str(tmp_path / "cache")
    assert (tmp_path / "cache" / "KEY" / "rows_kernel.cubin").read_bytes() == b"binary"
    site, before = variables["PYTHONPATH"].split(":")
    assert (Path(site) / "peer" / "__init__.py").is_file() and before == "before"
    assert not carried.to_be_built()  # one with CUDA is there


def test_what_cannot_be_had_is_said(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    def made(folder: Path) -> str:
        (folder / "file").write_bytes(bytes(2**20))
        return "one file"

    def refused(folder: Path) -> str:
        return prepare._run(sys.executable, "-c", "raise SystemExit('error: no such package')")

    monkeypatch.setattr(prepare, "PARTS", (refused, made))
    assert prepare.prepare(tmp_path) == 1
    said = capsys.readouterr().out
    assert re.match(r"refused +could not be had: error: no such package \(\d s\)\nmade +one file \(\d s\)\n", said)
    assert said.endswith(f"{tmp_path}: 1.0 MiB\n")
    monkeypatch.setattr(prepare, "PARTS", (made,))
    assert prepare.prepare(tmp_path) == 0
    monkeypatch.setattr(prepare, "MOST", 1000)
    assert prepare.prepare(tmp_path) == 1


@pytest.mark.long
def test_kernels_are_compiled_ahead(tmp_path: Path) -> None:
    """Without a GPU and without a launch, and are found again by their names, which another Triton's are not."""
    triton = pytest.importorskip("triton")
    there, other = Path(triton.__file__).parents[1], tmp_path / "other"
    shutil.copytree(there / "triton", other / "triton", copy_function=os.symlink)
    changed = other / "triton" / "runtime" / "cache.py"
    changed.unlink()
    changed.write_text((there / "triton" / "runtime" / "cache.py").read_text() + "# another Triton\n")
    cases = "cka_loss 0\nlogit_kl; triton; float32; forward_kl\n"
    counts = []
    for folder in (there, there, other):
        environment = {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "0",
                       "FASTKD_TRITON_THERE": str(folder)}  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.device.ahead"], input=cases, cwd=ROOT, capture_output=True, text=True,
            env=os.environ | environment, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        _, *answers = map(json.loads, done.stdout.splitlines())
        assert [answer["problem"] for answer in answers] == [None, None]
        assert all(answer["launches"] >= 2 for answer in answers)
        counts.append((sum(answer["hits"] for answer in answers), sum(answer["misses"] for answer in answers)))
    (_, compiled), again, elsewhere = counts
    assert compiled >= 3 and again[0] >= compiled and again[1] == 0 and elsewhere[1] == compiled
