"""What counts come to on an H200: clocks of one multiprocessor, the unit that binds, the share of the roofline."""

from __future__ import annotations

from dataclasses import dataclass

from .classes import CLASSES
from .kernels import Op
from .measure import Counted

MULTIPROCESSORS = 132
CLOCK = 1.83e9  # Hz, at which NVIDIA's 989 TFLOP/s of bf16 are what TENSOR gives
ISSUE = 128  # lane-instructions a clock of a multiprocessor: four warps
ISSUED = 0.65  # of those slots that are realistically taken; 0.55 to 0.75
TENSOR = 4096  # FLOPs a clock of bf16 products; 770-800 TFLOP/s are measured, 3,200 to 3,300 of them
SHARED = 128  # bytes a clock
MEMORY = 16.4  # bytes of device memory a clock, measured with a copy


@dataclass(frozen=True)
class Estimate:
    clocks: float  # of a multiprocessor, an element, all of an op's kernels
    bound: str  # the unit that takes longest in the kernel that takes longest
    share: float  # of the roofline: the clocks that an element takes at least, of these
    seconds: float  # of the op's problem


def units(each: dict[str, float], floor_bytes: float = 0.0) -> dict[str, float]:
    """Clocks an element that each unit is busy; of the issue at its realistic rate."""
    found = {"issue": each["instructions"] / (ISSUE * ISSUED), "memory": floor_bytes / MEMORY}
    found |= {name: each.get(name, 0) / lanes for name, (lanes, _) in CLASSES.items() if lanes}
    found["shared"] = each.get("shared bytes", 0) / SHARED
    found["tensor"] = each.get("tensor FLOPs", 0) / TENSOR
    return found


def estimate(op: Op, parts: list[Counted]) -> Estimate:
    size, flops, exponentials = op.floor
    clocks, slowest = 0.0, (0.0, "")
    for part in parts:
        bound = max((clocks, unit) for unit, clocks in units(part.each, size / len(parts)).items())
        clocks += bound[0]
        slowest = max(slowest, bound)
    moved, flops_after = op.products
    clocks += max(moved / MEMORY, flops_after / TENSOR)
    least = max(size / MEMORY, flops / TENSOR, exponentials / (CLASSES["special"][0] or 1))
    return Estimate(clocks, slowest[1], least / clocks, op.elements * clocks / (MULTIPROCESSORS * CLOCK))
