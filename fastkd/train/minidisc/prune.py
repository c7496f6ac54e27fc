"""Structured pruning of T5 and BERT into nested sub-networks (MiniDisc, Zhang et al., 2024, arXiv 2205.14570).

Attention heads and feed-forward neurons are ranked by how much the loss feels them, and every layer's weights are put
in the order of the ranks. Then each sub-network is a prefix of every matrix, smaller ones lie within larger ones, and
all of them can share one set of weights.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..models import anatomy
from ..models.architectures import EncT5ForSequenceClassification, Part, PrunedT5ForConditionalGeneration, parts
from ..models.pruned_bert import PrunedBertForMaskedLM, PrunedBertForSequenceClassification

# The class of what is left, by family and kind; row.prunes says so of the former.
PRUNED: dict[tuple[str, str], Any] = {
    ("T5", "seq2seq"): PrunedT5ForConditionalGeneration,
    ("EncT5", "classifier"): EncT5ForSequenceClassification,
    ("BERT", "masked"): PrunedBertForMaskedLM,
    ("BERT", "classifier"): PrunedBertForSequenceClassification,
}
WIDTH_MULTIPLE = 8  # of neurons, as fast GEMMs want them

Widths = Mapping[str, int]  # units that are kept, by the name of a part


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

    Heads and neurons carry a mask of ones, which moves nothing; weights get no gradient. batches: arguments of
    `model(...)`, labels included. The model is in evaluation mode meanwhile.
    """
    mode, device = model.training, next(model.parameters()).device
    masks = {name: torch.ones(part.units, device=device, requires_grad=True) for name, part in parts(model).items()}
    sums = {name: torch.zeros(part.units, device=device) for name, part in parts(model).items()}
    model.eval()
    try:
        for batch in batches:
            with torch.enable_grad(), masked(model, masks):
                loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            # A part without units, as a model that was pruned before may have, leaves its mask unused.
            gradients = torch.autograd.grad(loss, list(masks.values()), allow_unused=True, materialize_grads=True)
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total += gradient.abs()
    finally:
        model.train(mode)
    return sums


