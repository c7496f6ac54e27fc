"""What the processes of a run do together: the first of them makes files and prints, and the others go by it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def count() -> int:
    """Return how many processes train together; 1 outside torchrun and the like."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Return whether this process makes the files."""
    return count() == 1 or dist.get_rank() == 0


def agreed(value: T) -> T:
    """Return the first process's `value` on all of them."""
    if count() == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def by_first(work: Callable[[], T]) -> T:
    """Return what `work()` returns in the first process, which alone calls it; if it raises, all raise the same.

    What it returns, or raises, must be of a kind that pickle knows.
    """
    result, error = None, None
    if is_first():
        try:
            result = work()
        except Exception as caught:
            error = caught
    result, error = agreed((result, error))
    if error is not None:
        error.was_elsewhere = not is_first()  # type: ignore[attr-defined]
        raise error
    return result  # type: ignore[return-value]


def is_lost_process(error: BaseException) -> bool:
    """Return whether an error says that another process does not answer any more."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def print_by_first_only() -> None:
    """Leave standard output to the first process that torchrun started."""
    if launched_rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for as long as the process lives)


def launched_rank() -> int:
    """Return this process's number as its launcher gave it, also before a process group exists."""
    return int(os.environ.get("RANK", "0"))
