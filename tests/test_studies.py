"""Studies go on where they were cut off, and end with a table, a verdict and a figure: on what was measured before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import RESULTS
from benchmarks.studies import demo, minidisc

pytest.importorskip("matplotlib")


def cut_off_after(runs: int, found: Any, seen: list[tuple]) -> Any:
    """A study's `run` that has what was recorded, and is interrupted once."""

    def run(name: str, seed: int, *rest: Any) -> Any:
        if len(seen) == runs and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        seen.append((name, seed))
        return found(name, seed)

    interrupted: list[bool] = []
    return run


def test_minidisc_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((RESULTS / "amd-epyc-1-thread-minidisc.json").read_text())
    seen: list[tuple] = []
    found = cut_off_after(4, lambda arm, order: record["schedules"][arm][order], seen)
    monkeypatch.setattr(minidisc, "run", found)
    monkeypatch.setattr(minidisc, "write_data", lambda folder: [])  # it reads the whole standard library
    out = tmp_path / "out" / "minidisc.json"
    flags = ["--folder", str(tmp_path / "runs"), "--out", str(out), "--steps", "150"]
    with pytest.raises(KeyboardInterrupt):
        minidisc.main(flags)
    assert seen == [("minidisc", 0), ("minidisc", 1), ("minidisc", 2), ("minidisc, all a step", 0)]
    assert minidisc.main(flags) == 0
    assert seen == [(arm, order) for arm in minidisc.ARMS for order in range(3)]
    again = json.loads(out.read_text())
    for key in ("settings", "methods", "correlations", "schedules"):
        assert again[key] == record[key]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "minidisc: 0.146x of maxidisc's operations: met (at most 0.2x)" in capsys.readouterr().out
    # other settings are other runs
    minidisc.main([*flags, "--rate", "2e-3", "--seeds", "1", "--arms", "prune-kd"])
    assert seen[21:] == [("prune-kd", 0)]


def test_demo_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    students = json.loads((RESULTS / "amd-epyc-1-thread-demo.json").read_text())["students"]
    seen: list[tuple] = []
    found = cut_off_after(3, lambda *key: [s for s in students if (s["run"], s["seed"]) == key], seen)
    monkeypatch.setattr(demo, "run", found)
    out = tmp_path / "demo.json"
    flags = ["--folder", str(tmp_path / "runs"), "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        demo.main(flags)
    assert demo.main(flags) == 0
    assert seen == [(name, seed) for seed in range(1, 6) for name in ("demo", "answers")]
    assert json.loads(out.read_text())["students"] == students
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page, told = demo.PAGE.read_text(), capsys.readouterr().out
    assert page.partition(demo.BEGIN)[2].partition(demo.END)[0].strip() in told
    assert told.endswith("ahead of scratch as it must be: met\n")