def normalised(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return scores divided by their L2 norm in each part, so that layers compare; zeros stay zeros."""
    return {name: score / score.norm().clamp_min(torch.finfo(score.dtype).tiny) for name, score in scores.items()}


def of_kind(scores: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the names of the parts with heads, and of those with neurons."""
    heads = [name for name in scores if name.lower().endswith("attention")]
    return {"heads": heads, "neurons": [name for name in scores if name not in heads]}


def widths_at(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """Return the widths that are left when the lowest `round(sparsity * total)` heads, and neurons, are pruned.

    scores: normalised, of all parts. Units are ranked over all layers at once, heads and neurons apart. Numbers of
    neurons are rounded to multiples of 8. What a higher sparsity leaves is a part of what a lower one leaves.
    Other than in the paper, the most important head of all cross-attentions is pruned last, as without it no answer
    could depend on what is read.
    """
    scores, widths = _with_cross_attention(scores), {}
    for kind, names in of_kind(scores).items():
        lengths = torch.tensor([len(scores[name]) for name in names])
        owner = torch.arange(len(names)).repeat_interleave(lengths)
        order = torch.cat([scores[name].cpu() for name in names]).argsort(stable=True)
        kept = owner[order[round(sparsity * len(order)) :]].bincount(minlength=len(names)).tolist()
        for name, units, most in zip(names, kept, lengths.tolist(), strict=True):
            rounded = int(units / WIDTH_MULTIPLE + 0.5) * WIDTH_MULTIPLE
            widths[name] = units if kind == "heads" else min(rounded, most)
    return {name: widths[name] for name in scores}


def _with_cross_attention(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return scores among which one of the most important cross-attention head is the highest."""
    raised = {name: score.clone() for name, score in scores.items()}
    cross = [score for name, score in raised.items() if name.endswith("EncDecAttention") and len(score)]
    if cross:
        best = max(cross, key=lambda score: float(score.max()))
        best[best.argmax()] = torch.inf
    return raised


def order_of(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the units of every part, the most important first."""
    return {name: score.argsort(descending=True, stable=True) for name, score in scores.items()}


@torch.no_grad()
def sliced(model: Any, widths: Widths, order: Mapping[str, Tensor] | None = None) -> Any:
    """Return a dense model with the first `widths` units of every part of a T5, an EncT5 or a BERT, pruned or not.

    order: of the units, see `order_of`; by default that which they have. With all widths this reorders a model, which
    goes on computing what it did. The result shares no weights with the model, and is of a class in `PRUNED`.
    Raises ValueError if a width is not one that the model has.
    """
    selected: dict[str, tuple[int, Tensor]] = {}  # parameter -> (dimension, indices)
    for name, part in _checked(model, widths).items():
        units = (torch.arange(part.units) if order is None else order[name].cpu())[: widths[name], None]
        for module, parameter, dimension, size in _matrices(part):
            selected[f"{name}.{module}.{parameter}"] = dimension, (units * size + torch.arange(size)).flatten()

    made = skeleton(model, widths)
    sources, own = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_parameters())
    state: dict[str, Tensor] = {}
    for name in dict(made.named_parameters(remove_duplicate=False)):
        if name in sources and name not in own:
            continue  # it is shared below
        # Later layers of a model that shares it have no table of positions.
        first = f"{name.partition('.')[0]}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        source = sources[name if name in sources else first]
        dimension, indices = selected.get(name, (0, None))
        state[name] = source.clone() if indices is None else source.index_select(dimension, indices.to(source.device))
    made.load_state_dict(state, strict=False, assign=True)
    for name, buffer in model.named_buffers():  # which no checkpoint has, as BERT's numbers of positions
        module, _, attribute = name.rpartition(".")
        setattr(made.get_submodule(module), attribute, buffer.clone())
    _tie_as(made, model)
    return made.train(model.training)


def _matrices(part: Part) -> list[tuple[str, str, int, int]]:
    """Return (module, parameter, dimension, rows or columns of a unit) of all that are units' along a dimension."""
    inner = [(name, parameter, 0, part.size) for name in part.inner for parameter in ("weight", "bias")]
    table = [("relative_attention_bias", "weight", 1, 1)] if part.kind == "heads" else []
    return [*inner, (part.outer, "weight", 1, part.size), *table]


def _checked(model: Any, widths: Widths) -> dict[str, Part]:
    """Return the model's parts; raises ValueError if the widths are not from 0 to those they have."""
    found = parts(model)
    for name, part in found.items():
        if not 0 <= widths[name] <= part.units:
            raise ValueError(f"widths: expected 0 to {part.units} {part.kind} in {name}, got {widths[name]}")
    return found


def pruned_config(model: Any, widths: Widths) -> Any:
    """Return the config of the dense model that `sliced` would return."""
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    config = _class_of(model).config_class.from_dict(settings)
    config.widths = {name: int(width) for name, width in widths.items()}
    if "decoder" in anatomy.family(model).stacks:
        config.scale_decoder_outputs = getattr(model.config, "scale_decoder_outputs", False)  # mT5 never does
    return config


def _class_of(model: Any) -> Any:
    return PRUNED[anatomy.family(model).name, anatomy.kind(model)]


def skeleton(model: Any, widths: Widths) -> Any:
    """Return the dense model that `sliced` would, without weights, on the meta device."""
    config = pruned_config(model, widths)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        made = _class_of(model)(config)
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    _tie_as(made, model)
    return made


def _tie_as(made: Any, model: Any) -> None:
    """Share the parameters of a model that another one shares."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            module, _, attribute = name.rpartition(".")
            setattr(made.get_submodule(module), attribute, made.get_parameter(known))


@contextlib.contextmanager
def narrowed(model: Any, widths: Widths) -> Iterator[None]:
    """Let a model of a class in `PRUNED` compute with the first `widths` units of every part while the context lasts.

    Its parameters are back afterwards, and gradients arrive in them, zero beyond the sub-network, if the backward pass
    is inside the context too when activation checkpointing computes anything again. Not inside of another such context.
    Raises ValueError if a width is not one that the model has.
    """
    with contextlib.ExitStack() as undo:
        for name, part in _checked(model, widths).items():
            module, units = model.get_submodule(name), widths[name]
            within = dict(module.named_modules())
            for inside, parameter, dimension, size in _matrices(part) if units != part.units else ():
                own = getattr(within.get(inside), parameter, None)
                if own is not None:
                    holder: Any = within[inside]
                    undo.callback(holder.register_parameter, parameter, own)
                    holder._parameters[parameter] = own.narrow(dimension, 0, units * size)
            if hasattr(module, "n_heads"):  # T5's; others see how many there are
                module.n_heads = units
                undo.callback(setattr, module, "n_heads", part.units)
        yield
