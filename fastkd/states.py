"""What a model's head is given, through whatever is around the model; and the labels that belong to it.

With `fastkd.head` these make the loss of a loop two lines, the same ones for every family and wrapper:

    hidden = fastkd.hidden_states(student, **inputs)
    loss = fastkd.linear_kl(hidden, fastkd.head(student), teacher_hidden, fastkd.head(teacher),
                            **fastkd.targets(student, inputs["labels"], num_items_in_batch))

B sequences, L positions, H hidden width.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import is_dtensor
from .heads import SCALED_IF_TIED, head_module, known

__all__ = ["head_input", "hidden_states", "shifted", "targets", "used"]


@contextlib.contextmanager
def head_input(head: nn.Module) -> Iterator[list[Tensor]]:
    """Yields a list in which a forward pass of the model, inside the context, leaves what its head is given, [..., H].

    The head computes nothing while the context lasts, and what it returns is empty: so no [B, L, V] tensor is made, not
    by what follows it either, no code of the model is edited, and it works inside DDP, whose wrapper runs as usual.
    """
    given: list[Tensor] = []
    replaced: Any = head
    before = vars(head).get("forward")  # accelerate's hooks, for one, set one on the instance

    def forward(hidden: Tensor) -> Tensor:
        given[:] = [hidden]
        return hidden.new_empty(0, *[1] * (hidden.dim() - 1))

    replaced.forward = forward
    try:
        yield given
    finally:
        del replaced.forward
        if before is not None:
            replaced.forward = before


def hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """The hidden states [B, L, H] of which ``fastkd.head(model)`` makes logits, without computing any.

    The model runs as it is given, wrapper and all, so gradients are reduced, shards are gathered and adapters apply as
    in ``model(**inputs)``. Run a teacher under ``torch.no_grad()``.

    Args:
        model: a causal, sequence-to-sequence or masked language model of transformers, of a family that
            ``fastkd.head`` knows. DDP, FSDP2, ``torch.compile``, PEFT and accelerate may be around it.
        inputs: what its forward pass takes, as a collator makes it. ``labels`` do not reach the model, which would
            compute its own loss of them: with an encoder, and without ``decoder_input_ids``, the decoder's tokens are
            made of them as the model does; else they are left out. ``use_cache`` is False unless it is given.

    Returns:
        [B, L, H] in the dtype of the model's computations: what comes out of the last layer and its norm, of T5 before
        it is scaled. Of a masked model what its head makes of that before the vocabulary, so that, unlike those of
        others, they are not the last of ``output_hidden_states=True``.

    Raises:
        TypeError, ValueError: for a model or a head that is not known, as ``fastkd.head`` does.
    """
    bare = known(model)
    head = head_module(bare)
    labels = inputs.pop("labels", None)
    if bare.config.is_encoder_decoder and inputs.keys().isdisjoint(("decoder_input_ids", "decoder_inputs_embeds")):
        shifted = getattr(bare, "prepare_decoder_input_ids_from_labels", None)
        if labels is None or shifted is None:
            name, other = type(bare).__name__, "" if shifted is None else " or labels"
            raise ValueError(f"inputs: expected decoder_input_ids{other}, as {name} has a decoder, got {[*inputs]}")
        inputs["decoder_input_ids"] = shifted(labels)
    if bare.can_generate():
        inputs = {"use_cache": False, **inputs}
    with head_input(head) as given, contextlib.ExitStack() as hooks:
        states = given
        if bare.config.model_type in SCALED_IF_TIED:  # its head is given scaled states, and `fastkd.head` scales, too
            states = []
            hooks.enter_context(bare.get_decoder().register_forward_hook(functools.partial(_keep, states)))
        # First of the model's hooks: those of FSDP come after it, and see what the loss is made of.
        hooks.enter_context(bare.register_forward_hook(functools.partial(_read, states, head), prepend=True))
        hidden: Tensor = model(**inputs)[0]
    # accelerate makes what a wrapped model gives out fp32, and the head stays as it is
    return hidden.to(states[0].dtype)


def _keep(states: list[Tensor], module: Any, args: Any, output: Any) -> None:
    states[:] = [output[0]]


def used(head: nn.Module) -> list[Tensor]:
    """No row of each weight of a head: in what a model gives out, DDP sees by them that the head is used."""
    learnt = (x for x in head.parameters() if x.requires_grad and not is_dtensor(x))
    return [x.narrow(0, 0, 0).clone() for x in learnt]  # views would worry FSDP


def _read(states: list[Tensor], head: nn.Module, model: Any, args: Any, output: Any) -> tuple[Tensor, list[Tensor]]:
    return states[0], used(head)


def shifted(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Labels [B, L] of a causal model's input tokens, moved by one to the states that predict them."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)


def targets(
    model: nn.Module,
    labels: Tensor,
    num_items_in_batch: float | Tensor | None = None,
    *,
    processes: int | None = None,
    ignore_index: int = -100,
) -> dict[str, Any]:
    """The labels that belong to a model's hidden states, and what the sum of their losses is divided by.

    Arguments of ``fastkd.linear_kl``: ``linear_kl(hidden, head, ..., **targets(model, labels, num_items_in_batch))``.

    Args:
        model: as of ``hidden_states``.
        labels: [B, L], as the model itself takes them: of a causal model in the places of its input tokens.
        num_items_in_batch: how many labels there are in all batches of the step, of all processes, as the ``Trainer``
            of transformers counts and passes it to ``compute_loss``; None for the mean over this batch alone.
        processes: over how many processes it was counted, which DDP and FSDP divide gradients by once more: None for
            all that there are; 1 where each counts its own (``average_tokens_across_devices=False``); without those
            that share a batch, under tensor or context parallelism.
        ignore_index: the label of positions without one.

    Returns:
        ``labels`` [B, L], of a causal model moved by one, for the state of a position to predict the next token; and
        ``normalizer``, ``num_items_in_batch / processes``, or None.

    Raises:
        TypeError, ValueError: for a model that is not known, and for labels that are not [B, L].
    """
    bare = known(model)
    if labels.dim() != 2:
        raise ValueError(f"labels: expected [B, L], got {list(labels.shape)}")
    if bare.can_generate() and not bare.config.is_encoder_decoder:
        labels = shifted(labels, ignore_index)
    if num_items_in_batch is None:
        return {"labels": labels, "normalizer": None}
    if processes is None:
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        processes = torch.distributed.get_world_size() if several else 1
    return {"labels": labels, "normalizer": num_items_in_batch / processes}
