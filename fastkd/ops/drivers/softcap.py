"""Scores as a model caps them, s = c tanh(z / c) (Gemma 2), and the slope ds/dz = 1 - (s / c)^2.

The CPU kernel is csrc/cpu/softcap.cpp, the GPU's kernels/softcap.py. The slope is made of z, together with s, which
near the cap has no digits left for it; that of a score that is NaN is 0.

R rows, V columns, all of one dtype, float32 or float64, columns side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backend import backend_for

__all__ = ["softcap"]

# ---- schema ---------------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastkd", "FRAGMENT")
_library.define("softcap(Tensor scores, Tensor(a!) capped, Tensor(b!)? slope, float cap) -> ()")

# ---- fake -----------------------------------------------------------------------------------------------------------

torch.library.register_fake("fastkd::softcap", lambda scores, capped, slope, cap: None, lib=_library)

# ---- implementation: the extension registers its own for CPU tensors ------------------------------------------------


def _in_triton(scores: Tensor, capped: Tensor, slope: Tensor | None, cap: float) -> None:
    from ...kernels import softcap as kernels

    kernels.softcap(scores, capped, slope, cap)


_library.impl("softcap", _in_triton, "CUDA")

# ---- function for linear_kl -----------------------------------------------------------------------------------------


def softcap(
    scores: Tensor,  # [R, V]
    capped: Tensor,  # [R, V]
    slope: Tensor | None,  # [R, V]
    cap: float,
) -> None:
    """Writes cap * tanh(scores / cap), and its derivative where it is wanted; either may be the scores."""
    if scores.numel() == 0:
        return
    call = _in_triton if backend_for(scores.device)[0] == "triton" else torch.ops.fastkd.softcap
    call(scores, capped, slope, cap)
