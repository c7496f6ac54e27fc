"""What is measured: an op's problem, its implementations, and what is asked of fastkd's.

A run returns the tensors that its caller would keep: gradients, or the loss.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

OURS = "fastkd"

Run = Callable[[], tuple[Tensor, ...]]


class Unavailable(Exception):
    """Says why an implementation cannot run here."""


@dataclass(frozen=True)
class Target:
    """A bound on fastkd's time over that of another row or in milliseconds ("ms"), on its peak memory in MiB ("memory")
    or over that of another row ("memory / ROW"); or the least share of the limit ("of limit")."""

    quantity: str
    bound: float

    @property
    def relation(self) -> str:
        return ">=" if self.quantity == "of limit" else "<="

    def judged(self, rows: dict[str, dict]) -> dict:
        """The target beside what was measured, None where it was not."""
        ours = rows[OURS]
        if self.quantity == "memory":
            text, measured = f"{OURS} peak MiB", ours.get("peak_mib")
        elif self.quantity == "ms":
            text, measured = f"{OURS} ms", ours["min_s"] * 1e3 if "min_s" in ours else None
        elif self.quantity == "of limit":
            text, measured = f"{OURS} share of the limit", ours.get("of_limit")
        elif self.quantity.startswith("memory / "):
            text, peer = f"{OURS} {self.quantity}", rows[self.quantity.removeprefix("memory / ")].get("peak_mib")
            measured = ours["peak_mib"] / peer if peer and ours.get("peak_mib") is not None else None
        else:
            text, peer = f"{OURS} time / {self.quantity}", rows[self.quantity].get("min_s")
            measured = ours["min_s"] / peer if peer and "min_s" in ours else None
        met = None if measured is None else measured >= self.bound if self.relation == ">=" else measured <= self.bound
        return {"target": text, "relation": self.relation, "bound": self.bound, "measured": measured, "met": met}


@dataclass(frozen=True)
class Problem:
    title: str
    unit: str  # "GFLOP/s" or "GB/s"
    work: float  # FLOPs or bytes that the op needs
    limit: str  # the row that shows how fast this machine does such work
    implementations: tuple[str, ...]
    # Allocates the inputs; returns for each implementation and the limit a function that makes it ready to run, and the
    # function that computes what they should return in fp64.
    prepare: Callable[[], tuple[dict[str, Callable[[], Run]], Run]]
    targets: tuple[Target, ...] = ()
    limit_work: float | None = None  # of one run of the limit, where that is not `work`
    counts: tuple[float, float] | None = None  # FLOPs and the fewest bytes through memory, for the roofline

    @property
    def row_names(self) -> tuple[str, ...]:
        return (*self.implementations, self.limit)


# ---- what files of problems share ------------------------------------------------------------------------------------


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def normals(device: torch.device, dtype: torch.dtype = torch.float32) -> Callable[..., Tensor]:
    """A function of sizes that draws normal numbers, the same in every process."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).mul_(std).to(dtype)

    return normal


def gradients(loss: Callable[..., Tensor], arguments: Sequence[Any], inputs: Sequence[Tensor]) -> Run:
    """The run of a loss of these arguments, forward and backward."""
    return lambda: torch.autograd.grad(loss(*arguments), tuple(inputs))


def both_ways(loss: Callable[..., Tensor], ready: Callable[[Callable[..., Tensor]], Run]) -> dict[str, Callable]:
    """The rows of a function of fastkd: its kernels, and its reference, which is plain torch."""
    return {
        OURS: lambda: ready(partial(loss, impl="fused")),
        "reference": lambda: ready(partial(loss, impl="reference")),
    }


def held_to(context: Callable[[], contextlib.AbstractContextManager], run: Run) -> Run:
    """The run within a context."""

    def held() -> tuple[Tensor, ...]:
        with context():
            return run()

    return held


def noted(run: Run, note: str | None) -> Run:
    """The run with a remark for the table."""

    def with_note() -> tuple[Tensor, ...]:
        return run()

    with_note.note = note  # type: ignore[attr-defined]
    return with_note


def of_another_objective(run: Run) -> Run:
    """The run, whose results are not to be compared with the problem's: it is there for its time and memory."""
    run = noted(run, getattr(run, "note", None))
    run.of_another_objective = True  # type: ignore[attr-defined]
    return run


def peer(module: str, name: str) -> Any:
    """What another library has under this name."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        package = module.split(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == package
        raise Unavailable("not installed" if missing else str(error)) from error


def on_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Unavailable("needs a GPU")
