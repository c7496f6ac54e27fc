"""A model's vocabulary head as the losses need it: what makes its logits of its last hidden states."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Head"]


class Head(NamedTuple):
    """What makes a model's logits: ``softcap * tanh((scale * hidden @ weight.T + bias) / softcap)``.

    ``fastkd.linear_kl`` takes one in place of a weight.

    Args:
        weight: [V, H], in the dtype of the hidden states.
        bias: [V], or None.
        scale: multiplies the hidden states.
        softcap: what the logits approach, or None where nothing caps them.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
