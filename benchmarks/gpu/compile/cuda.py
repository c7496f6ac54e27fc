"""Compiles csrc/cuda for GPUs that need not be here, and tells what each kernel uses of them.

python -m benchmarks.gpu.compile.cuda                     # the table of what tests/test_compile_gpu.py checks
python -m benchmarks.gpu.compile.cuda --target sm_80
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils import cpp_extension

from benchmarks import ROOT

from .common import TOOLS

TARGETS = ("sm_80", "sm_90")
FLAGS = ["-O3", "-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Xptxas=-v"]  # as in setup.py
# Instructions that move 16 bytes: from device to shared memory, past registers, and from registers to device memory.
WIDE_COPY, WIDE_STORE = "LDGSTS.E.BYPASS.128", "STG.E.128"
DTYPES = {"float": "fp32", "BFloat16": "bf16", "Half": "fp16"}


def kernel_of(symbol: str) -> tuple[str, str]:
    """(divergence, dtype) of a mangled rows_kernel<D, T>."""
    found = re.fullmatch(r".*rows_kernelI(?:NS_\d+(\w+?)E|(v))(?:(f)|N3c10\d+(\w+?)E)EEvNS0_9ArgumentsE", symbol)
    assert found is not None, symbol
    return found[1] or "-", DTYPES[found[4] or "float"]


def _instructions(binary: Path) -> dict[str, dict[str, int]]:
    """How often each kernel's machine code moves 16 bytes at a time, by its symbol."""
    text = subprocess.run(
        [TOOLS / "cuobjdump", "--dump-sass", binary], check=True, capture_output=True, text=True
    ).stdout
    found = {}
    for function in text.split("Function : ")[1:]:
        counts = {"copies": function.count(WIDE_COPY), "stores": function.count(WIDE_STORE)}
        found[function.split(maxsplit=1)[0]] = counts
    return found


def build(target: str, output: Path, what: str = "-c") -> str:
    """What the assembler says of the kernels. what: "-c" for an object file, "-cubin" for machine code alone."""
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    gencode = f"-gencode=arch=compute_{target[3:]},code={target}"
    unit = ROOT / "csrc" / "cuda" / "divergence_rows.cu"
    run = subprocess.run(["nvcc", *FLAGS, gencode, *includes, what, unit, "-o", output], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stderr


def measure(target: str) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "rows.o"
        said = build(target, binary)
        instructions = _instructions(binary)
    entry = r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes.*?Used (\d+)"
    results = []
    for symbol, stack, stores, loads, registers in re.findall(entry, said, re.DOTALL):
        divergence, dtype = kernel_of(symbol)
        spilled = {"stack": int(stack), "spilled": int(stores) + int(loads), "registers": int(registers)}
        results.append({"target": target, "divergence": divergence, "dtype": dtype, **spilled, **instructions[symbol]})
    return sorted(results, key=lambda r: (r["divergence"], r["dtype"]))


def table(results: list[dict]) -> str:
    """16 B: instructions that copy or store 16 bytes at a time."""
    titles = (
        f"{'target':8}{'divergence':15}{'dtype':6}{'regs':>6}{'stack':>7}{'spilled':>9}{'16 B copies':>13}{'stores':>8}"
    )
    lines = [titles]
    for r in results:
        numbers = f"{r['registers']:6}{r['stack']:7}{r['spilled']:9}{r['copies']:13}{r['stores']:8}"
        lines.append(f"{r['target']:8}{r['divergence']:15}{r['dtype']:6}{numbers}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with ThreadPoolExecutor() as pool:
        chosen = [options.target] if options.target else TARGETS
        measured = [result for results in pool.map(measure, chosen) for result in results]
    print(json.dumps(measured) if options.json else table(measured))
