"""Tokens in chunks that fit a workspace."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

__all__ = ["equal_parts", "token_chunks"]


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
