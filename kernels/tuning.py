"""How a kernel is launched: a table of tiles, warps and stages by GPU, and opt-in timing of what else there is.

    with fastkd.kernels.tuning.autotune() as found:
        loss.backward()  # the first call of a kind times every candidate, the next ones take the fastest
    print(found.lines())  # lines for TABLE

Outside of `autotune` the table alone decides, so that results do not depend on how busy a GPU was. All configurations
compute the same up to rounding.

The table was found by compiling: nothing spills on sm_80, sm_90 and sm_100 (tests/test_compile_gpu.py). Candidates may.
Operators on rows need none, and have launch options and checks in common with it.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources, PTXASError

from .common import INTERPRETED

__all__ = ["Config", "Tuner", "autotune", "check", "launch", "launch_options", "together"]


class Config(NamedTuple):
    tile: tuple[int, int]  # BLOCK_M rows, BLOCK_N columns
    warps: int
    stages: int
    maxnreg: int | None = None  # registers of a thread, on NVIDIA


ANY = "any"
EVERY = "forward gradient mixture_gradient scores mix_forward mix_gradient mix_scores"
# (kernels, bytes of a number, padded head width up to, GPU): of lines that fit, a GPU's own come before those for ANY.
#
# attention_kl. Hopper's wgmma wants 64 rows to four warps. Left to itself, ptxas spills a few constants to fit one more
# block into a multiprocessor: hence 255 registers, and 128 where two blocks are to fit. Not so in most kernels that
# multiply in fp32, which would use up what they are given, and spill for that. mixture_gradient is that of the
# divergences from jsd on; a mix's kernels hold what several of them do, of all six members more than there is room for.
TABLE = {
    ("forward scores", 2, 128, ANY): Config((128, 32), 8, 3, 255),
    ("forward scores", 2, 256, ANY): Config((64, 32), 8, 2, 255),
    ("forward", 2, 32, "sm_90"): Config((128, 64), 8, 3, 128),
    ("mix_forward mix_scores", 2, 128, ANY): Config((128, 16), 8, 3, 255),
    ("mix_forward mix_scores", 2, 256, ANY): Config((64, 16), 8, 2, 255),
    ("forward scores mix_forward mix_scores", 2, 256, "gfx942"): Config((64, 16), 4, 1),
    ("gradient", 2, 64, ANY): Config((128, 32), 8, 2, 255),
    ("gradient mixture_gradient", 2, 128, ANY): Config((128, 16), 8, 2, 255),
    ("gradient mixture_gradient", 2, 256, ANY): Config((32, 32), 8, 2, 255),
    ("gradient", 2, 64, "sm_80"): Config((128, 32), 8, 2, 255),
    ("gradient", 2, 128, "sm_80"): Config((64, 32), 8, 2, 255),
    ("gradient", 2, 128, "gfx942"): Config((128, 16), 8, 2),
    ("mix_gradient", 2, 128, ANY): Config((64, 16), 8, 2, 255),
    ("mix_gradient", 2, 256, ANY): Config((32, 16), 8, 2, 255),
    ("gradient mixture_gradient mix_gradient", 2, 256, "gfx942"): Config((32, 16), 8, 1),
    ("forward", 4, 64, ANY): Config((64, 16), 8, 2),
    ("forward", 4, 128, ANY): Config((64, 16), 8, 2, 128),
    ("scores mix_scores", 4, 128, ANY): Config((64, 16), 8, 2),
    ("forward scores", 4, 256, ANY): Config((32, 16), 8, 1),
    ("gradient mixture_gradient", 4, 64, ANY): Config((32, 16), 8, 2, 255),
    ("gradient mixture_gradient mix_forward mix_gradient mix_scores", 4, 256, ANY): Config((32, 16), 8, 1, 255),
    (EVERY, 8, 64, ANY): Config((32, 32), 8, 1),
    (EVERY, 8, 256, ANY): Config((16, 16), 4, 1),
}


@lru_cache
def heuristic(kernel: str, size: int, width: int, gpu: str) -> Config:
    """The line of the narrowest width that fits, before ANY's one of the GPU's own; of what is too wide, the widest."""
    lines = [line for line in TABLE if kernel in line[0].split() and line[1] == size and line[3] in (gpu, ANY)]
    width = min(width, max(line[2] for line in lines))
    return TABLE[min((line for line in lines if line[2] >= width), key=lambda line: (line[3] == ANY, line[2]))]


# ---- launch ----------------------------------------------------------------------------------------------------------


def _gpu() -> str:
    """The current device, as the table calls it: the most alike of those that kernels are compiled for."""
    if INTERPRETED.value:
        return ANY
    target = driver.active.get_current_target()
    if target.backend != "cuda":
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(target.arch // 10, "sm_80")


def launch_options(warps: int, maxnreg: int | None, gpu: str | None = None) -> dict[str, Any]:
    """As Triton takes them: of fusion its default differs by version, and only NVIDIA's has a ceiling of registers."""
    options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": True}
    return options if maxnreg is None or (gpu or _gpu()) == "gfx942" else {**options, "maxnreg": maxnreg}


