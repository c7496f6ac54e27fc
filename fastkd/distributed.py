"""Collective calls over a torch.distributed process group: sums and gathers, and what its processes have to agree on.

Each is one collective call, made by every process of the group in the same order, those without a valid token included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "GatheredColumns",
    "ReplicatedInput",
    "check_group",
    "gather",
    "gather_facts",
    "is_dtensor",
    "rank_in",
    "sum_",
    "total_means",
    "world_size",
]


def is_dtensor(x: object) -> bool:
    """Without importing what takes a second to, where nobody has made one."""
    if not isinstance(x, Tensor) or type(x) in (Tensor, torch.nn.Parameter):
        return False
    try:
        from torch.distributed.tensor import DTensor
    except ImportError:
        return False
    return isinstance(x, DTensor)


def check_group(group: object, name: str = "group") -> None:
    """Raises ValueError, TypeError or RuntimeError unless `group` is a process group that this process can use now."""
    if not dist.is_available():
        raise RuntimeError(f"{name}: expected None, because this build of torch has no torch.distributed")
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name}: expected a group that this process is a member of, got one that it is not")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{name}: expected a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    if not dist.is_initialized():
        raise RuntimeError(f"{name}: expected an initialised torch.distributed, call init_process_group first")
    try:
        rank = dist.get_rank(group)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected a group that exists, got one that has been destroyed") from error
    if rank < 0:
        raise ValueError(f"{name}: expected a group that this process is a member of, got one that it is not")


def world_size(group: dist.ProcessGroup) -> int:
    """How many processes the group has."""
    return dist.get_world_size(group)


def rank_in(group: dist.ProcessGroup) -> int:
    """This process's position in the group."""
    return dist.get_rank(group)


def sum_(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, of any shape, becomes its sum over the group, and is returned."""
    dist.all_reduce(x, group=group)
    return x


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...]: every rank's x [...], of the same shape on all."""
    gathered = x.new_empty(world_size(group), *x.shape)
    dist.all_gather(list(gathered.unbind(0)), x.contiguous(), group=group)
    return gathered


def gather_facts(facts: Tensor, group: dist.ProcessGroup) -> list[list[int]]:
    """Every rank's facts [n] int64, of the same n on all, as numbers at hand: on a GPU this waits for the device.

    They travel on a device that the group serves on every rank, wherever they were made.
    """
    devices = [entry.split(":")[0] for entry in dist.get_backend_config(group).split(",")]
    if "cpu" in devices:
        device = torch.device("cpu")
    else:
        device = facts.device if facts.device.type in devices else torch.device(devices[0])
    return gather(facts.to(device), group).tolist()


def total_means(
    counts: Sequence[Tensor], means: Sequence[Tensor], group: dist.ProcessGroup
) -> tuple[list[Tensor], list[Tensor]]:
    """Counts, 0-d each, and means [d] float64 over what all processes counted, from those over what each did."""
    sums = [torch.cat([count.double().view(1), count * mean]) for count, mean in zip(counts, means, strict=True)]
    totals = sum_(torch.cat(sums), group).split([x.numel() for x in sums])
    return [x[0] for x in totals], [x[1:] / x[0].clamp_min(1) for x in totals]


# ---- for a reference that is differentiated by autograd -------------------------------------------------------------


class GatheredColumns(torch.autograd.Function):
    """[..., sum(columns)] from every rank's [..., columns[rank]]; every rank computes the same from it."""

    @staticmethod
    def forward(ctx, x: Tensor, columns: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        rank = rank_in(group)
        ctx.own = slice(sum(columns[:rank]), sum(columns[: rank + 1]))
        padded = torch.nn.functional.pad(x, (0, max(columns) - x.shape[-1]))
        return torch.cat([shard[..., :n] for shard, n in zip(gather(padded, group), columns, strict=True)], -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad[..., ctx.own], None, None


class ReplicatedInput(torch.autograd.Function):
    """x, of which every rank computes another part of the same result: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return sum_(grad.clone(memory_format=torch.contiguous_format), ctx.group), None
