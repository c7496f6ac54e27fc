"""cka_loss by torch's GEMMs: on a CPU, and on any device where the tokens are spread over a process group.

fastkd/ops/cka_loss.py has the mathematics. N tokens, Ds and Dt widths, W their sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import distributed
from ..dtypes import score_dtype
from .chunks import equal_parts, token_chunks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "WORKSPACE",
    "Memory",
    "add_symmetric_",
    "centred_",
    "gradient",
    "gram",
    "halves",
    "like_scores",
    "loss_of_norms",
    "mirror_",
    "row_chunks",
    "statistics",
    "symmetric_norm",
    "torch_backward_",
    "torch_forward",
]

# Columns of a symmetric product that are computed together. Fewer would compute less of the lower half, more slowly.
STRIP = 128
# Numbers in the workspace: tokens times widths of a chunk.
WORKSPACE = 2**21


# ---- forward --------------------------------------------------------------------------------------------------------


class Memory:
    """Memory that one tensor takes over from another, for what each pair and each chunk needs again."""

    def __init__(self) -> None:
        self.flat: Tensor | None = None

    def take(self, like: Tensor, *shape: int) -> Tensor:
        """Unwritten, in the dtype and on the device of `like`."""
        count = math.prod(shape)
        if self.flat is None or self.flat.dtype != like.dtype or self.flat.numel() < count:
            self.flat = None  # goes before the larger one comes
            self.flat = like.new_empty(count)
        return self.flat[:count].view(shape)


def _count(x: Tensor, mask: Tensor | None) -> Tensor:
    """How many tokens of x [N, D] are valid, float64."""
    if mask is None:
        return torch.full((), x.shape[0], dtype=torch.float64, device=x.device)
    return mask.sum(dtype=torch.float64)


def _mean(x: Tensor, mask: Tensor | None, count: Tensor, like: Tensor, workspace: Memory) -> Tensor:
    """The mean [D] of the valid tokens of x [N, D], float64.

    It is taken from the first valid token on, in the precision of `like`: an offset costs nothing, and tokens that are
    all the same have exactly that mean.
    """
    total = x.new_zeros(x.shape[1], dtype=torch.float64)
    if x.shape[0] == 0:
        return total
    first = x[:1] if mask is None else x[mask.int().argmax(keepdim=True)].masked_fill(count == 0, 0)
    for rows in equal_parts(x.shape[0], max(1, WORKSPACE // (4 * x.shape[1]))):
        shifted = workspace.take(like, rows.stop - rows.start, x.shape[1])
        centred_(shifted, x, first[0].to(like.dtype), rows, slice(None), mask)
        total += shifted.sum(0)
    return first[0] + total / count.clamp_min(1)


def halves(mean: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A mean rounded to the precision of scores, and what rounding took from it.

    An offset of a thousand deviations would take three digits from the gradient with it.
    """
    rounded = mean.to(dtype)
    return rounded, (mean - rounded).to(dtype)


def centred_(out: Tensor, x: Tensor, mean: Tensor, rows: slice | Tensor, columns: slice, mask: Tensor | None) -> None:
    """out = x[rows, columns] less the mean of the columns; 0 for what is not valid and still there."""
    if x.dtype == out.dtype:
        torch.sub(x[rows, columns], mean[columns], out=out)
    else:  # torch.sub would convert x as a whole first
        out.copy_(x[rows, columns]).sub_(mean[columns])
    if mask is not None and isinstance(rows, slice):
        out.masked_fill_(~mask[rows].unsqueeze(1), 0)


def _strips(width: int) -> Iterator[slice]:
    """Columns of a symmetric product. Not in equal parts: GEMMs like round numbers."""
    return (slice(start, min(start + STRIP, width)) for start in range(0, width, STRIP))


def add_symmetric_(out: Tensor, x: Tensor, *widths: int) -> None:
    """out [D, D] += x^T x for x [n, D], in strips of columns that end on the diagonal.

    The strips are those of each of the widths, which add up to D; so the upper halves of their own squares are whole.
    """
    start = 0
    for width in widths:
        for part in _strips(width):
            columns = slice(start + part.start, start + part.stop)
            out[: columns.stop, columns].addmm_(x[:, : columns.stop].mT, x[:, columns])
        start += width


def mirror_(x: Tensor) -> None:
    """The lower half from the upper."""
    for columns in _strips(x.shape[0]):
        x[columns, : columns.start] = x[: columns.start, columns].mT


