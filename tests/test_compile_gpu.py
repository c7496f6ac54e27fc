"""GPU code is compiled for GPUs that are not here, and what the compilers say of it is checked.

Triton, rows: every divergence in fp32 on sm_90, in one kernel and in two; bf16, fp16, fp64, mixed dtypes, no teacher;
and for sm_80, sm_100 and gfx942 the kernels most likely to spill. Left out, but compiled by `python -m
tests.compile_rows --all`: the other pairings of dtypes, divergences and targets. Strided columns and unaligned rows are
not compiled here. Of those left out, some fp64 kernels are known to spill on gfx942.

Triton, attention: what tests/compile_attention.py chooses; all of it by `python -m tests.compile_attention --all`.

Triton, cka: what tests/compile_cka.py chooses; all of it by `python -m tests.compile_cka --all`.

nvcc: the mathematics in csrc/divergence.h, in both precisions, for sm_80 and sm_90.
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

# ---- Triton ----------------------------------------------------------------------------------------------------------


def _compiled(module: str):
    """What a module found, in a process that does not interpret Triton."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"tests.{module}", "--json"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def compiled() -> dict:
    return _compiled("compile_rows")


@pytest.fixture(scope="module")
def attention() -> list:
    return _compiled("compile_attention")


def test_nothing_spills(compiled: dict):
    from .compile_rows import table

    print("\n" + table(compiled["kernels"]))
    spilling = [kernel for kernel in compiled["kernels"] if kernel["local"] != 0]
    assert not spilling, table(spilling)


def test_shared_memory_fits(compiled: dict):
    from .compile_common import SHARED_LIMIT

    for kernel in compiled["kernels"]:
        assert kernel["shared"] <= SHARED_LIMIT[kernel["target"]], kernel


def test_two_blocks_fit_a_multiprocessor(compiled: dict):
    """65536 registers. With one block alone nothing would hide the waits inside its reductions."""
    for kernel in compiled["kernels"]:
        if kernel["target"].startswith("sm_") and kernel["student"] != "fp64":
            assert 2 * 32 * kernel["warps"] * kernel["registers"] <= 65536, kernel


def test_two_sum_survives(compiled: dict):
    """t - s - shift loses its correction if a compiler reasons that (a - b) - a is -b. Nine sums and a product."""
    count = compiled["two_sum"]
    assert sum(number for name, number in count.items() if name.startswith(("add", "sub"))) == 9, count
    assert sum(number for name, number in count.items() if name.startswith("mul")) == 1, count
    assert not any(name.startswith("fma") for name in count), count


def test_no_attention_kernel_spills(attention: list):
    from .compile_attention import table

    print("\n" + table(attention))
    spilling = [kernel for kernel in attention if kernel["local"] != 0]
    assert not spilling, "\n" + table(spilling)


def test_shared_memory_of_attention_fits(attention: list):
    from .compile_common import SHARED_LIMIT

    for kernel in attention:
        assert kernel["shared"] <= SHARED_LIMIT[kernel["target"]], kernel


def test_attention_multiplies_by_warp_group(attention: list):
    """wgmma is Hopper's way to the full rate of its tensor cores."""
    hopper = [kernel for kernel in attention if kernel["target"] == "sm_90" and kernel["dtype"] == "bf16"]
    assert hopper and all(kernel["wgmma"] for kernel in hopper), hopper


@pytest.fixture(scope="module")
def cka() -> list:
    return _compiled("compile_cka")


def test_no_cka_kernel_spills(cka: list):
    """On NVIDIA's. AMD's compiler puts scalars aside that tell the pairs of a launch apart."""
    from .compile_cka import table

    print("\n" + table(cka))
    spilling = [kernel for kernel in cka if kernel["target"].startswith("sm_") and kernel["local"] != 0]
    assert not spilling, "\n" + table(spilling)
    assert {kernel["target"] for kernel in cka} == {"sm_80", "sm_90", "sm_100", "gfx942"}


def test_shared_memory_of_cka_fits(cka: list):
    from .compile_common import SHARED_LIMIT

    for kernel in cka:
        assert kernel["shared"] <= SHARED_LIMIT[kernel["target"]], kernel


def test_cka_multiplies_by_warp_group(cka: list):
    gemms = ("covariance", "gram", "gradient", "gram_gradient")
    hopper = [kernel for kernel in cka if kernel["target"] == "sm_90" and kernel["dtype"] == "bf16"]
    hopper = [kernel for kernel in hopper if kernel["kernel"] in gemms]
    assert {kernel["kernel"] for kernel in hopper} == set(gemms)
    assert all(kernel["wgmma"] for kernel in hopper), hopper


# ---- nvcc ------------------------------------------------------------------------------------------------------------

TRANSLATION_UNIT = """
#include "divergence.h"

using namespace fastkd;

template <class D, class F, bool kCareful>
__global__ void gradient(const F* s, const F* t, F* g, RowStats stats, double tau, Beta<F> beta) {
  const int j = blockIdx.x * blockDim.x + threadIdx.x;
  const RowConstants<F> row(stats, tau);
  g[j] = gradient_of<D, kCareful>(unmasked(s[j]), unmasked(t[j]), beta, row);
}

template <class D, class F>
__global__ void value(const F* s, const F* t, F* v, RowStats stats, double tau, Beta<F> beta) {
  const int j = blockIdx.x * blockDim.x + threadIdx.x;
  const Pair<F> pair(unmasked(s[j]), unmasked(t[j]), RowConstants<F>(stats, tau));
  v[j] = D::value(pair, beta);
}

template <class D, class F>
void launch(const F* s, const F* t, F* g) {
  gradient<D, F, false><<<1, 32>>>(s, t, g, RowStats{}, 1.0, Beta<F>(0.5));
  gradient<D, F, true><<<1, 32>>>(s, t, g, RowStats{}, 1.0, Beta<F>(0.5));
  if constexpr (D::kMoment == Moment::kNone) value<D, F><<<1, 32>>>(s, t, g, RowStats{}, 1.0, Beta<F>(0.5));
}

template <class F>
void launch_all(const F* s, const F* t, F* g) {
  launch<ForwardKL>(s, t, g);
  launch<ReverseKL>(s, t, g);
  launch<JSD>(s, t, g);
  launch<SkewKL>(s, t, g);
  launch<SkewReverseKL>(s, t, g);
  launch<TVD>(s, t, g);
}

template void launch_all<float>(const float*, const float*, float*);
template void launch_all<double>(const double*, const double*, double*);
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_divergence_header_compiles_for_cuda(tmp_path: Path, arch: str):
    unit = tmp_path / "divergence.cu"
    unit.write_text(TRANSLATION_UNIT)
    command = ["nvcc", "-std=c++17", f"-arch={arch}", f"-I{ROOT / 'csrc'}", "-Xptxas=-v", "-c", unit, "-o", "out.o"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # 6 divergences x 2 precisions, plain and careful, and the value of 4 of them
    assert run.stderr.count("bytes spill stores") == 32 == run.stderr.count(" 0 bytes spill stores"), run.stderr
