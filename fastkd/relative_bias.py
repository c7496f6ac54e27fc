"""T5's relative-position bias, given by its learned table instead of as an [A, Lq, Lk] tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import as_int, check_flag, check_tensor

__all__ = ["RelativeBias"]


@dataclass(frozen=True)
class RelativeBias:
    """A bias for every head and every distance between key and query, as in T5 (Raffel et al., 2020).

    Equal to ``T5Attention.compute_bias`` for ``table = attention.relative_attention_bias.weight``. Distances share
    buckets: half of them hold one distance each, the others grow logarithmically up to ``max_distance``, and all beyond
    share the last.

    Args:
        table: [buckets, A], one column for each head, float32, float64, float16 or bfloat16; receives a gradient on the
            student's side.
        bidirectional: True in encoders, where keys before and after the query have buckets of their own, and the number
            of buckets is even; False in decoders, where all keys after it share the bucket of distance 0.
        max_distance: T5 has 128.

    Raises:
        ValueError, TypeError: for arguments that do not fit, such as fewer than 4 buckets (2 in decoders).
    """

    table: Tensor
    bidirectional: bool = True
    max_distance: int = 128

    def __post_init__(self) -> None:
        check_tensor("RelativeBias.table", self.table, shape=[None, None], floating=True)
        check_flag("RelativeBias.bidirectional", self.bidirectional)
        object.__setattr__(self, "max_distance", as_int("RelativeBias.max_distance", self.max_distance))
        buckets, least = self.table.shape[0], 4 if self.bidirectional else 2
        if buckets < least or (self.bidirectional and buckets % 2):
            kind = "an even number of buckets of at least 4" if self.bidirectional else "at least 2 buckets"
            raise ValueError(f"RelativeBias.table: expected {kind}, got shape {list(self.table.shape)}")
        if self.max_distance <= self._exact_buckets:
            raise ValueError(
                f"RelativeBias.max_distance: expected more than the {self._exact_buckets} distances that have a bucket "
                f"each, got {self.max_distance}"
            )

    @property
    def _buckets_per_side(self) -> int:
        return self.table.shape[0] // 2 if self.bidirectional else self.table.shape[0]

    @property
    def _exact_buckets(self) -> int:
        return self._buckets_per_side // 2

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket, a row of the table, of each distance = key position - query position (int64, any shape)."""
        exact, side = self._exact_buckets, self._buckets_per_side
        first = torch.where(distance > 0, side, 0) if self.bidirectional else 0
        distance = distance.abs() if self.bidirectional else -distance.clamp(max=0)
        # as T5 computes it, in float32, so that no distance lands in another bucket
        growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (growth * (side - exact)).long()).clamp(max=side - 1)
        return first + torch.where(distance < exact, distance, far)

    def to(self, dtype: torch.dtype) -> RelativeBias:
        """The same with its table in another dtype; differentiable."""
        return RelativeBias(self.table.to(dtype), self.bidirectional, self.max_distance)

    def diagonals(self) -> Tensor:
        """The bias of every distance from -max_distance to max_distance, [A, 2 * max_distance + 1].

        Distances beyond have the bias of the nearest one here. Differentiable in the table.
        """
        reach = self.max_distance
        distance = torch.arange(-reach, reach + 1, device=self.table.device)
        return self.table[self.bucket(distance)].t()

    def matrix(self, queries: int, keys: int) -> Tensor:
        """The bias of every pair of positions, [A, Lq, Lk], as ``T5Attention.compute_bias`` returns it."""
        position = torch.arange(max(queries, keys), device=self.table.device)
        distance = position[:keys] - position[:queries, None]  # [Lq, Lk]
        return self.table[self.bucket(distance)].permute(2, 0, 1)
