"""The top of a teacher's scores, or draws from them, in chunks: what ``TopK`` is made of where there are logits.

T tokens, V vocabulary, K ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .heads import Head

__all__ = ["draw", "head_scores", "row_chunks", "token_chunks", "top"]

# Numbers that are held at once: 32 MB in float32. A block of a head's scores is some tokens by so many columns.
_CHUNK = 2**23
_COLUMNS = 2**15


def _dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _matrices(x: Tensor) -> Iterator[Tensor]:
    """[..., V] as views [T, V]: one where its leading dimensions collapse, else one of each index of the first."""
    try:
        yield x.view(x.shape[:-1].numel(), x.shape[-1])
    except RuntimeError:
        for part in x:
            yield from _matrices(part)


def row_chunks(logits: Tensor) -> Iterator[Tensor]:
    """Logits [..., V] as chunks of rows [n, V], copies in float32, or float64 where they are."""
    for rows in _matrices(logits.detach()):
        for chunk in rows.split(max(1, _CHUNK // rows.shape[-1])):
            yield chunk.to(_dtype(logits), copy=True)


def token_chunks(hidden: Tensor) -> Iterable[Tensor]:
    """Hidden states [..., H] as chunks [n, H], small enough for a block of scores."""
    return hidden.detach().reshape(hidden.shape[:-1].numel(), hidden.shape[-1]).split(_CHUNK // _COLUMNS)


def head_scores(hidden: Tensor, head: Head) -> Iterator[Tensor]:
    """A head's scores of hidden states [n, H] as blocks of columns [n, v], summed up in float32 and left in it."""
    weight, bias, scale, softcap = head
    dtype = _dtype(hidden)
    step = max(1, min(_COLUMNS, _CHUNK // weight.shape[1]))  # 16-bit weights are widened by the block
    for start in range(0, weight.shape[0], step):
        columns = slice(start, start + step)
        block = weight[columns].detach().t()
        if hidden.is_cuda and hidden.itemsize == 2:  # tensor cores multiply 16-bit operands, and write float32
            scores = torch.mm(hidden, block, out_dtype=dtype)
        else:
            scores = hidden.to(dtype) @ block.to(dtype)
        scores *= scale
        if bias is not None:
            scores += bias.detach()[columns]
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        yield scores


def top(blocks: Iterable[Tensor], k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The k likeliest ids of scores, given as blocks of columns [T, v] that may be written over.

    Returns the ids [T, K], their log-probabilities and that of the rest, [T, K] and [T]. What is summed up over columns
    is so below its maximum, and put together in float64: nearly all mass may lie in one id, or in the rest.
    """
    kept: tuple[Tensor, Tensor, Tensor] | None = None
    first = 0
    for scores in blocks:
        scores /= temperature
        best, ids = scores.topk(min(k, scores.shape[-1]))
        others = scores.scatter_(1, ids, -torch.inf)
        peak = others.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)  # of -inf alone there is none
        rest = others.sub_(peak).exp_().sum(-1, keepdim=True).double().log() + peak.double()  # [T, 1]
        best, ids, first = best.double(), ids + first, first + scores.shape[-1]
        if kept is not None:
            ids_before, best_before, rest_before = kept
            best, order = torch.cat([best_before, best], -1).sort(descending=True)
            ids = torch.cat([ids_before, ids], -1).gather(1, order)
            rest = torch.cat([rest_before, rest, best[:, k:]], -1).logsumexp(-1, keepdim=True)
        kept = ids[:, :k], best[:, :k], rest
    assert kept is not None
    ids, best, rest = kept
    total = torch.cat([best, rest], -1).logsumexp(-1, keepdim=True)
    return ids, (best - total).to(scores.dtype), (rest - total).squeeze(-1).to(scores.dtype)


def draw(scores: Tensor, n: int, temperature: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """n draws from the softmax of scores [T, V], with replacement: ids [T, n] and the logarithms of their shares.

    Each id that was drawn is there once, and the rest is padding.
    """
    sums = scores.div_(temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    points = torch.rand(len(scores), n, dtype=torch.float64, device=scores.device, generator=generator) * total
    drawn = torch.searchsorted(sums, points, right=True).clamp(max=scores.shape[-1] - 1).sort(-1).values
    new = torch.ones_like(drawn)
    new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = new.cumsum(-1) - 1
    counts = torch.zeros_like(points).scatter_add_(1, place, torch.ones_like(points))
    ids = torch.full_like(drawn, -1).scatter_(1, place, drawn)
    # of scores that are not finite the total is NaN, and that is to be seen
    return ids, ((counts / n).log() + 0 * total).to(scores.dtype)
