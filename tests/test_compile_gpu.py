"""GPU code is compiled for GPUs that are not here, and what the compilers say of it is checked.

Triton: what the modules of benchmarks/gpu/compile choose, for sm_90 the variety, for sm_80, sm_100 and gfx942 the
kernels most likely to spill; all of it by `python -m benchmarks.gpu.compile.rows --all`, and likewise of the others.
Strided columns and unaligned rows are not compiled here. Of rows left out, some fp64 kernels are known to spill on
gfx942.

nvcc: all of csrc/cuda, for sm_80 and sm_90.

The tables are left in build/compiled; .ci/run prints them. All of this takes minutes, but for one case of every kernel.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(1800)  # the first that asks waits for all that is compiled

# ---- Triton ----------------------------------------------------------------------------------------------------------


def _printed(*arguments: str):
    """The JSON that Python prints, in a process that does not interpret Triton."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def _show(name: str, table: str) -> None:
    """Prints a table, and leaves it for who wants to read it after a run that passed."""
    print("\n" + table)
    folder = ROOT / "build" / "compiled"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text(table + "\n")


def test_every_kernel_compiles_for_hopper_and_none_spills():
    """One case of each, and all that matter of the smallest; the others are long."""
    code = """
import json
from benchmarks.gpu.compile import attention, cka, rows, softcap, topk
from benchmarks.gpu.compile.common import SHARED_LIMIT, TARGETS
cases = [(rows, ("sm_90", which, "jsd", "fp32", "fp32", True)) for which in rows.PASSES + rows.SHARD_PASSES]
cases += [(topk, ("sm_90", "fused", "fp32", 64, "labels, temperature"))]
cases += [(topk, ("sm_90", which, "fp32", 65, "plain")) for which in topk.SHARD_PASSES]
cases += [(cka, ("sm_90", dtype, 2)) for dtype in ("bf16", "fp64")]
cases += [(attention, ("sm_90", "dense", "forward_kl", "fp64/bf16", 64, 64, False))]
cases += [(attention, ("sm_90", op, "forward_kl", "bf16", 64, 64, False)) for op in ("relation", "diagonals")]
cases += [(softcap, (target, dtype, True)) for target in TARGETS for dtype in ("fp32", "fp64")]
cases += [(softcap, ("sm_90", "fp32", False))]
found = {}
for module, case in cases:
    measured = module.measure(case)
    for one in measured if isinstance(measured, list) else [measured]:
        name = f"{module.__name__.split('.')[-1]}: {one.get('kernel') or one['pass']} {case}"
        may_spill = module is attention and case[3].startswith("fp64")
        found[name] = one["local"] * (not may_spill), one["shared"] <= SHARED_LIMIT["sm_90"]
print(json.dumps(found))
"""
    found = _printed("-c", code)
    assert {name.split(":")[0] for name in found} == {"attention", "cka", "rows", "softcap", "topk"}
    spilling = {name for name, (local, fits) in found.items() if local or not fits}
    assert not spilling, found


MODULES = ("cuda", "attention", "cka", "rows", "topk")  # nvcc takes longest


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict:
    """What the modules of benchmarks/gpu/compile found, that tests here ask for: one process and one pool."""
    here = [item for item in request.session.items if item.path == request.path]
    missing = {"cuda"} if shutil.which("nvcc") is None else set()
    asked = {name for item in here for name in item.fixturenames} - missing
    return _printed("-m", "benchmarks.gpu.compile.several", *(name for name in MODULES if name in asked))


@pytest.fixture
def rows(compiled: dict) -> list:
    return compiled["rows"]


@pytest.fixture
def attention(compiled: dict) -> list:
    return compiled["attention"]


@pytest.fixture
def topk(compiled: dict) -> list:
    return compiled["topk"]


@pytest.fixture
def cka(compiled: dict) -> list:
    return compiled["cka"]


@pytest.fixture
def cuda(compiled: dict) -> list:
    if "cuda" not in compiled:
        pytest.skip("nvcc is not installed")
    return compiled["cuda"]


@pytest.mark.long
def test_nothing_spills(rows: list):
    from benchmarks.gpu.compile.rows import table

    _show("rows", table(rows))
    spilling = [kernel for kernel in rows if kernel["local"] != 0]
    assert not spilling, table(spilling)


