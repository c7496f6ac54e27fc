"""What the processes of a training share: the student's weights (FSDP2), and counts of what is in their batches."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from ..common.family import PLACES
from ..models.anatomy import layers
from ..models.sharding import is_asked_for, shard
from ..objectives.terms import valid_positions


def settle_fsdp(state: Any, args: Any) -> bool:
    """Turn FSDP on where transformers' arguments ask for it, in accelerate's state; return whether it is on.

    accelerate turns it on by itself on GPUs and the like, torch has it on CPUs too.
    Raises ValueError for settings that do not fit.
    """
    if state.distributed_type == DistributedType.MULTI_CPU and is_asked_for(args):
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
        if state.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None:
        return False
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError("fsdp: expected version 2, as version 1 lets nobody read a head outside its module")
    if plugin.activation_checkpointing:
        raise ValueError("fsdp: its activation_checkpointing is not supported, --gradient_checkpointing is")
    return True


def shard_student(student: Any, device: torch.device, plugin: Any, within: Mapping[str, int]) -> None:
    """Shard a student as accelerate's plugin says; accelerate takes models that are sharded already.

    Its own way puts T5's embedding, which encoder, decoder and head share, into two groups, which torch refuses.
    within: the places, and their layers, that are captured where the loss need not be of a block's output, whose
    gradient would gather the block.
    """
    policy = {"reshard_after_forward": plugin.reshard_after_forward, "offload_policy": plugin.cpu_offload}
    if plugin.mixed_precision_policy is not None:
        policy["mp_policy"] = plugin.mixed_precision_policy
    plugin.auto_wrap_policy = None  # there is nothing left to wrap
    blocks = [layers(student, PLACES[place].stack)[layer - 1] for place, layer in within.items()]
    shard(student, device, stay=[*blocks, student], **policy)


def count_rows(
    accelerator: Accelerator,
    batches: Sequence[dict[str, Any]],
    kind: str,
    sides: Collection[str],
    device: torch.device,
    of_all: bool,
) -> None:
    """Count the positions of sides as transformers counts targets: over all accumulated batches, `of_all` processes.

    kind: the student's, of KINDS. Every batch carries the counts as "encoder_rows" and "decoder_rows".
    """
    for side in sides:
        rows = torch.stack([valid_positions(kind, batch)[side].sum() for batch in batches]).sum().to(device)
        if of_all:
            rows = accelerator.gather(rows).sum()
        for batch in batches:
            batch[f"{side}_rows"] = rows
