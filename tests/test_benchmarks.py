"""The benchmarks run, their memory meter measures, and what is made of results of GPUs is right."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from benchmarks.run import MODULES

from .forks import Forks

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROWS = {  # what each benchmark's tables list below fastkd, its limit last
    "ops.attention_kl": ("reference", "torch.compile", "GEMMs"),
    "ops.cka_loss": ("reference", "eager", "torch.compile", "ckatorch", "torch-cka", "five GEMMs"),
    "ops.linear_kl": ("reference", "torch.compile", "Liger", "bare GEMMs"),
    "ops.linear_kl_topk": ("reference", "fastkd, dense", "eager", "chunks, checkpointed", "Liger, dense", "bare GEMMs"),
    "ops.logit_kl": ("reference", "torch.compile", "Liger", "copy"),
    "ops.logit_kl_topk": ("reference", "eager", "copy"),
    "ops.relation_kl": ("reference", "torch.compile", "GEMMs"),
    "trainer.cached_step": ("uncached", "student alone"),
    "trainer.causal_step": ("eager", "loss alone", "both models"),
    "trainer.integrations": ("stock", "floor"),
    "trainer.prune": ("eager", "copy"),
    "trainer.train_step": ("eager", "both models"),
}
on_linux = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux resets the high-water mark"
)


# What takes benchmarks seconds to import.
HEAVY = ["torch._inductor.compile_fx"]
if importlib.util.find_spec("transformers") is not None:
    HEAVY += ["transformers.trainer", "transformers.models.t5.modeling_t5"]


FORKS: dict[tuple[str, ...], Forks] = {}


@pytest.fixture(scope="module", autouse=True)
def _end() -> Iterator[None]:
    yield
    while FORKS:
        FORKS.popitem()[1].end()


def python(*arguments: str | Path, knowing: Sequence[str] = ("torch",)) -> str:
    """Runs Python on the arguments, where benchmarks/ is, with modules imported; its output."""
    forks = FORKS.get(tuple(knowing)) or FORKS.setdefault(tuple(knowing), Forks(*knowing))
    done = forks.run(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def module(name: str, *arguments: str | Path) -> str:
    """Runs one of the benchmarks; its output."""
    return python("-m", f"benchmarks.{name}", *arguments, knowing=("torch",) if name.startswith("gpu.") else HEAVY)


@functools.cache
def quick_run(name: str) -> tuple[str, str]:
    """What a benchmark prints, and its JSON."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "out.json"
        return module(name, "--quick", "--json", file), file.read_text()


@pytest.mark.long
@pytest.mark.parametrize("name", ROWS)
def test_quick_run(name: str) -> None:
    if name == "trainer.integrations":
        pytest.importorskip("trl")  # which has none for the oldest Python
    table, text = quick_run(name)
    for row in ("fastkd", *ROWS[name]):
        assert f"\n{row} " in table
    record = json.loads(text)
    assert record["machine"]["versions"]["torch"]
    for result in record["results"]:
        rows = result["rows"]
        assert set(rows) == {"fastkd", *ROWS[name]}
        for row in ("fastkd", ROWS[name][0], ROWS[name][-1]):
            assert len(rows[row]["samples_s"]) >= 3, rows[row]["note"]
        # every implementation that ran computes the same gradients
        assert all(row["error"] < 1e-5 for row in rows.values() if "error" in row)


def test_every_benchmark_is_in_the_table_of_all() -> None:
    files = [file for folder in ("ops", "trainer") for file in (ROOT / "benchmarks" / folder).glob("*.py")]
    lists = {file.stem for file in files if re.search(r"^def problems\(", file.read_text(), re.MULTILINE)}
    assert lists == {module.__name__.split(".")[-1] for module in MODULES} == {name.split(".")[-1] for name in ROWS}


def test_the_installed_fastkd_is_measured(tmp_path: Path) -> None:
    """Not the one in the folder where a benchmark has to be started, whose extension may be nowhere."""
    (tmp_path / "fastkd").mkdir()
    (tmp_path / "fastkd" / "__init__.py").write_text("raise SystemExit('the installed one')")
    command = [sys.executable, "-m", "benchmarks.ops.logit_kl_exactness"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, timeout=120
    )
    assert done.stderr == "the installed one\n"


