"""Which heads and neurons of a teacher matter: how much the loss feels each, measured once and kept in the cache."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..common.cache import cached
from ..common.errors import InputError
from ..flags.arguments import TransformersArguments
from ..flags.fields import FastkdArguments
from ..models.architectures import parts
from ..stages.identity import digest
from ..stages.prepare import Data
from ..stages.stages import data_seed

VERSION = 2  # raise it when measuring changes what it gives, so that older files are not reused


@contextlib.contextmanager
def masked(model: Any, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply each unit's output by its mask while the context lasts: masks[part] is [units]."""
    with contextlib.ExitStack() as hooks:
        for name, part in parts(model).items():
            if name in masks:

                def multiply(module: Any, inputs: Any, mask: Tensor = masks[name], size: int = part.size) -> Any:
                    return (inputs[0] * mask.repeat_interleave(size).to(inputs[0].dtype),)

                outer = model.get_submodule(f"{name}.{part.outer}")
                hooks.callback(outer.register_forward_pre_hook(multiply).remove)
        yield


def importance(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return how much the loss feels each unit: the sum over batches of |d loss / d mask|, [units] (fp32) per part.

    Heads and neurons carry a mask of ones, which moves nothing; the weights get no gradient. batches: arguments of
    `model(...)`, labels included. The model is in evaluation mode meanwhile.
    """
    mode, device = model.training, next(model.parameters()).device
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masks = {name: torch.ones(part.units, device=device, requires_grad=True) for name, part in parts(model).items()}
    sums = {name: torch.zeros(part.units, device=device) for name, part in parts(model).items()}
    model.eval().requires_grad_(False)
    try:
        for batch in batches:
            with torch.enable_grad(), masked(model, masks):
                loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            # A part without units, as a model that was pruned before may have, leaves its mask unused.
            gradients = torch.autograd.grad(loss, list(masks.values()), allow_unused=True, materialize_grads=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total += gradient.abs()
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        model.train(mode)
    return sums


def normalised(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return scores divided by their L2 norm in each part, so that layers compare; zeros stay zeros."""
    return {name: score / score.norm().clamp_min(torch.finfo(score.dtype).tiny) for name, score in scores.items()}


def held_out_for_importance(flags: FastkdArguments, args: TransformersArguments, data: Data) -> tuple[Data, Any]:
    """Return (the data to train on, the examples that importance is measured on)."""
    seed = data_seed(args)
    if flags.importance_on == "dev":
        return data, data.held_out
    size = len(data.train)
    count = min(flags.importance_examples, size // 5)
    if count < 1:
        raise InputError(f"--importance_on train: {size} training examples are too few to hold any out; give dev")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    examples, rest = (data.train.select(sorted(part)) for part in (order[:count], order[count:]))
    unit = "training_chunks" if "training_chunks" in data.facts else "training_examples"
    known = hashlib.sha256(json.dumps([data.digest, seed, count]).encode()).hexdigest()[:16]
    facts = {**data.facts, unit: size - count, "importance_examples": count}
    return dataclasses.replace(data, train=rest, digest=known, facts=facts), examples


def rank(
    args: TransformersArguments, cache: Path, data: Data, examples: Any, teacher: Any
) -> tuple[dict[str, torch.Tensor], str]:
    """Return (the normalised importance of the teacher's units, what tells it and the teacher from others).

    It is measured on the examples, or taken from the cache if it was measured before.
    """
    settings = {
        "version": VERSION,
        "teacher": digest(teacher),
        "data": data.digest,
        "examples": len(examples),
        "batch": args.per_device_train_batch_size,
    }

    def make(folder: Path) -> None:
        batches = DataLoader(examples, args.per_device_train_batch_size, collate_fn=data.collate)
        scores = importance(teacher, tqdm(batches, desc="measuring importance", unit="batch"))
        save_file({name: score.cpu() for name, score in scores.items()}, folder / "importance.safetensors")

    folder, _ = cached(cache, "importance", settings, make, says=True)
    scores = load_file(folder / "importance.safetensors")
    return normalised({name: scores[name] for name in parts(teacher)}), folder.name
