"""Tokens in chunks that fit a workspace, and in blocks that are matrices; and products of these on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["equal_parts", "padded", "product", "row_blocks", "token_chunks"]

# Numbers, to a multiple of which rows of matrices are padded: 32 bytes or more.
PADDED = 16


def padded(columns: int) -> int:
    """The stride of rows that a GPU's GEMMs and kernels are to move 16 bytes at a time."""
    return -(-columns // PADDED) * PADDED


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b of batches of matrices of one dtype, summed up and returned in another, which is as wide or wider."""
    if a.dtype == dtype or not a.is_cuda:  # Triton's interpreter, in tests
        return torch.bmm(a.to(dtype), b.to(dtype))
    return torch.bmm(a, b, out_dtype=dtype)


def equal_parts(count: int, at_most: int) -> Iterator[slice]:
    """Equal parts, of at most `at_most`, of a range."""
    parts = -(-count // at_most)
    step = max(1, -(-count // max(1, parts)))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def token_chunks(kept: Tensor | None, count: int, at_most: int) -> Iterator[slice | Tensor]:
    """`count` tokens in equal chunks: slices, or indices of those where `kept` [count] is not 0, if some are dropped.

    Dropped tokens are skipped where that costs no wait for the device: half of a padded batch is often padding.
    """
    if kept is None or kept.device.type != "cpu" or kept.count_nonzero() == count:
        yield from equal_parts(count, at_most)
        return
    index = kept.nonzero().squeeze(1)
    yield from (index[rows] for rows in equal_parts(index.shape[0], at_most))


def row_blocks(*logits: Tensor | None) -> Iterator[tuple[slice, list[Any]]]:
    """[..., V] tensors as 2-d views of the same rows, without copying.

    One block where the leading dimensions collapse. Where they do not (`logits[:, :-1]`, the usual shift), one block
    for every index of the first dimension.
    """
    given = [x for x in logits if x is not None]
    leading = given[0].shape[:-1]
    try:
        yield slice(0, leading.numel()), [None if x is None else x.view(leading.numel(), x.shape[-1]) for x in logits]
        return
    except RuntimeError:
        pass
    start = 0
    for i in range(leading[0]):
        for rows, block in row_blocks(*[None if x is None else x[i] for x in logits]):
            yield slice(start + rows.start, start + rows.stop), block
        start += leading[1:].numel()