def _square_sum(x: Tensor) -> Tensor:
    """In float64: near convergence the loss is what norms differ by."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()


def symmetric_norm(x: Tensor) -> Tensor:
    """The Frobenius norm of what has only its upper half."""
    total = x.new_zeros((), dtype=torch.float64)
    for columns in _strips(x.shape[0]):
        total += 2 * _square_sum(x[: columns.start, columns]) + _square_sum(x[columns, columns])
    return total.sqrt()


def _covariance(
    student: Tensor, teacher: Tensor, mask: Tensor | None, mean: Tensor, memory: Memory, workspace: Memory
) -> Tensor:
    """The upper half of (B|A)^T (B|A) [W, W], of rows less their rounded mean."""
    like = like_scores(student)
    total = memory.take(like, mean.shape[0], mean.shape[0]).zero_()
    for _, chunk in row_chunks(student, teacher, mask, mean, like, workspace):
        add_symmetric_(total, chunk, teacher.shape[1], student.shape[1])
    return total


def like_scores(student: Tensor) -> Tensor:
    """A tensor of the precision and device of scores."""
    return student.new_empty(0, dtype=score_dtype(student))


def row_chunks(
    student: Tensor, teacher: Tensor, mask: Tensor | None, mean: Tensor, like: Tensor, workspace: Memory
) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """Rows (B|A) [n, W] of the tokens less their rounded mean, in a workspace that the next ones overwrite."""
    width = teacher.shape[1]
    mean, _ = halves(mean, like.dtype)
    for rows in token_chunks(mask, student.shape[0], max(1, WORKSPACE // mean.shape[0])):
        count = rows.stop - rows.start if isinstance(rows, slice) else rows.shape[0]
        chunk = workspace.take(like, count, mean.shape[0])
        centred_(chunk[:, :width], teacher, mean[:width], rows, slice(None), mask)
        centred_(chunk[:, width:], student, mean[width:], rows, slice(None), mask)
        yield rows, chunk


def _column_chunks(
    x: Tensor, mean: Tensor, mask: Tensor | None, like: Tensor, workspace: Memory
) -> Iterator[tuple[slice, Tensor]]:
    """Centred columns [N, n] of x, in a workspace that the next ones overwrite."""
    mean, rest = halves(mean, like.dtype)
    for columns in equal_parts(x.shape[1], max(1, WORKSPACE // max(1, x.shape[0]))):
        chunk = workspace.take(like, x.shape[0], columns.stop - columns.start)
        centred_(chunk, x, mean, slice(0, x.shape[0]), columns, mask)
        chunk.sub_(rest[columns])
        if mask is not None:
            chunk.masked_fill_(~mask.unsqueeze(1), 0)
        yield columns, chunk


def gram(x: Tensor, mean: Tensor, mask: Tensor | None, like: Tensor, workspace: Memory) -> Tensor:
    """A A^T [N, N]"""
    total = like.new_zeros(x.shape[0], x.shape[0])
    for _, chunk in _column_chunks(x, mean, mask, like, workspace):
        add_symmetric_(total, chunk.mT, x.shape[0])
    mirror_(total)
    return total


def loss_of_norms(
    c: Tensor, s: Tensor, t: Tensor, count: Tensor, eps: float, squared: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a pair by its norms, and the gradient's alpha and beta: float64, 0-d each or of several pairs."""
    power = 2 if squared else 1
    cka = (c / ((s + eps) * (t + eps)).sqrt()) ** power
    alpha = torch.where(c == 0, 0, power * cka / c.square())
    beta = torch.where(s == 0, 0, power * cka / (s * (s + eps)))
    return torch.where(count < 2, 0, 1 - cka), alpha, beta


def _from_grams(student, teacher, mask, mean, count, eps, squared, workspace: Memory) -> tuple[Tensor, Tensor]:
    width, like = teacher.shape[1], like_scores(student)
    ours = gram(student, mean[width:], mask, like, workspace)
    theirs = gram(teacher, mean[:width], mask, like, workspace)
    s, t = symmetric_norm(ours), symmetric_norm(theirs)
    c = (ours * theirs).sum(dtype=torch.float64).clamp_min(0).sqrt()
    loss, alpha, beta = loss_of_norms(c, s, t, count, eps, squared)
    return loss, ours.mul_(beta).sub_(theirs.mul_(alpha))


def _from_covariance(
    covariance: Tensor, width: int, count: Tensor, eps: float, squared: bool, wanted: bool
) -> tuple[Tensor, Tensor]:
    cross, ours, theirs = covariance[:width, width:], covariance[width:, width:], covariance[:width, :width]
    c = torch.stack([_square_sum(rows) for rows in cross.split(STRIP)]).sum().sqrt()
    s, t = symmetric_norm(ours), symmetric_norm(theirs)
    loss, alpha, beta = loss_of_norms(c, s, t, count, eps, squared)
    if not wanted:
        return loss, covariance.new_empty(0)
    mirror_(ours)
    factor = covariance[:, width:].clone()
    factor[:width] *= -alpha
    factor[width:] *= beta
    return loss, factor


