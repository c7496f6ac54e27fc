"""Learning rates of their own, and the gradients' norms."""

from __future__ import annotations

from typing import Any

import torch

from ...heads import gathered, unwrapped
from ..models.anatomy import family


def set_own_rate(optimizer: torch.optim.Optimizer, module: torch.nn.Module, learning_rate: float) -> None:
    """Move a module's parameters into a group of their own with `learning_rate`, before the scheduler is made.

    Why an embedding needs one: T5's tied embedding starts at standard deviation 1 and is read by the head at
    d_model^-0.5, while projections start at about d_model^-0.5. AdamW moves every weight by about its learning rate per
    step whatever the weight's size, so one rate for all either leaves the embedding where it is or breaks the
    projections. Adafactor, and AdamW with steps scaled by the weights' RMS (nanoT5, Nawrot, 2023, arXiv 2309.02373),
    solve it for every tensor; the embedding is the one that matters here, and one more number is easier to follow.
    """
    moved = {id(parameter) for parameter in module.parameters()}
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in moved]
        if own:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
            optimizer.add_param_group({**group, "params": own, "lr": learning_rate})


def gradient_norms(model: Any, scaler: Any = None) -> dict[str, torch.Tensor]:
    """Return the L2 norms of the gradients of the stacks that a model has, without the embedding, and of the rest.

    By name, which are STACKS and, for the rest, words. scaler: the GradScaler that fp16 losses were scaled by. Nothing
    is waited for, and no gradient is changed.
    """
    model = unwrapped(model)
    shared, row = model.get_input_embeddings().weight, family(model)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    stacks = {name: f"{prefix}{module}".rstrip(".") + "." for name, (module, _) in row.stacks.items()}
    scale = 1.0 if scaler is None else scaler.scale(torch.ones((), device=shared.device))
    rest = f"embedding (or what else is outside {' and '.join(stacks)})"
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in (*stacks, rest)}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part = next((part for part, start in stacks.items() if name.startswith(start)), rest)
            parts[rest if parameter is shared else part].append(parameter.grad)
    norms = {part: gathered(torch.nn.utils.get_total_norm(gradients)) for part, gradients in parts.items()}
    return {part: norm.to(shared.device).float() / scale for part, norm in norms.items()}
