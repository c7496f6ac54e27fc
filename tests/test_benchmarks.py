"""The benchmarks run, and their memory meter measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
IMPLEMENTATIONS = ("fastkd", "reference", "torch.compile", "Liger")
LIMITS = {"linear_kl": "bare GEMMs", "logit_kl": "copy"}


def python(*arguments: str | Path) -> str:
    """Runs Python on the arguments, with benchmarks/ importable; its output."""
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("op", LIMITS)
def test_quick_run(op: str, tmp_path: Path) -> None:
    table = python(BENCHMARKS / f"bench_{op}.py", "--quick", "--json", tmp_path / "out.json")
    for name in (*IMPLEMENTATIONS, LIMITS[op]):
        assert f"\n{name} " in table
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["machine"]["versions"]["torch"]
    for result in record["results"]:
        rows = result["rows"]
        assert set(rows) == {*IMPLEMENTATIONS, LIMITS[op]}
        for name in ("fastkd", "reference", LIMITS[op]):
            assert len(rows[name]["samples_s"]) >= 3, rows[name]["note"]
        # every implementation that ran computes the same gradients
        assert all(row["error"] < 1e-5 for name, row in rows.items() if "error" in row)


def test_all_in_one_markdown_table() -> None:
    table = python(BENCHMARKS / "run.py", "--quick", "--markdown", "--only", "logit_kl T 32 V 1000 float32, forward")
    header = next(line for line in table.splitlines() if line.startswith("| implementation"))
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert all(row.count("|") == header.count("|") for row in rows)
    assert any(row.startswith("| fastkd ") for row in rows)


def test_missing_peer_is_a_row() -> None:
    """Without Liger its row says so."""
    code = (
        "import sys, torch, bench_linear_kl as bench\n"
        "from dataclasses import replace\n"
        "from harness import measure\n"
        "from report import report\n"
        "sys.modules.update({'liger_kernel': None, 'liger_kernel.chunked_loss': None})\n"
        "problem = bench.problems(torch.device('cpu'), quick=True)[0]\n"
        "print(report([measure(replace(problem, implementations=('fastkd', 'Liger'), targets=()), 0)]))"
    )
    row = next(line for line in python("-c", code).splitlines() if line.startswith("Liger"))
    assert row.endswith("not installed")


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux resets the high-water mark")
@pytest.mark.parametrize(("temporary", "returned"), [(64, 0), (64, 32), (0, 64), (3, 0)])
def test_peak_memory(temporary: int, returned: int) -> None:
    """The meter sees what a run allocates for a while, and leaves out what it returns."""
    code = (
        "import torch\n"
        "from harness import MIB, peak_memory\n"
        "def ones(mib): return torch.ones(mib * MIB, dtype=torch.uint8)\n"
        "def run():\n"
        f"    kept, passing = ones({returned}), ones({temporary})\n"
        "    return (kept,)\n"
        "run()\n"
        "outputs, peak = peak_memory(run, torch.device('cpu'))\n"
        "assert len(outputs) == 1\n"
        "print(peak)"
    )
    assert abs(float(python("-c", code)) - temporary) < 1 + temporary / 16