@pytest.mark.long
def test_two_blocks_fit_a_multiprocessor(rows: list):
    """65536 registers. With one block alone nothing would hide the waits inside its reductions."""
    for kernel in rows:
        if kernel["target"].startswith("sm_") and kernel["student"] != "fp64":
            assert 2 * 32 * kernel["warps"] * kernel["registers"] <= 65536, kernel


@pytest.mark.long
def test_two_sum_survives(rows: list, compiled: dict):
    """t - s - shift loses its correction if a compiler reasons that (a - b) - a is -b. Nine sums and a product."""
    count = compiled["two_sum"]
    assert sum(number for name, number in count.items() if name.startswith(("add", "sub"))) == 9, count
    assert sum(number for name, number in count.items() if name.startswith("mul")) == 1, count
    assert not any(name.startswith("fma") for name in count), count


@pytest.mark.long
def test_no_topk_kernel_spills(topk: list):
    """On NVIDIA's. AMD's compiler puts scalars aside."""
    from benchmarks.gpu.compile.topk import table

    _show("topk", table(topk))
    spilling = [kernel for kernel in topk if kernel["target"].startswith("sm_") and kernel["local"] != 0]
    assert not spilling, "\n" + table(spilling)
    assert {kernel["target"] for kernel in topk} == {"sm_80", "sm_90", "sm_100", "gfx942"}


@pytest.mark.long
def test_sixteen_topk_warps_fit_a_multiprocessor(topk: list):
    """Of 65536 registers: with 16 columns a thread 32 KB of fp32 rows are in flight. fp64 and many ids have half."""
    for kernel in topk:
        if kernel["target"].startswith("sm_"):
            few = kernel["dtype"] != "fp64" and kernel["entries"] <= 128
            assert kernel["registers"] <= (128 if few else 255) and kernel["wide"], kernel


@pytest.mark.long
def test_no_attention_kernel_spills(attention: list):
    """But in fp64, of which it is enough that it compiles and fits."""
    from benchmarks.gpu.compile.attention import table

    _show("attention", table(attention))
    spilling = [kernel for kernel in attention if kernel["local"] != 0 and not kernel["dtype"].startswith("fp64")]
    assert not spilling, "\n" + table(spilling)


@pytest.mark.long
def test_attention_multiplies_by_warp_group(attention: list):
    """wgmma is Hopper's way to the full rate of its tensor cores."""
    hopper = [kernel for kernel in attention if kernel["target"] == "sm_90" and kernel["dtype"] == "bf16"]
    hopper = [kernel for kernel in hopper if kernel["kernel"] not in ("diagonals", "factors")]  # of sums, of rows
    assert hopper and all(kernel["wgmma"] for kernel in hopper), hopper


@pytest.mark.long
def test_no_cka_kernel_spills(cka: list):
    from benchmarks.gpu.compile.cka import table

    _show("cka", table(cka))
    spilling = [kernel for kernel in cka if kernel["local"] != 0]
    assert not spilling, "\n" + table(spilling)
    assert {kernel["target"] for kernel in cka} == {"sm_80", "sm_90", "sm_100", "gfx942"}


@pytest.mark.long
def test_shared_memory_fits(rows: list, attention: list, cka: list, topk: list):
    from benchmarks.gpu.compile.common import SHARED_LIMIT

    for kernels in (rows, attention, cka, topk):
        assert kernels
        for kernel in kernels:
            assert kernel["shared"] <= SHARED_LIMIT[kernel["target"]], kernel


# ---- nvcc ------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_no_cuda_kernel_spills(cuda: list):
    from benchmarks.gpu.compile.cuda import table

    _show("cuda", table(cuda))
    assert len(cuda) == 2 * 7 * 3  # targets, divergences and the cross-entropy alone, dtypes
    spilling = [kernel for kernel in cuda if kernel["local"]]
    assert not spilling, "\n" + table(spilling)


@pytest.mark.long
def test_cuda_kernels_store_16_bytes_at_a_time(cuda: list):
    """Gradients, in every loop that writes them: carefully and not, with the cross-entropy's and without."""
    assert all(0 < kernel["gradients"] == kernel["wide"] for kernel in cuda), cuda


@pytest.mark.long
def test_several_blocks_fit_a_multiprocessor(cuda: list):
    """Of 65536 registers: three blocks where statistics take one pass, two where they take more."""
    for kernel in cuda:
        blocks = 3 if kernel["divergence"] in ("ForwardKL", "ReverseKL", "-") else 2
        assert blocks * 256 * kernel["registers"] <= 65536, kernel
