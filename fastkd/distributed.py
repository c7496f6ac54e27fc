"""Sums over a torch.distributed process group, for losses that need the statistics of the whole batch.

Each is one collective call, made by every process of the group in the same order, those without a valid token included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["check_group", "sum_", "total_means", "world_size"]


def check_group(group: object) -> None:
    if not dist.is_available():
        raise RuntimeError("group: expected None, because this build of torch has no torch.distributed")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a torch.distributed.ProcessGroup or None, got {type(group).__name__}")


def world_size(group: dist.ProcessGroup) -> int:
    return dist.get_world_size(group)


def sum_(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x becomes its sum over the group."""
    dist.all_reduce(x, group=group)
    return x


def total_means(
    counts: Sequence[Tensor], means: Sequence[Tensor], group: dist.ProcessGroup
) -> tuple[list[Tensor], list[Tensor]]:
    """Counts, 0-d each, and means [d] float64 over what all processes counted, from those over what each did."""
    sums = [torch.cat([count.double().view(1), count * mean]) for count, mean in zip(counts, means, strict=True)]
    totals = sum_(torch.cat(sums), group).split([x.numel() for x in sums])
    return [x[0] for x in totals], [x[1:] / x[0].clamp_min(1) for x in totals]