@pytest.mark.long
def test_traffic_of_ranks(tmp_path: Path) -> None:
    """It is what is documented for linear_kl, and for a training step that of the weights."""
    output = module("trainer.scaling", "--quick", "--json", tmp_path / "out.json")
    assert "NOT MET" not in output and "no measure of a speed-up" in output
    record = json.loads((tmp_path / "out.json").read_text())
    assert all(target["met"] for target in record["targets"])
    assert {result["divergence"] for result in record["linear_kl"]} == {"forward_kl", "jsd"}
    assert all(result["sent"] > 0 for result in record["linear_kl"])
    moved = {result["kind"]: result["closed_form"] for result in record["training"]}
    assert moved["DDP"]["all-reduce"] == moved["FSDP2"]["reduce-scatter"] < moved["FSDP2"]["all-gather"]


@pytest.mark.long
def test_all_in_one_markdown_table() -> None:
    table = module("run", "--quick", "--markdown", "--only", "logit_kl T 32 V 1000 float32, forward")
    header = next(line for line in table.splitlines() if line.startswith("| implementation"))
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert all(row.count("|") == header.count("|") for row in rows)
    assert any(row.startswith("| fastkd ") for row in rows)


@on_linux
def test_peak_memory() -> None:
    """The meter sees what a run allocates for a while, and leaves out what it returns."""
    cases = [(3, 0), (64, 0), (64, 32), (0, 64)]  # least first: what has been freed may be there still
    code = (
        "import torch\n"
        "from benchmarks.harness.memory import MIB, peak_memory\n"
        "def ones(mib): return torch.ones(mib * MIB, dtype=torch.uint8)\n"
        f"for temporary, returned in {cases}:\n"
        "    def run():\n"
        "        kept, passing = ones(returned), ones(temporary)\n"
        "        return (kept,)\n"
        "    run(); outputs, peak = peak_memory(run, torch.device('cpu'))\n"
        "    assert len(outputs) == 1; print(peak)"
    )
    for (temporary, _), peak in zip(cases, python("-c", code).split(), strict=True):
        assert abs(float(peak) - temporary) < 1 + temporary / 16


