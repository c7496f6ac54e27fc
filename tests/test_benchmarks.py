"""The benchmarks run, and their memory meter measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROWS = {  # what each op's tables list below fastkd, its limit last
    "attention_kl": ("reference", "torch.compile", "GEMMs"),
    "cka_loss": ("reference", "eager", "torch.compile", "ckatorch", "torch-cka", "five GEMMs"),
    "linear_kl": ("reference", "torch.compile", "Liger", "bare GEMMs"),
    "logit_kl": ("reference", "torch.compile", "Liger", "copy"),
    "relation_kl": ("reference", "torch.compile", "GEMMs"),
    "train_step": ("eager", "both models"),
}
on_linux = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux resets the high-water mark"
)


def python(*arguments: str | Path) -> str:
    """Runs Python on the arguments, with benchmarks/ importable; its output."""
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("op", ROWS)
def test_quick_run(op: str, tmp_path: Path) -> None:
    table = python(BENCHMARKS / f"bench_{op}.py", "--quick", "--json", tmp_path / "out.json")
    for name in ("fastkd", *ROWS[op]):
        assert f"\n{name} " in table
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["machine"]["versions"]["torch"]
    for result in record["results"]:
        rows = result["rows"]
        assert set(rows) == {"fastkd", *ROWS[op]}
        for name in ("fastkd", ROWS[op][0], ROWS[op][-1]):
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


@on_linux
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


@on_linux
def test_memory_against_length(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    script = BENCHMARKS / "memory_against_length.py"
    python(script, "--lengths", "1024", "--implementations", "fastkd", "reference", "--output", tmp_path)
    record = json.loads((tmp_path / "relation_kl_memory.json").read_text())
    peaks = {(row["implementation"], row["length"]): row["peak_mib"] for row in record["results"]}
    # the reference holds several tensors of 2 heads * 1024 * 1024 floats
    assert peaks["fastkd", 1024] < 16 < peaks["reference", 1024]
    assert (tmp_path / "relation_kl_memory.png").read_bytes().startswith(b"\x89PNG")