def check(name: str, x: Tensor | None, dtype: torch.dtype | None, *shape: int) -> None:
    """Raises unless x, if it is given, is contiguous of that dtype, or for None of any floating dtype and strides."""
    if x is None:
        return
    if x.shape != shape or (not x.is_floating_point() if dtype is None else x.dtype != dtype or not x.is_contiguous()):
        wanted, strides = ("floating", "") if dtype is None else (f"contiguous {dtype}", f", strides {x.stride()}")
        raise ValueError(f"{name}: expected {wanted} {list(shape)}, got {x.dtype} {list(x.shape)}{strides}")


def launch(kernel: str, size: int, width: int, case: Hashable, run: Callable[[dict[str, Any]], None]) -> None:
    """run(block sizes and launch options); `case` is all else that its speed depends on, numbers for sizes."""
    line = kernel, size, width, _gpu()
    config = heuristic(*line)
    if _tuner is not None:
        config = _tuner.fastest(line, case, config, run)
    run(_options(line, config))


def together(settings: Sequence[Hashable], at_most: int) -> list[list[int]]:
    """Which entries go by one launch: those of equal settings, and no more than it takes."""
    alike: dict[Hashable, list[int]] = {}
    for n, setting in enumerate(settings):
        alike.setdefault(setting, []).append(n)
    return [members[i : i + at_most] for members in alike.values() for i in range(0, len(members), at_most)]


def _options(line: tuple, config: Config) -> dict[str, Any]:
    tile = dict(zip(("BLOCK_M", "BLOCK_N"), config.tile, strict=True))
    return {**tile, "num_stages": config.stages, **launch_options(config.warps, config.maxnreg, line[-1])}


# ---- tuning ----------------------------------------------------------------------------------------------------------
# What is timed besides the table's choice: (kernel, bytes of a number). Rows are a multiple of columns, as causal
# gradients need.
CANDIDATES = {
    ("forward", 2): [
        *(Config((128, 32), 8, stages, registers) for stages in (2, 3, 4) for registers in (80, 255)),
        *(Config((128, 64), 8, stages, 255) for stages in (2, 3)),
        *(Config((64, columns), 4, stages, 255) for columns in (32, 64) for stages in (2, 3)),
    ],
    ("gradient", 2): [
        *(Config((128, 16), 8, stages, registers) for stages in (2, 3) for registers in (128, 255)),
        *(Config((128, 32), 8, 3, registers) for registers in (128, 255)),
        *(Config((64, columns), 4, stages, 255) for columns in (16, 32) for stages in (2, 3)),
    ],
    ("mixture_gradient", 2): [Config((64, 16), 4, 2, 255), Config((64, 16), 8, 2, 128)],
    ("scores", 2): [
        *(Config((128, 64), 8, 2, registers) for registers in (128, 255)),
        *(Config((64, columns), 4, 3, 255) for columns in (32, 64)),
    ],
}


def _milliseconds(run: Callable[[], object]) -> float:
    """A tenth of ten runs in a row, the median of five times."""
    run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(5)]
    for start, end in events:
        torch.cuda._sleep(10_000_000)  # else it would be the host's launches that are timed
        start.record()
        for _ in range(10):
            run()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[2] / 10


class Tuner:
    """What `autotune` has found: for every kind of call the milliseconds of its candidates."""

    def __init__(self, timer: Callable[[Callable[[], object]], float]):
        self.timer = timer
        self.found: dict[tuple, dict[Config, float]] = {}

    def fastest(self, line: tuple, case: Hashable, default: Config, run: Callable[[dict[str, Any]], object]) -> Config:
        on_gpu = torch.cuda.is_available()
        key = line, torch.cuda.current_device() if on_gpu else None, _bucket(case)
        if key not in self.found:
            if on_gpu and torch.cuda.is_current_stream_capturing():
                return default  # nothing can be timed there
            candidates = dict.fromkeys([default, *CANDIDATES.get(line[:2], [])])  # of equals the first is taken
            self.found[key] = {config: self._time(line, config, run) for config in candidates}
        times = self.found[key]
        return min(times, key=times.__getitem__)

    def _time(self, line: tuple, config: Config, run: Callable[[dict[str, Any]], object]) -> float:
        try:
            return self.timer(lambda: run(_options(line, config)))
        except (OutOfResources, PTXASError):
            return float("inf")

    def lines(self) -> str:
        """For TABLE, each with its time and that of the table's choice, and what was called."""
        lines = []
        for (line, _, case), times in self.found.items():
            best = min(times, key=times.__getitem__)
            time, by_table = f"{times[best]:.4f} ms", f"{times[heuristic(*line)]:.4f} by the table"
            lines.append(f"{line}: Config{tuple(best)},  # {time}, {by_table}: {case}")
        return "\n".join(lines)


def _bucket(case: Hashable) -> Hashable:
    """Sizes up to the next power of two."""
    if isinstance(case, tuple):
        return tuple(_bucket(x) for x in case)
    return triton.next_power_of_2(case) if type(case) is int and case > 0 else case


_tuner: Tuner | None = None


@contextmanager
def autotune(timer: Callable[[Callable[[], object]], float] = _milliseconds) -> Iterator[Tuner]:
    """Within, kernels run in the fastest configuration: launches repeat, and results may change in their last bits."""
    global _tuner
    before, _tuner = _tuner, Tuner(timer)
    try:
        yield _tuner
    finally:
        _tuner = before
