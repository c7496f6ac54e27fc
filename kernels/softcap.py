"""Scores as a model caps them, s = c tanh(z / c), and the slope ds/dz: csrc/cpu/softcap.cpp in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import double, exp_nonpositive

__all__ = ["softcap"]

BLOCK = 1024  # columns of a program: four or eight numbers a thread


@triton.jit
def softcap_kernel(
    scores, capped,
    slope,  # None: it is not wanted
    columns,
    scores_row, capped_row, slope_row,  # strides; columns lie side by side
    cap: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a row."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    z = tl.load(scores + row * scores_row + column, mask=inside, other=0.0)
    cap = double(cap).to(z.dtype)
    top = tl.abs(z)
    x = top / cap
    e, minus1, _ = exp_nonpositive(-2 * x)
    if z.dtype == tl.float64:
        s = cap * (-minus1 / (2 + minus1))
    else:
        u = x * x
        poly = 1.7369354410e-3 * u - 7.6572547873e-3
        poly = poly * u + 2.1452033995e-2
        poly = poly * u - 5.3892724217e-2
        poly = poly * u + 1.3332694080e-1
        poly = poly * u - 3.3333315124e-1
        s = tl.where(x < 0.75, top + top * (poly * u), cap - cap * (2 * e / (1 + e)))
    tl.store(capped + row * capped_row + column, tl.where(z < 0, -s, s), mask=inside)
    if slope is not None:
        d = tl.where(z == z, 4 * e / ((1 + e) * (1 + e)), 0.0)  # NaN: see the other file
        tl.store(slope + row * slope_row + column, d, mask=inside)


def softcap(
    scores: Tensor,  # [R, V], float32 or float64
    capped: Tensor,  # [R, V]
    slope: Tensor | None,  # [R, V]
    cap: float,
) -> None:
    """Writes cap * tanh(scores / cap), and its derivative where it is wanted; either may be the scores."""
    rows, columns = scores.shape
    for name, x in (("scores", scores), ("capped", capped), ("slope", slope)):
        if x is not None and (x.shape != scores.shape or x.dtype != scores.dtype or x.stride(1) != 1):
            raise ValueError(f"{name}: expected {scores.dtype} [{rows}, {columns}], columns side by side")
    strides = [0 if x is None else x.stride(0) for x in (scores, capped, slope)]
    with torch.cuda.device_of(scores):  # rows come first: other dimensions of a grid end at 65535
        softcap_kernel[rows, triton.cdiv(columns, BLOCK)](
            scores, capped, slope, columns, *strides, float(cap), BLOCK=BLOCK, num_warps=4
        )
