"""Which dtype things have, in every op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ..divergence import MIX, divergence_code

__all__ = ["autocast_like_linear", "fp16_lift", "gradient_dtype", "score_dtype", "without_autocast"]


def score_dtype(student: Tensor) -> torch.dtype:
    """Score rows are fp32 whatever the inputs: rounding them to bf16 costs up to a quarter of a late gradient."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def gradient_dtype(student: Tensor) -> torch.dtype:
    """Gradients leave an op in the inputs' dtype; fp16 ones in fp32, since the loss scale is yet to come."""
    return torch.float32 if student.dtype == torch.float16 else student.dtype


def fp16_lift(largest: Tensor, divergence: int, beta: float | Sequence[float]) -> Tensor:
    """A power of two that brings fp16 gradients of scores into the range of fp16 where they are matrix operands.

    largest: 0-d, the largest coefficient of a row. Coefficients are about one over the number of rows, and
    probabilities about one over the number of columns: together they would be flushed to zero. The largest of the
    former times this is about 2^12, which leaves room for a dD/ds of 16; reverse_kl's is up to a difference of scores,
    and has room for 1024. `beta` is a number or, of a mix, a list with the weights after it.
    """
    weights = [1.0] if isinstance(beta, (int, float)) else beta[1:]
    _, exponent = torch.frexp(largest * sum(weights))
    reverse = divergence_code("reverse_kl")
    unbounded = divergence == reverse or (divergence >= MIX and weights[reverse] != 0)
    room = 6 if unbounded else 12
    return torch.ldexp(largest.new_ones(()), (room - exponent).clamp(-100, 100))


def _has_autocast(device_type: str) -> bool:
    if torch.compiler.is_compiling():  # that of torch 2.11 cannot ask, and assume_constant_result imports it: 2 seconds
        return device_type != "meta"
    return torch.amp.is_autocast_available(device_type)


def autocast_like_linear(*tensors: Any) -> list[Any]:
    """The casts that torch.autocast applies to the inputs of F.linear; what is no tensor passes."""
    device = next(x.device.type for x in tensors if isinstance(x, Tensor))
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)

    def eligible(x) -> bool:
        return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64

    return [x.to(dtype) if eligible(x) else x for x in tensors]


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast has had its say on the inputs; in here it would round the GEMMs' operands once more."""

    @wraps(function)
    def run(student: Tensor | Sequence[Tensor], *arguments, **options):
        first = student if isinstance(student, Tensor) else student[0]
        with torch.autocast(first.device.type, enabled=False):
            return function(student, *arguments, **options)

    return run
