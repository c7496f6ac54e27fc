"""What compiling Triton kernels for GPUs that need not be here takes, and what their binaries tell."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory a block may have.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def resources(target: str, compiled) -> dict[str, int]:
    """Registers, bytes spilled or otherwise in local memory, and bytes of shared memory, read from the binary."""
    if target.startswith("gfx"):
        found = dict(re.findall(r"\.(\w+):\s+(\d+)", compiled.asm["amdgcn"]))
        spilled = int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"])
        local = 4 * spilled + int(found["private_segment_fixed_size"])
        return {"registers": int(found["vgpr_count"]), "local": local, "shared": compiled.metadata.shared}
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", text[text.index("REG:") :])}
    return {"registers": found["REG"], "local": found["STACK"] + found["LOCAL"], "shared": compiled.metadata.shared}


def in_parallel(measure: Callable[[tuple], object], cases: list[tuple]) -> list:
    """measure(case) of every case. Triton keeps its binaries, so a second run takes seconds."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return list(pool.map(measure, cases))
