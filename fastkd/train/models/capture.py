"""What a model computes on its way: queries, keys, values, hidden states, its head's input. No code is changed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .anatomy import family, layers, projections, stack


@contextlib.contextmanager
def capture_qkv(model: Any, layers: Mapping[str, int]) -> Iterator[dict[str, list[Any]]]:
    """Yield a dict in which a forward pass of `model` inside the context leaves [q, k, v] of each place.

    model: a bare model; a wrapper around it, such as DDP, may be what runs. layers: each place's layer, counted from 1.
    q, k and v are the projections before they are split into heads, and before rotary embeddings or norms of single
    heads, [B, L, heads * width of a head], where keys and values may have fewer heads; as parts of the autograd graph;
    those of the last forward pass stay. The hooks go when the context ends, however it ends.
    Raises ValueError for a layer that the model lacks, and RuntimeError if a projection did not run inside the context,
    or if gradients are on when the context is entered and off when it ran, which is what reentrant activation
    checkpointing does.
    """
    captured: dict[str, list[Any]] = {place: [None, None, None] for place in layers}
    with contextlib.ExitStack() as hooks:
        for place, layer in layers.items():
            inner = projections(model, place, layer)
            for i, projection in enumerate(inner):
                where = slice(i, i + 1) if len(inner) > 1 else slice(None)  # one alone computes all three
                keep = functools.partial(_keep, captured[place], where, torch.is_grad_enabled())
                hooks.enter_context(projection.register_forward_hook(keep))
        yield captured
    for place, states in captured.items():
        if any(state is None for state in states):
            raise RuntimeError(f"{place}: q, k and v of layer {layers[place]} did not all run inside the capture")


def _keep(
    states: list[Any], where: slice, needs_graph: bool, projection: Any, inputs: Any, output: torch.Tensor
) -> None:
    if needs_graph and not output.requires_grad and any(weight.requires_grad for weight in projection.parameters()):
        raise RuntimeError("captured states have no gradient under reentrant checkpointing: set use_reentrant to False")
    parts = len(states[where])
    states[where] = [output] if parts == 1 else output.chunk(parts, -1)


@contextlib.contextmanager
def capture_hidden(model: Any, wanted: Mapping[str, Sequence[int]]) -> Iterator[dict[str, list[Any]]]:
    """Yield a dict in which a forward pass of `model` inside the context leaves hidden states [B, L, H] of each stack.

    model: a bare model; a wrapper around it, such as DDP, may be what runs. wanted: which of each stack, "encoder" and
    "decoder", numbered as transformers does: 0 is the embeddings, i the output of layer i, and the last the output of
    the stack, after a final norm if it has one. The lists have their order. Unlike `output_hidden_states=True` this
    keeps no state alive that was not asked for, and works with `fastkd.hidden_states`.
    Raises ValueError for a stack or a state that the model lacks, and RuntimeError if one was not computed inside the
    context.
    """
    captured: dict[str, list[Any]] = {name: [None for _ in numbers] for name, numbers in wanted.items()}

    def keep(of: list[Any], i: int, module: Any, args: Any, kwargs: Any, output: Any = None) -> None:
        of[i] = output[0] if output is not None else args[0] if args else kwargs["hidden_states"]

    with contextlib.ExitStack() as hooks:
        for name, numbers in wanted.items():
            if name not in family(model).stacks:
                raise ValueError(f"wanted: expected {' and '.join(family(model).stacks)}, as in this model, got {name}")
            blocks = layers(model, name)
            for i, number in enumerate(numbers):
                if not 0 <= number <= len(blocks):
                    raise ValueError(f"wanted: expected states 0 to {len(blocks)} of this {name}, got {number}")
                own = functools.partial(keep, captured[name], i)
                if number < len(blocks):
                    hook = blocks[number].register_forward_pre_hook(own, with_kwargs=True)
                else:
                    hook = stack(model, name).register_forward_hook(own, with_kwargs=True)
                hooks.enter_context(hook)
        yield captured
    for name, states in captured.items():
        if any(state is None for state in states):
            raise RuntimeError(f"{name}: states {[*wanted[name]]} were not all computed inside the capture")
