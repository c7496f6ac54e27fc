"""What the processes of a run do together: the first of them makes files and prints, and the others go by it."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from .endings import launched_rank

T = TypeVar("T")


_alone = False  # whether this process works for all of them
_patience = timedelta(minutes=30)  # with the other processes, as of transformers' --ddp_timeout
_patient: dict[Any, Any] = {}  # of the group of all processes


def count() -> int:
    """Return how many processes work together; 1 outside torchrun and the like, and where one works for all."""
    return dist.get_world_size() if not _alone and dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Return whether this process makes the files."""
    return count() == 1 or dist.get_rank() == 0


def be_patient(seconds: float, on_cpus: bool, backend: str | None = None) -> None:
    """Wait for other processes so long, and no longer, from the first time that there is anything to wait for.

    on_cpus: whether the processes compute there. Their group is made here, as transformers would give it no limit.
    """
    global _patience
    _patience = timedelta(seconds=seconds)
    if on_cpus and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group(backend or "gloo", timeout=_patience)


def patient_group() -> Any:
    """Return a group of the CPUs of all processes, which waits for one that reads a corpus as long as it may take."""
    if dist.group.WORLD not in _patient:
        _patient.clear()
        _patient[dist.group.WORLD] = dist.new_group(backend="gloo", timeout=_patience)
    return _patient[dist.group.WORLD]


def own_part(items: Sequence[T]) -> Sequence[T]:
    """Return this process's of the items, which all processes share."""
    return items[dist.get_rank() :: count()] if count() > 1 else items


def agreed(value: T) -> T:
    """Return the first process's `value` on all of them."""
    if count() == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0, group=patient_group())
    return values[0]


def of_all(value: T) -> list[T]:
    """Return every process's `value`, by their numbers."""
    values: list[Any] = [value] * count()
    if count() > 1:
        dist.all_gather_object(values, value, group=patient_group())
    return values


def by_first(work: Callable[[], T]) -> T:
    """Return what `work()` returns in the first process, which alone calls it; if it raises, all raise the same.

    What it returns, or raises, must be of a kind that pickle knows. Inside, the first process is on its own.
    """
    global _alone
    if count() == 1:
        return work()
    result, error = None, None
    if is_first():
        _alone = True
        try:
            result = work()
        except Exception as caught:
            error = caught
        finally:
            _alone = False
    result, error = agreed((result, error))
    if error is not None:
        error.was_elsewhere = not is_first()  # type: ignore[attr-defined]
        raise error
    return result  # type: ignore[return-value]


def leave() -> None:
    """End what processes do together; threads that still wait for others might crash a process that just ends."""
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # models whose gradients the group added up end before it: its end might wait for theirs for ever
        dist.destroy_process_group()


def is_lost_process(error: BaseException) -> bool:
    """Return whether an error says that another process does not answer any more."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def print_by_first_only() -> None:
    """Leave standard output to the first process that torchrun started; letters that it cannot show become escapes."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    if launched_rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for as long as the process lives)
