"""Models whose weights are spread over the processes of a run (FSDP2), one layer of which is whole at a time.

A student is sharded by accelerate (`--fsdp`), a teacher here. A sharded parameter is a DTensor of its whole shape.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial

from .processes import by_first


def is_asked_for(args: Any) -> bool:
    """Return whether transformers' arguments, or accelerate's launcher, ask for FSDP."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def is_sharded(model: Any) -> bool:
    """Return whether a model's weights are spread over processes."""
    return isinstance(model, FSDPModule)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of which each process may hold a shard; every process must ask for it.

    Gradients of what processes compute from it are averaged, as FSDP averages those of the weights inside its modules.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a tensor, or all of it if it is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard(model: Any, device: torch.device, *, stay: Sequence[Any] = (), **policy: Any) -> Any:
    """Spread the weights of a T5 over all processes, and return it: each layer is gathered when it computes.

    Every process must give the same model. What is in no layer, embedding and head above all, is one group, as T5 reads
    its embedding in four places. stay: layers, or the model itself for that group, which stay gathered between forward
    and backward pass. policy: more arguments of `torch.distributed.fsdp.fully_shard`.
    """
    # T5's blocks return views, which nothing changes in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*model.encoder.block, *model.decoder.block, model):
        gathered = {"reshard_after_forward": False} if any(module is other for other in stay) else {}
        fully_shard(module, mesh=mesh, **{"reshard_after_forward": True} | policy | gathered)
    if hasattr(model, "generate"):  # which runs the encoder by itself
        register_fsdp_forward_method(model, "generate")
    return model


def shard_of_first(load: Callable[[], Any], empty: Callable[[], Any], device: torch.device) -> Any:
    """Return the model that `load()` gives in the first process, sharded; no other process ever holds all of it.

    empty: makes the same model with weights of any values, for the other processes. What `load` raises, all raise.
    """
    loaded: list[Any] = []
    by_first(lambda: loaded.append(load()))
    model = loaded[0] if loaded else empty()
    weights = model.state_dict() if loaded else {}
    shard(model, device)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model


@torch.no_grad()
def unsharded(model: Any) -> Any:
    """Return a copy of a sharded model with whole weights on every process, in evaluation mode; others as they are."""
    if not is_sharded(model):
        return model
    from .models import auto_class

    plain = auto_class(model.config).from_config(model.config)
    plain.to(device=model.device, dtype=model.dtype)
    for name, parameter in model.named_parameters():
        if not name.startswith("hidden_projection."):  # of the training, no part of the model
            plain.get_parameter(name).copy_(whole(parameter))
    return plain.eval()
