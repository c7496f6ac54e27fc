"""Compiles csrc/cuda for GPUs that need not be here, and tells what each kernel uses of them.

python -m benchmarks.gpu.compile.cuda                     # the table of what tests/test_compile_gpu.py checks
python -m benchmarks.gpu.compile.cuda --target sm_80
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

from torch.utils import cpp_extension

from benchmarks import ROOT

from ..count import sass
from .common import read_binary, resource_usage

TARGETS = ("sm_80", "sm_90")
FLAGS = ["-O3", "-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]  # as in setup.py
# What a trip of the loop that writes the gradient, in the rows' dtype, executes at least: a thread works on two chunks
# of 16 bytes at a time.
GRADIENT = {
    "fp32": {"MUFU.EX2": 8, "STG.E.128": 2, "F2FP": 0},
    "bf16": {"MUFU.EX2": 16, "STG.E.128": 2, "F2FP": 1},
    "fp16": {"MUFU.EX2": 16, "STG.E.128": 2, "F2FP": 1},
}
DTYPES = {"float": "fp32", "BFloat16": "bf16", "Half": "fp16"}


def kernel_of(symbol: str) -> tuple[str, str]:
    """(divergence, dtype) of a mangled rows_kernel<D, T>."""
    found = re.fullmatch(r".*rows_kernelI(?:NS_\d+(\w+?)E|(v))(?:(f)|N3c10\d+(\w+?)E)EEvNS0_9ArgumentsE", symbol)
    assert found is not None, symbol
    return found[1] or "-", DTYPES[found[4] or "float"]


def _loops(cubin: bytes) -> dict[str, dict[str, int]]:
    """Of each kernel, by its symbol: loops that write gradients, and those of them that store 16 bytes at a time."""
    found = {}
    for symbol, blocks in sass.functions(read_binary("nvdisasm", "-c", cubin)).items():
        loops = sass.loops(blocks)
        names = {loop: {one.name for number in loop.blocks for one in blocks[number].instructions} for loop in loops}
        writing = [loop for loop in loops if {"MUFU", "STG"} <= names[loop]]
        via = GRADIENT[kernel_of(symbol)[1]]
        wide = [loop for loop in writing if sass.way(blocks, loop, loops, via) is not None]
        found[symbol] = {"gradients": len(writing), "wide": len(wide)}
    return found


def chosen() -> list[str]:
    """What the tests compile."""
    return list(TARGETS)


def built(target: str) -> bytes:
    """The kernels' machine code. Kept, as it takes nvcc most of a minute."""
    version = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    digest = hashlib.sha256(f"{version}{target}{FLAGS}".encode())
    for path in sorted([*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*")]):
        digest.update(path.read_bytes())
    cubin = ROOT / "build" / "cubins" / f"{digest.hexdigest()[:32]}.cubin"
    if not cubin.exists():
        cubin.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{path}" for path in cpp_extension.include_paths()]
        gencode = f"-gencode=arch=compute_{target[3:]},code={target}"
        unit, fresh = ROOT / "csrc" / "cuda" / "divergence_rows.cu", cubin.with_suffix(f".{os.getpid()}")
        command = ["nvcc", *FLAGS, gencode, *includes, "-cubin", unit, "-o", fresh]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        fresh.replace(cubin)
    return cubin.read_bytes()


def measure(target: str) -> list[dict]:
    binary = built(target)
    loops, results = _loops(binary), []
    for symbol, resources in resource_usage(binary).items():
        divergence, dtype = kernel_of(symbol)
        results.append({"target": target, "divergence": divergence, "dtype": dtype, **resources, **loops[symbol]})
    return sorted(results, key=lambda r: (r["divergence"], r["dtype"]))


def table(results: list[dict]) -> str:
    """local: bytes, spilled or not; wide: of the loops that write gradients, those that store 16 bytes at a time."""
    lines = [f"{'target':8}{'divergence':15}{'dtype':6}{'regs':>6}{'local':>7}{'gradients':>11}{'wide':>6}"]
    for r in results:
        numbers = f"{r['registers']:6}{r['local']:7}{r['gradients']:11}{r['wide']:6}"
        lines.append(f"{r['target']:8}{r['divergence']:15}{r['dtype']:6}{numbers}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", choices=TARGETS)
    options = parser.parse_args()
    with ThreadPoolExecutor() as pool:
        targets = [options.target] if options.target else chosen()
        print(table([result for results in pool.map(measure, targets) for result in results]))
