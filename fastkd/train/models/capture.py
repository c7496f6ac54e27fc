"""What a T5 computes on its way: queries, keys, values, hidden states, its head's input. No code is changed."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..common.family import PLACES


@contextlib.contextmanager
def capture_qkv(model: Any, layers: Mapping[str, int]) -> Iterator[dict[str, list[Any]]]:
    """Yield a dict in which a forward pass of `model` inside the context leaves [q, k, v] of each place.

    model: a bare T5; a wrapper around it, such as DDP, may be what runs. layers: each place's layer, counted from 1.
    q, k and v are the projections before they are split into heads, [B, L, heads * d_kv], as parts of the autograd
    graph; those of the last forward pass stay. The hooks go when the context ends, however it ends.
    Raises ValueError for a layer that the model lacks, and RuntimeError if a projection did not run inside the context,
    or if gradients are on when the context is entered and off when it ran, which is what reentrant activation
    checkpointing does.
    """
    captured: dict[str, list[Any]] = {place: [None, None, None] for place in layers}
    with contextlib.ExitStack() as hooks:
        for place, layer in layers.items():
            attention = attention_module(model, place, layer)
            for i, projection in enumerate((attention.q, attention.k, attention.v)):
                keep = functools.partial(_keep, captured[place], i, torch.is_grad_enabled())
                hooks.enter_context(projection.register_forward_hook(keep))
        yield captured
    for place, states in captured.items():
        if any(state is None for state in states):
            raise RuntimeError(f"{place}: q, k and v of layer {layers[place]} did not all run inside the capture")


def attention_module(model: Any, place: str, layer: int) -> Any:
    """Return the attention of `place` in the given layer, counted from 1; raises ValueError if there is no such."""
    where = PLACES[place]
    blocks = getattr(model, where.stack).block
    if not 1 <= layer <= len(blocks):
        raise ValueError(f"layer: expected 1 to {len(blocks)} in this {where.stack}, got {layer}")
    return getattr(blocks[layer - 1].layer[where.sublayer], where.module)


def _keep(states: list[Any], i: int, needs_graph: bool, projection: Any, inputs: Any, output: torch.Tensor) -> None:
    if needs_graph and projection.weight.requires_grad and not output.requires_grad:
        raise RuntimeError("captured states have no gradient under reentrant checkpointing: set use_reentrant to False")
    states[i] = output


@contextlib.contextmanager
def capture_hidden(model: Any, layers: Mapping[str, Sequence[int]]) -> Iterator[list[Any]]:
    """Yield a list in which a forward pass of `model` inside the context leaves hidden states [B, L, H].

    layers: which of each stack, "encoder" and "decoder", numbered as transformers does: 0 is the embeddings, i the
    output of layer i, and the last the output of the stack, after its final layer norm. The list has their order.
    Unlike `output_hidden_states=True` this keeps no state alive that was not asked for.
    """
    wanted = [(stack, layer) for stack, numbers in layers.items() for layer in numbers]
    captured: list[Any] = [None] * len(wanted)
    with contextlib.ExitStack() as hooks:
        for i, (stack_name, layer) in enumerate(wanted):
            stack = getattr(model, stack_name)
            keep = functools.partial(operator.setitem, captured, i)
            if layer < len(stack.block):
                hook = stack.block[layer].register_forward_pre_hook(lambda block, inputs, keep=keep: keep(inputs[0]))
            else:
                hook = stack.register_forward_hook(lambda stack, inputs, output, keep=keep: keep(output[0]))
            hooks.enter_context(hook)
        yield captured


@contextlib.contextmanager
def without_head(model: Any) -> Iterator[None]:
    """Make `model(...)` return as its "logits" what the head would have been given: hidden states [B, L, H].

    The head becomes the identity while the context lasts. So every scaling of the decoder's output is applied, no
    [B, L, V] tensor is made, no model code is edited, and it works inside DDP, whose wrapper runs as usual.
    """
    head = model.get_output_embeddings()
    before = vars(head).get("forward")  # accelerate's hooks, for one, set a forward on the instance
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward
        if before is not None:
            head.forward = before