def statistics(
    student: Sequence[Tensor],  # [N, Ds] each
    teacher: Sequence[Tensor],  # [N, Dt] each
    mask: Sequence[Tensor | None],  # [N] bool each
    group: ProcessGroup | None,
    like: Tensor,
    workspace: Memory,
) -> tuple[list[Tensor], list[Tensor]]:
    """How many tokens of each pair are valid, and their means [W], over all processes: float64.

    What is summed up has the precision of `like`.
    """
    counts, means = [], []
    for x, t, valid in zip(student, teacher, mask, strict=True):
        count = _count(x, valid)
        counts.append(count)
        means.append(torch.cat([_mean(h, valid, count, like, workspace) for h in (t, x)]))
    return (counts, means) if group is None else distributed.total_means(counts, means, group)


def torch_forward(
    student: Sequence[Tensor],  # [N, Ds] each
    teacher: Sequence[Tensor],  # [N, Dt] each
    mask: Sequence[Tensor | None],  # [N] bool each
    by_grams: Sequence[bool],
    gradients: Sequence[bool],
    eps: float,
    squared: bool,
    group: ProcessGroup | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Losses [pairs], means [W] and factors [N, N] or [W, Ds] each; a factor that is not asked for is empty."""
    pairs = list(zip(student, teacher, mask, strict=True))
    products, workspace = Memory(), Memory()
    counts, means = statistics(student, teacher, mask, group, like_scores(student[0]), workspace)
    losses, factors = [], []
    for (x, t, valid), count, mean, grams, wanted in zip(pairs, counts, means, by_grams, gradients, strict=True):
        if grams and group is None:
            loss, factor = _from_grams(x, t, valid, mean, count, eps, squared, workspace)
        else:
            covariance = _covariance(x, t, valid, mean, products, workspace)
            if group is not None:
                distributed.sum_(covariance, group)
            _, rest = halves(mean, covariance.dtype)
            covariance.addr_(rest * count.to(rest.dtype), rest, alpha=-1)
            loss, factor = _from_covariance(covariance, t.shape[1], count, eps, squared, wanted)
            if group is not None:
                factor *= distributed.world_size(group)
        losses.append(loss)
        factors.append(factor if wanted else like_scores(x))
    return torch.stack(losses), means, factors


# ---- backward -------------------------------------------------------------------------------------------------------


def gradient(student, teacher, mask, mean, factor, out: Tensor, workspace: Memory) -> Tensor:
    """out [N, Ds] = (B|A) factor, or factor A for a square factor."""
    width = teacher.shape[1]
    if factor.shape[0] == factor.shape[1]:
        for columns, chunk in _column_chunks(student, mean[width:], mask, factor, workspace):
            out[:, columns] = factor @ chunk
        return out
    product = Memory()
    if mask is not None:
        out.zero_()
    _, rest = halves(mean, factor.dtype)
    offset = -(rest @ factor)  # [Ds], what rows less the rest of their mean have beside their product
    for rows, chunk in row_chunks(student, teacher, mask, mean, like_scores(student), workspace):
        if isinstance(rows, slice) and out.dtype == factor.dtype:
            torch.addmm(offset, chunk, factor, out=out[rows])
        else:
            target = product.take(chunk, chunk.shape[0], factor.shape[1])
            out[rows] = torch.addmm(offset, chunk, factor, out=target).to(out.dtype)
        if mask is not None and isinstance(rows, slice):
            out[rows].masked_fill_(~mask[rows].unsqueeze(1), 0)
    return out


def torch_backward_(
    student: Sequence[Tensor],  # [N, Ds] each
    teacher: Sequence[Tensor],  # [N, Dt] each
    mask: Sequence[Tensor | None],  # [N] bool each
    mean: Sequence[Tensor],  # [W] each
    factor: Sequence[Tensor],  # [W, Ds] or [N, N] each
    gradients: Sequence[bool],
    grad_loss: Tensor,  # [pairs] float64
    results: Sequence[Tensor],  # [N, Ds] each
) -> None:
    """Writes the gradients that are asked for."""
    scaled, workspace = Memory(), Memory()
    for i, out in enumerate(results):
        if gradients[i]:
            # scaled before any rounding to 16 bits, so that a loss scale does what it is for
            small = torch.mul(factor[i], grad_loss[i], out=scaled.take(factor[i], *factor[i].shape))
            gradient(student[i], teacher[i], mask[i], mean[i], small, out, workspace)
