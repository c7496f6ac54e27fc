"""Counts the loops of compiled kernels."""

from __future__ import annotations

import importlib
import math
import shutil
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from benchmarks.gpu.compile import common, cuda

from . import sass
from .classes import count
from .kernels import Op, Part

THREADS = 256  # of a block of csrc/cuda


@dataclass(frozen=True)
class Counted:
    """A kernel's loop: what a lane executes an element, in the normal case and if every branch were taken."""

    each: dict[str, float]  # by element
    all_each: float  # lane-instructions of all blocks of the loop, by element
    barriers: int  # of a trip
    registers: int
    local: int  # bytes of a thread's in local memory: spills
    spills: int  # instructions of the whole kernel that touch it


@dataclass(frozen=True)
class Kernel:
    symbol: str
    cubin: bytes
    constants: dict[str, Any]
    warps: int


def kernels(target: str, module: str, case: tuple[Any, ...]) -> dict[str, Kernel]:
    """What a case launches, by the names in the table."""
    if module == "cuda":
        cubin = cuda.built(target)
        named = {symbol: " ".join(cuda.kernel_of(symbol)) for symbol in common.resource_usage(cubin)}
        return {name: Kernel(symbol, cubin, {}, THREADS // 32) for symbol, name in named.items()}
    found = {}
    compiler = importlib.import_module(f"benchmarks.gpu.compile.{module}")
    for name, binary, options in compiler.binaries((target, *case)):
        found[name] = Kernel(binary.metadata.name, binary.asm["cubin"], options, binary.metadata.num_warps)
    return found


@lru_cache(1)
def _functions(cubin: bytes) -> dict[str, list[sass.Block]]:
    return sass.functions(common.read_binary("nvdisasm", "-c", cubin))


def counted(target: str, part: Part, kernel: Kernel) -> Counted:
    blocks = _functions(kernel.cubin)[kernel.symbol]
    found = sass.loops(blocks)
    via = dict(part.via)
    trips = [(trip, loop) for loop in found if (trip := sass.way(blocks, loop, found, via)) is not None]
    trips = sorted(trips, key=lambda one: len(one[0]))[: part.loops]
    if part.loops == 0:
        trips = [([one for block in blocks for one in block.instructions], sass.Loop(0, frozenset(range(len(blocks)))))]
    if len(trips) < part.loops:
        raise ValueError(f"{part.title} of {kernel.symbol}: expected {part.loops} loops by {via}, found {len(trips)}")
    elements = math.prod(kernel.constants[x] if isinstance(x, str) else x for x in part.tile)
    lanes = 32 * kernel.warps / elements  # that share an element
    normal = count(one for trip, _ in trips for one in trip)
    everything = sum(len(blocks[number].instructions) for _, loop in trips for number in loop.blocks)
    usage = common.resource_usage(kernel.cubin)[kernel.symbol]
    return Counted(
        each={name: lanes * number for name, number in normal.items()},
        all_each=lanes * everything,
        barriers=int(normal["barrier"]),
        registers=usage["registers"],
        local=usage["local"],
        spills=int(count(one for block in blocks for one in block.instructions)["local"]),
    )


def available(op: Op) -> str | None:
    """Why an op cannot be counted here, or None."""
    if any(part.module == "cuda" for part in op.parts) and shutil.which("nvcc") is None:
        return "nvcc is not installed"
    return None


def measure(case: tuple[str, str, tuple[Any, ...]]) -> dict[str, Kernel]:
    """For in_parallel: (target, module, case)."""
    return kernels(*case)


def measure_all(target: str, ops: tuple[Op, ...]) -> dict[str, list[Counted]]:
    """Every part of the ops, by the op's name."""
    cases = list(dict.fromkeys((target, part.module, part.case) for op in ops for part in op.parts))
    found = dict(zip(cases, common.in_parallel(measure, cases), strict=True))
    return {
        op.name: [counted(target, part, found[target, part.module, part.case][part.kernel]) for part in op.parts]
        for op in ops
    }
