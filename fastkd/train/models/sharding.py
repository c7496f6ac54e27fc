"""Models whose weights are spread over the processes of a run (FSDP2), one layer of which is whole at a time.

A student is sharded by accelerate (`--fsdp`), a teacher here. A sharded parameter is a DTensor of its whole shape.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from .anatomy import every_layer


def is_asked_for(args: Any) -> bool:
    """Return whether transformers' arguments, or accelerate's launcher, ask for FSDP."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def is_sharded(model: Any) -> bool:
    """Return whether a model's weights are spread over processes."""
    return isinstance(model, FSDPModule)


def not_finite(model: Any) -> str | None:
    """Return the first weight of which this process holds a number that is not finite, or None."""
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight.to_local() if isinstance(weight, DTensor) else weight).all():
            return str(name)
    return None


def shard(model: Any, device: torch.device, *, stay: Sequence[Any] = (), **policy: Any) -> Any:
    """Spread the weights of a model over all processes, and return it: each layer is gathered when it computes.

    Every process must give the same model. What is in no layer, embedding and head above all, is one group, as T5 reads
    its embedding in four places. stay: layers, or the model itself for that group, which stay gathered between forward
    and backward pass. policy: more arguments of `torch.distributed.fsdp.fully_shard`.
    """
    # T5's blocks return views, which nothing changes in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*every_layer(model), model):
        gathered = {"reshard_after_forward": False} if any(module is other for other in stay) else {}
        fully_shard(module, mesh=mesh, **{"reshard_after_forward": True} | policy | gathered)
    if hasattr(model, "generate"):  # which runs the encoder by itself
        register_fsdp_forward_method(model, "generate")
    return model
