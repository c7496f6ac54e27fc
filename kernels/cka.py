"""What cka_loss's products are of, in Triton: hidden states less their means, of all pairs that are alike at a time.

Products themselves are plain GEMMs, which torch does (fastkd/ops/drivers/cka_loss_gpu.py). In torch's operations means
that an offset costs nothing and rows that are centred, masked and rounded once would move four times the bytes.

N tokens, D width. Neither is a constant of the kernels.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import choose, choose_matrix, load_valid, rounded_to, working_dtype

__all__ = ["ENTRIES", "centre_", "means_"]

# Matrices that one launch takes.
ENTRIES = 16
MEAN_TILE = {"BLOCK_N": 128, "BLOCK_D": 32}
CENTRE_TILE = {"BLOCK_N": 64, "BLOCK_D": 128}

# ---- kernels ---------------------------------------------------------------------------------------------------------
# Every argument that is a tuple has an element for each matrix of the launch: those of `matrices` are (pointer, row
# stride, its means). Masks may be none: no tuple but None.


@triton.jit
def _first_valid(mask, tokens):
    """The first valid token, or `tokens`."""
    first = tokens * 0
    if mask is not None:
        first, start = tokens, 0
        while (start < tokens) & (first == tokens):
            token = start + tl.arange(0, 1024)
            first = tl.min(tl.where(load_valid(mask, token, tokens), token, tokens), 0)
            start += 1024
    return first


@triton.jit
def _load_rows(x, stride, row, valid, column, exists):
    """[rows, columns] of a matrix, zero in rows that are not valid: a NaN there is not read."""
    pointers = x + row[:, None].to(tl.int64) * stride + column[None, :]
    return tl.load(pointers, mask=valid[:, None] & exists[None, :], other=0)


@triton.jit(do_not_specialize=["tokens"])
def means_kernel(
    matrices,  # [N, D] each, with means [D] float64
    masks,  # [N]
    tokens, width, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """The means of a block of columns, from the first valid token on."""
    index = tl.program_id(1)
    x, stride, means = choose_matrix(index, matrices)
    mask = choose(index, masks) if masks is not None else None
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    exists = column < width
    first = _first_valid(mask, tokens) + tl.arange(0, 1)
    shift = tl.sum(_load_rows(x, stride, first, first < tokens, column, exists).to(F), 0)
    total, count = tl.zeros((BLOCK_N, BLOCK_D), F), tl.zeros((BLOCK_N,), tl.int32)
    for start in tl.range(0, tokens, BLOCK_N, num_stages=4):
        row = start + tl.arange(0, BLOCK_N)
        valid = load_valid(mask, row, tokens)
        moved = _load_rows(x, stride, row, valid, column, exists).to(F) - shift[None, :]
        total += tl.where(valid[:, None], moved, 0)
        count += valid.to(tl.int32)
    mean = shift + tl.sum(total.to(tl.float64), 0) / tl.maximum(tl.sum(count, 0), 1)
    tl.store(means + column, mean, mask=exists)


@triton.jit(do_not_specialize=["tokens"])
def centre_kernel(
    matrices,  # [N, D] each, with means [D] float64
    masks,  # [N]
    tokens, width,
    out,  # [matrices, N, D]
    out_matrix_stride, out_stride, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Rows less their means, zero where they are not valid, rounded once.

    From wide ones two numbers are taken, as the mean has more digits than they: rounded it would move all rows of a
    gradient alike.
    """
    index = tl.program_id(1)
    x, stride, means = choose_matrix(index, matrices)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    exists = column < width
    valid = load_valid(choose(index, masks) if masks is not None else None, row, tokens)
    mean = tl.load(means + column, mask=exists, other=0)
    rounded = mean.to(F)
    moved = _load_rows(x, stride, row, valid, column, exists).to(F) - rounded[None, :]
    if out.dtype.element_ty == F:
        moved -= (mean - rounded).to(F)[None, :]
    moved = rounded_to(tl.where(valid[:, None], moved, 0), out.dtype.element_ty)
    out += index.to(tl.int64) * out_matrix_stride
    pointers = out + row[:, None].to(tl.int64) * out_stride + column[None, :]
    tl.store(pointers, moved, mask=(row < tokens)[:, None] & exists[None, :])


# ---- launches --------------------------------------------------------------------------------------------------------


def _arguments(xs: Sequence[Tensor], masks: Sequence[Tensor | None], means: Sequence[Tensor]) -> tuple:
    """`matrices`, `masks`, tokens, width"""
    xs = [x if x.stride(1) == 1 else x.contiguous() for x in xs]
    matrices = tuple((x, x.stride(0), mean) for x, mean in zip(xs, means, strict=True))
    given = tuple(mask.contiguous() for mask in masks if mask is not None)
    return matrices, given or None, *xs[0].shape


def means_(
    xs: Sequence[Tensor],  # [N, D] each, at most ENTRIES
    masks: Sequence[Tensor | None],  # [N] bool each, or all None
    means: Sequence[Tensor],  # [D] float64 each, to be written
    exact: torch.dtype,  # of sums
) -> None:
    """Writes the means of valid tokens: 0 where there are none, and exactly what they are where all are the same."""
    grid = triton.cdiv(xs[0].shape[1], MEAN_TILE["BLOCK_D"]), len(xs)
    with torch.cuda.device_of(xs[0]):
        means_kernel[grid](*_arguments(xs, masks, means), **MEAN_TILE, F=working_dtype(exact), num_warps=8)


def centre_(
    xs: Sequence[Tensor],  # [N, D] each, at most ENTRIES
    masks: Sequence[Tensor | None],  # [N] bool each, or all None
    means: Sequence[Tensor],  # [D] float64 each
    out: Tensor,  # [len(xs), N, D] of the dtype of products, to be written; columns are neighbours
    exact: torch.dtype,  # in which they are centred
) -> None:
    """Writes what the products are of."""
    rows, columns = (triton.cdiv(n, CENTRE_TILE[name]) for n, name in zip(xs[0].shape, CENTRE_TILE, strict=True))
    with torch.cuda.device_of(xs[0]):
        centre_kernel[rows, len(xs), columns](
            *_arguments(xs, masks, means), out, *out.stride()[:2], **CENTRE_TILE, F=working_dtype(exact), num_warps=8
        )
