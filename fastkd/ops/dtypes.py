"""Which dtype things have, in every op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["autocast_like_linear", "gradient_dtype", "score_dtype"]


def score_dtype(student: Tensor) -> torch.dtype:
    """Score rows are fp32 whatever the inputs: rounding them to bf16 costs up to a quarter of a late gradient."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def gradient_dtype(student: Tensor) -> torch.dtype:
    """Gradients leave an op in the inputs' dtype; fp16 ones in fp32, since the loss scale is yet to come."""
    return torch.float32 if student.dtype == torch.float16 else student.dtype


@torch.compiler.assume_constant_result  # the compiler of torch 2.11 cannot look into it
def _has_autocast(device_type: str) -> bool:
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