@on_linux
@pytest.mark.long
def test_memory_against_length(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    implementations = ("--implementations", "fastkd", "reference")
    module("ops.relation_kl_memory", "--lengths", "1024", *implementations, "--output", tmp_path)
    record = json.loads((tmp_path / "relation_kl_memory.json").read_text())
    peaks = {(row["implementation"], row["length"]): row["peak_mib"] for row in record["results"]}
    # the reference holds several tensors of 2 heads * 1024 * 1024 floats
    assert peaks["fastkd", 1024] < 16 < peaks["reference", 1024]
    assert (tmp_path / "relation_kl_memory.png").read_bytes().startswith(b"\x89PNG")


# ---- what came back from a GPU ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what could be the results of a GPU: of a quick run here, in another machine's name."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "cpu.json").write_text(quick_run("ops.logit_kl")[1])
    record = json.loads(quick_run("ops.logit_kl")[1])
    record["device"], record["machine"]["gpu"] = "cuda", "NVIDIA H000"
    record["limits"] = [
        {"limit": "copy", "unit": "GB/s", "rate": 20.0},
        {"limit": "bf16 GEMM", "unit": "GFLOP/s", "rate": 300.0},
        {"limit": "exponentials", "unit": "Gexp/s", "rate": None, "note": "needs a GPU"},
    ]
    target = {"target": "fastkd share of the limit", "relation": ">=", "bound": 0.6, "measured": None, "met": None}
    record["results"][0]["targets"] = [target]
    record["results"][1]["rows"]["fastkd"] = {"note": "not run: the time was up"}
    (folder / "nvidia-h000.json").write_text(json.dumps(record))
    return folder


@pytest.mark.long
def test_results_are_drawn(results: Path, tmp_path: Path) -> None:
    """Those of GPUs in a folder, and those of a CPU where they are named; with and without counts."""
    pytest.importorskip("matplotlib")
    module("gpu.roofline", results, "--output", tmp_path)
    old = RESULTS / "amd-epyc-2-threads.json"
    module("gpu.roofline", old, "--output", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"nvidia-h000-roofline.png", f"{old.stem}-roofline.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
    code = (
        "import json\n"
        "from benchmarks.gpu import roofline\n"
        f"record = json.load(open({str(results / 'nvidia-h000.json')!r}))\n"
        "copy, products = roofline.rates(record)\n"
        "assert copy == 20e9 and products == {'bf16 GEMM': 300e9}\n"
        "first = record['results'][0]\n"
        "title, intensity, rate = roofline.points(record)[0]\n"
        "assert title == first['problem'] and intensity == first['counts'][0] / first['counts'][1]\n"
        "assert rate == first['counts'][0] / first['rows']['fastkd']['min_s']\n"
        "assert len(roofline.points(record)) == len(roofline.shares(record)) == len(record['results']) - 1\n"
        "assert roofline.shares(record)[0][2] == 0.6\n"
    )
    python("-c", code)


def test_the_page_has_what_was_measured_on_gpus() -> None:
    module("gpu.table", "--check")


@pytest.mark.long
def test_table_of_gpus(results: Path, tmp_path: Path) -> None:
    script, page = "gpu.table", tmp_path / "page.md"
    begin, end = python("-c", "import benchmarks.gpu.table as t; print(t.BEGIN); print(t.END)").splitlines()
    page.write_text(f"before\n\n{begin}\n{end}\n\nafter\n")

    def write(folder: Path) -> str:
        module(script, "--results", folder, "--page", page)
        module(script, "--results", folder, "--page", page, "--check")
        first = page.read_text()
        module(script, "--results", folder, "--page", page)
        assert page.read_text() == first
        assert first.startswith(f"before\n\n{begin}\n") and first.endswith(f"\n{end}\n\nafter\n")
        return first

    text = write(ROOT / "benchmarks")  # no results there, least of all a CPU's
    assert "Nothing has been measured on a GPU yet" in text and "|" not in text
    with pytest.raises(AssertionError, match="out of date"):
        module(script, "--results", results, "--page", page, "--check")
    text = write(results)
    assert "NVIDIA H000" in text and "bf16 GEMM 300 GFLOP/s" in text and "Nothing" not in text and "AMD" not in text
    header, _, *lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert all(len(line) == len(header) for line in lines)
    assert len(lines) == len(json.loads((results / "nvidia-h000.json").read_text())["results"])
    assert lines[0][1].strip().endswith(" ms") and lines[0][-1].strip() == "share of the limit >= 0.6: unknown"
    assert [cell.strip() for cell in lines[1][1:5]] == [""] * 4
    page.write_text("no place for it")
    with pytest.raises(AssertionError, match="the page needs these two lines"):
        module(script, "--results", results, "--page", page)


@pytest.mark.long
def test_limits_are_measured() -> None:
    """Everything but exponentials here, and work that is about what was asked for."""
    code = (
        "import torch\n"
        "from benchmarks.harness import limits\n"
        "found = {x['limit']: x for x in limits.measure(torch.device('cpu'), 1e-5)}\n"
        "assert found.pop('exponentials')['rate'] is None\n"
        "assert set(found) == {'copy', 'bf16 GEMM', 'tf32 GEMM', 'fp32 GEMM'}\n"
        "assert all(x['rate'] >= x['median_rate'] > 0 for x in found.values())\n"
        "assert torch.get_float32_matmul_precision() == 'highest'\n"
    )
    python("-c", code)


def test_problems_of_a_gpu_can_be_listed() -> None:
    """With every way to the result that is to be compared, and a limit and targets that exist."""
    code = (
        "import torch\n"
        "from benchmarks import run\n"
        "for problem in run.problems(torch.device('cuda')):\n"
        "    rows = (*problem.implementations, problem.limit)\n"
        "    for target in problem.targets:\n"
        "        quantity = target.quantity.removeprefix('memory / ')\n"
        "        assert quantity in (*rows, 'ms', 'memory', 'of limit'), (problem.title, target)\n"
        "    print(problem.title, rows)\n"
    )
    listed = python("-c", code).splitlines()
    for op, row in (
        ("linear_kl T 1024 ", "Liger, Triton"),
        ("relation", "roof"),
    ):
        assert any(op in line and row in line for line in listed), op
