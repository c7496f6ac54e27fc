"""What follows from the gradient G of attention_kl's scores: those of queries, G k, of keys, G^T q, and of a bias.

G is written out for as many heads of sequences, or queries of a head, as fit a workspace, in the dtype of what it is
multiplied by. A GPU's GEMMs then read it from the second-level cache or nearly so.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.drivers.chunks import equal_parts, padded, product
from ...ops.dtypes import gradient_dtype, score_dtype
from .scores import diagonals_kernel

__all__ = ["Gradients", "Part"]

# Bytes of G, and of what is multiplied and has been. Of so much a GPU's work should take longer, a quarter of a
# millisecond, than the host takes to launch it.
WORKSPACE = 2**27
ROWS = 128  # of a GEMM's tile


class Part(NamedTuple):
    sequences: slice
    heads: slice
    queries: slice

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(x.stop - x.start for x in self)  # type: ignore[return-value]


class Gradients:
    """Of queries, keys and bias, as they are `wanted`; adds up what parts of G give to them."""

    def __init__(
        self,
        q: Tensor,  # [B, Lq, H]
        k: Tensor,  # [B, Lk, H / group]
        bias: Tensor | None,  # [B, A, Lq, Lk], any of them 1, or diagonals [A, 2 reach + 1]
        coefficient: Tensor,  # [B, A, Lq]
        key_mask: Tensor | None,  # [B, Lk]
        scale: float,
        causal: bool,
        lift: Tensor | None,
        wanted: list[bool],
    ):
        self.q, self.k, self.bias, self.coefficient = q, k, bias, coefficient
        self.causal, self.lift, self.wanted = causal, lift, wanted
        self.group = group = max(1, q.shape[2] // max(1, k.shape[2]))  # heads of queries that share one of keys
        self.wide = score_dtype(q)
        self.keys, self.factor = k.shape[1], scale if lift is None else scale / lift
        self.unseen = None if key_mask is None else key_mask[:, None] == 0  # [B, 1, Lk]
        self.dropped = coefficient == 0  # [B, A, Lq]
        self.columns = padded(self.keys)
        operands = q.shape[2] // coefficient.shape[1] * (q.itemsize + self.wide.itemsize)  # bytes of a row of both
        of_query, of_keys = group * (self.columns * q.itemsize + operands), self.keys * operands
        self.rows = max(1, (WORKSPACE - of_keys) // max(1, of_query))  # queries of a group of heads that fit
        self.whole = self.rows >= q.shape[1]  # all of them: what keys get is written once
        self.groups = max(1, WORKSPACE // (q.shape[1] * of_query + max(1, of_keys)))
        self.of_q = q.new_zeros(q.shape if wanted[0] else 0, dtype=gradient_dtype(q))
        narrow = gradient_dtype(k) if self.whole else score_dtype(k)
        self.of_k = k.new_zeros(k.shape if wanted[1] else 0, dtype=narrow)
        self.of_bias = q.new_zeros(0, dtype=gradient_dtype(q))
        if wanted[2] and bias is not None:
            heads, queries = coefficient.shape[1:]
            by_distance, summed = bias.dim() == 2, 1 in bias.shape[:3]
            self.of_bias = bias.new_zeros(
                (heads, queries + self.keys - 1) if by_distance else bias.shape,
                dtype=self.wide if by_distance or summed else gradient_dtype(bias),
            )

    def parts(self) -> Iterator[Part]:
        batch, heads, queries = self.coefficient.shape
        rows = queries if self.whole else self.rows // ROWS * ROWS or self.rows
        if queries == 0 or self.keys == 0:
            return
        for b in equal_parts(batch, max(1, self.groups * self.group // heads)):
            for a in equal_parts(heads // self.group, self.groups):
                for i in range(0, queries, rows):
                    heads_here = slice(a.start * self.group, a.stop * self.group)
                    yield Part(b, heads_here, slice(i, min(queries, i + rows)))

    def add(self, part: Part, g: Tensor) -> None:
        """g: [sequences, heads, queries, columns] of the part, times the lift."""
        bs, heads, rows = part
        reached = min(self.keys, rows.stop) if self.causal else self.keys
        groups = slice(heads.start // self.group, heads.stop // self.group)
        matrix = g.view(-1, self.group * g.shape[2], self.columns)[:, :, :reached]
        if self.wanted[0]:
            masked = None if self.unseen is None else self.unseen[bs, :, :reached]
            k = self._matrix(self.k[bs, :reached], groups, 1, masked)
            of_q = product(matrix, k, self.wide).view(*g.shape[:3], -1).transpose(1, 2)
            torch.mul(of_q, self.factor, out=self.of_q[bs, rows].unflatten(2, (-1, k.shape[2]))[:, :, heads])
        if self.wanted[1]:
            q = self._matrix(self.q[bs, rows], heads, self.group, self.dropped[bs, heads, rows])
            of_k = product(matrix.transpose(1, 2), q, self.wide)
            of_k = of_k.view(g.shape[0], -1, reached, q.shape[2]).transpose(1, 2)
            target = self.of_k[bs, :reached].unflatten(2, (-1, q.shape[2]))[:, :, groups]
            if self.whole:
                torch.mul(of_k, self.factor, out=target)
            else:
                target += of_k * self.factor
        if self.wanted[2]:
            self._add_to_bias(part, g)

    def _matrix(self, x: Tensor, heads: slice, group: int, masked: Tensor | None) -> Tensor:
        """[sequences * heads / group, group * length, width]; zero where masked: NaN times zero would still be NaN."""
        width = self.q.shape[2] // self.coefficient.shape[1]
        x = x.unflatten(2, (-1, width))[:, :, heads].transpose(1, 2)
        if masked is not None:
            x = x.masked_fill(masked[..., None], 0)
        return x.reshape(-1, group * x.shape[2], width)

    def _add_to_bias(self, part: Part, g: Tensor) -> None:
        assert self.bias is not None
        if self.bias.dim() == 2:
            _, heads, rows = part
            count = rows.stop if self.causal else g.shape[2] + self.keys - 1  # those above the main one are zero
            sums = self.of_bias[heads, self.coefficient.shape[2] - rows.stop :]
            diagonals_kernel[(-(-count // 128), g.shape[1])](
                g, sums, *g.shape[:3], self.keys, self.columns, sums.stride(0), BLOCK_M=16, BLOCK_N=128
            )
        elif self.bias.shape[3] == self.keys:  # else zero: a row's gradients add up to that
            shared = [n for n in range(3) if self.bias.shape[n] == 1]
            target = self.of_bias[tuple(slice(None) if n in shared else part[n] for n in range(3))]
            g = g[..., : self.keys]
            target.add_(g.sum(shared, keepdim=True, dtype=target.dtype) if shared else g)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Empty where not wanted."""
        of_bias = self.of_bias
        if self.wanted[2] and self.bias is not None:
            if self.bias.dim() == 2:
                of_bias = self._clamped(of_bias)
            of_bias = (of_bias if self.lift is None else of_bias.div_(self.lift)).to(gradient_dtype(self.bias))
        return self.of_q, self.of_k.to(gradient_dtype(self.k)), of_bias

    def _clamped(self, sums: Tensor) -> Tensor:
        """Sums of all diagonals, [A, Lq + Lk - 1], as those up to the reach: its ends have all beyond them, too."""
        assert self.bias is not None
        queries, reach = self.coefficient.shape[2], self.bias.shape[1] // 2
        low = max(0, queries - reach)
        high = max(low, min(sums.shape[1], queries - 1 + reach))
        found, first = sums.new_zeros(self.bias.shape), low - (queries - 1) + reach
        found[:, first : first + high - low] = sums[:, low:high]
        found[:, 0] += sums[:, :low].sum(1)
        found[:, -1] += sums[:, high:].sum(1)
        return found
