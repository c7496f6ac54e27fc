"""The parts of a model of whatever family: its stacks, layers, projections and head; and its shape."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ... import heads
from ..common.family import KINDS, PLACES, Family, family_of, is_enct5, kind_of


def family(model: Any) -> Family:
    """Return the row of a model."""
    return family_of(model.config)


def kind(model: Any) -> str:
    """Return the name of a model's kind, by its class."""
    return kind_of(model.config, type(heads.unwrapped(model)).__name__)


def auto_class(config: Any) -> Any:
    """Return the class of transformers that makes and loads models of a config."""
    return getattr(transformers, KINDS[kind_of(config)].auto)


def stack(model: Any, name: str) -> Any:
    """Return the module "encoder" or "decoder" of a model, whose output are its last hidden states."""
    return heads.unwrapped(model).base_model.get_submodule(family(model).stacks[name][0])


def layers(model: Any, name: str) -> Any:
    """Return the list of the layers of "encoder" or "decoder"."""
    return getattr(stack(model, name), family(model).stacks[name][1])


def every_layer(model: Any) -> list[Any]:
    """Return the layers of all stacks, the encoder's first."""
    return [layer for name in family(model).stacks for layer in layers(model, name)]


def projections(model: Any, place: str, layer: int) -> list[Any]:
    """Return the modules that compute queries, keys and values at a place in the given layer, counted from 1.

    One alone computes all three. Raises ValueError if there is no such layer.
    """
    name = PLACES[place].stack
    every = layers(model, name)
    if not 1 <= layer <= len(every):
        raise ValueError(f"layer: expected 1 to {len(every)} in this {name}, got {layer}")
    return [every[layer - 1].get_submodule(inner) for inner in family(model).attentions[place].inner]


def head_module(model: Any) -> Any:
    """Return the layer that makes logits: of the vocabulary, or of classes."""
    path = family(model).classifier if kind(model) == "classifier" else ""
    return heads.unwrapped(model).get_submodule(path) if path else model.get_output_embeddings()


def head_of(model: Any) -> heads.Head:
    """Return what makes logits of what the head is given, gathered if it is sharded."""
    given = head_module(model) if kind(model) == "classifier" else model
    return heads.head(given, sharding="data")._replace(scale=1.0)  # what it is given is scaled already, as T5 does


def logits(hidden: torch.Tensor, head: heads.Head, vocabulary: int | None = None) -> torch.Tensor:
    """Return the logits [..., V] (fp32) of the first `vocabulary` entries, by default all, of what a head is given."""
    bias = None if head.bias is None else head.bias[:vocabulary]
    made = torch.nn.functional.linear(hidden, head.weight[:vocabulary], bias).float()
    return made if head.softcap is None else head.softcap * torch.tanh(made / head.softcap)


@dataclass(frozen=True)
class Shape:
    """What the losses, and what slices and prunes, need to know of a model that need not be there.

    width: of hidden states. depths: layers by stack. widths: of queries, keys and values at each place, by layer.
    """

    width: int
    depths: Mapping[str, int]
    widths: Mapping[str, list[list[int]]]


def shape(config: Any) -> Shape:
    """Return the shape of the models of a config, read from one without weights."""
    settings = config.to_dict() | {"architectures": config.architectures, "model_type": config.model_type}
    return _shape(json.dumps(settings, sort_keys=True, default=str))


@functools.lru_cache(maxsize=32)
def _shape(settings: str) -> Shape:
    known = json.loads(settings)
    config = transformers.AutoConfig.for_model(known.pop("model_type"), **known)
    with unset_fake_temporarily(), torch.device("meta"):  # there may be fake tensors around, see plan.py
        return shape_of(auto_class(config).from_config(config))


def shape_of(model: Any) -> Shape:
    """Return the shape of a model."""
    row = family(model)
    depths = {name: len(layers(model, name)) for name in row.stacks}
    widths = {}
    for place in row.attentions:
        every = [projections(model, place, layer + 1) for layer in range(depths[PLACES[place].stack])]
        widths[place] = [[width for module in inner for width in _outputs(module, len(inner))] for inner in every]
    return Shape(model.config.hidden_size, depths, widths)


def _outputs(projection: Any, beside: int) -> list[int]:
    """Return how many numbers a projection computes for a token; a third for each if it stands for all three."""
    outputs = projection.nf if hasattr(projection, "nf") else projection.out_features  # transformers' Conv1D
    return [outputs // 3] * 3 if beside == 1 else [outputs]


def compared_stacks(config: Any) -> list[str]:
    """Return the stacks whose hidden states are of text: an EncT5's decoder reads one prompt."""
    return [name for name in family_of(config).stacks if not (name == "decoder" and is_enct5(config))]
