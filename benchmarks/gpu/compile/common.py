"""What compiling Triton kernels for GPUs that need not be here takes, and what their binaries tell."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of shared memory a block may have.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class _Device:
    """Stands for the GPU that Triton compiles for."""

    def __init__(self, target):
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        return self.target


Launched = tuple[str, Any, dict[str, Any]]  # a kernel's name, its binary, its constants and launch options


@contextmanager
def launches(target: str) -> Iterator[list[Launched]]:
    """A list of Launched that fills up where kernels would have been launched."""
    found, run = [], JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        kernel.device_caches.clear()  # they are by device, and all of ours are number 0
        if target.startswith("gfx"):
            options.pop("maxnreg", None)
        binary = run(kernel, *args, grid=grid, warmup=True, **options)
        fields = [field for x in (*args, *options.values()) if hasattr(x, "_asdict") for field in x._asdict().items()]
        constants = {name: x.value for name, x in fields if isinstance(x, tl.constexpr)}
        found.append((kernel.__name__.removesuffix("_kernel"), binary, {**options, **constants}))

    driver.set_active(_Device(TARGETS[target]))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run


def uses_wgmma(compiled) -> bool:
    """Whether a kernel multiplies by Hopper's warp groups."""
    return "wgmma.mma_async" in compiled.asm.get("ptx", "")


def resources(target: str, compiled) -> dict[str, int]:
    """Registers, bytes spilled or otherwise in local memory, and bytes of shared memory, read from the binary."""
    if target.startswith("gfx"):
        found = dict(re.findall(r"\.(\w+):\s+(\d+)", compiled.asm["amdgcn"]))
        spilled = int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"])
        local = 4 * spilled + int(found["private_segment_fixed_size"])
        return {"registers": int(found["vgpr_count"]), "local": local, "shared": compiled.metadata.shared}
    (found,) = resource_usage(compiled.asm["cubin"]).values()
    return {**found, "shared": compiled.metadata.shared}


def read_binary(tool: str, option: str, cubin: bytes) -> str:
    """What cuobjdump or nvdisasm, which Triton brings, prints of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / tool, option, file.name], check=True, capture_output=True, text=True).stdout


def resource_usage(cubin: bytes) -> dict[str, dict[str, int]]:
    """Registers, and bytes spilled or otherwise in local memory, of every kernel by its symbol."""
    kernels = {}
    text = read_binary("cuobjdump", "--dump-resource-usage", cubin)
    for symbol, line in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", text):
        found = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", line)}
        kernels[symbol] = {"registers": found["REG"], "local": found["STACK"] + found["LOCAL"]}
    return kernels


def of_launch(target: str, compiled, options: dict) -> dict[str, object]:
    """A launch's tile, warps and stages, whether it uses Hopper's warp groups and copy engine, and its resources."""
    names = ("BLOCK", "BLOCK_M", "BLOCK_N", "BLOCK_D", "BLOCK_K")
    tile = "x".join(str(options[name]) for name in names if name in options)
    launched = {"tile": tile, "warps": compiled.metadata.num_warps, "stages": compiled.metadata.num_stages}
    engines = {"wgmma": uses_wgmma(compiled), "tma": "cp.async.bulk.tensor" in compiled.asm.get("ptx", "")}
    return {**launched, **engines, **resources(target, compiled)}


def in_parallel(measure: Callable[[tuple], object], cases: list[tuple]) -> list:
    """measure(case) of every case. Triton keeps its binaries, so a second run takes seconds."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(pool.map(measure, cases))


def main(
    chosen: Callable[[], list[tuple]],
    everything: Callable[[], list[tuple]],
    measure_all: Callable[[list[tuple]], list[dict]],
    table: Callable[[list[dict]], str],
) -> None:
    """Compiles what the command line asks for, of cases that begin with their target, and prints what it found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--target", choices=TARGETS)
    options = parser.parse_args()
    cases = [case for case in (everything() if options.all else chosen()) if options.target in (None, case[0])]
    print(table(measure_all(cases)))
