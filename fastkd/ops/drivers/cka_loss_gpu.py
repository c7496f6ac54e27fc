"""cka_loss on a GPU: hidden states centred in Triton (kernels/cka.py), products of them by torch.

A kernel that centred rows on their way to the tensor cores would keep these waiting: of a tile of 128 x 128, 64 tokens
took 512 clocks of products, but 1184 of shared memory and 1061 of issue. Stored in the operands' dtype, for 0.24 clocks
of memory a number, they are operands of plain GEMMs, which torch does at three quarters of the products' rate and more.
What symmetry would save, 21 of 76 tiles of 768 and 512 columns, is less than such a kernel loses.

Pairs of the same shapes go together: in one launch of a kernel, and by batched products, of which a GEMM of few tiles
and many tokens would leave most of the GPU idle. What is centred at a time are as many pairs as a workspace holds, or
tokens of one, or columns of its Grams. fastkd/ops/cka_loss.py has the mathematics.

Hidden states of 16 bits are centred in fp32 and rounded once for the tensor cores, the factor of the gradient too.
Products are fp32, also those that become a gradient of 16 bits: near convergence both models' parts all but cancel,
and torch may add up 16-bit parts of a product that is 16 bits itself.

P pairs, p of them at a time, N tokens, Ds and Dt widths, W their sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dtypes import score_dtype
from .chunks import equal_parts, product
from .cka_loss_torch import Memory, loss_of_norms

__all__ = ["gpu_backward_", "gpu_forward"]

# Bytes of centred hidden states at a time; and of products, where several pairs go together.
WORKSPACE = 2**27


# ---- pairs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Pairs of the same shapes and dtypes."""

    members: list[int]  # of the call's pairs
    student: list[Tensor]  # [N, Ds] each
    teacher: list[Tensor]  # [N, Dt] each
    mask: list[Tensor | None]  # [N] bool each, or all None
    mean: list[Tensor]  # [W] float64 each, of (B|A)

    @property
    def exact(self) -> torch.dtype:
        """Of sums."""
        return score_dtype(self.student[0])

    @property
    def dtype(self) -> torch.dtype:
        """Of products' operands: the wider of both models', and of sums at most."""
        dtype = torch.promote_types(self.student[0].dtype, self.teacher[0].dtype)
        return dtype if dtype.itemsize < self.exact.itemsize else self.exact

    @property
    def models(self) -> tuple[tuple[list[Tensor], slice], ...]:
        """Teachers and students, with what is theirs of (B|A)."""
        width, widths = self.teacher[0].shape[1], self.mean[0].shape[0]
        return (self.teacher, slice(0, width)), (self.student, slice(width, widths))

    def count(self) -> Tensor:
        """How many tokens are valid: [P] float64."""
        masks = [mask for mask in self.mask if mask is not None]
        if masks:
            return torch.stack(masks).sum(1, dtype=torch.float64)
        return self.mean[0].new_full((len(self.mean),), self.student[0].shape[0])

    def _parts(self, length: int, other: int) -> Iterator[tuple[slice, slice]]:
        """Pairs, and parts of a `length` of rows or columns of so many numbers, that a workspace holds."""
        size = other * self.dtype.itemsize
        for pairs in equal_parts(len(self.mean), max(1, WORKSPACE // max(1, length * size))):
            for part in equal_parts(length, max(1, WORKSPACE // max(1, (pairs.stop - pairs.start) * size))):
                yield pairs, part

    def rows(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Pairs, tokens of them and their centred (B|A) [p, n, W], in memory that the next ones overwrite."""
        from ...kernels.cka import centre_

        memory, like = Memory(), self.student[0].new_empty(0, dtype=self.dtype)
        for pairs, rows in self._parts(self.student[0].shape[0], self.mean[0].shape[0]):
            x = memory.take(like, pairs.stop - pairs.start, rows.stop - rows.start, self.mean[0].shape[0])
            masks = [None if mask is None else mask[rows] for mask in self.mask[pairs]]
            for xs, own in self.models:
                means = [mean[own] for mean in self.mean[pairs]]
                centre_([one[rows] for one in xs[pairs]], masks, means, x[:, :, own], self.exact)
            yield pairs, rows, x

    def columns(self, xs: list[Tensor], own: slice) -> Iterator[tuple[slice, slice, Tensor]]:
        """Pairs, columns of one of the models and these centred [p, N, n], in memory that the next ones overwrite."""
        from ...kernels.cka import centre_

        memory, like = Memory(), xs[0].new_empty(0, dtype=self.dtype)
        tokens, width = xs[0].shape
        for pairs, columns in self._parts(width, tokens):
            x = memory.take(like, pairs.stop - pairs.start, tokens, columns.stop - columns.start)
            means = [mean[own][columns] for mean in self.mean[pairs]]
            centre_([one[:, columns] for one in xs[pairs]], self.mask[pairs], means, x, self.exact)
            yield pairs, columns, x


def _batches(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Sequence[Tensor | None], mean: Sequence[Tensor],
    wanted: Sequence[int],
) -> Iterator[_Batch]:  # fmt: skip
    """The pairs that are wanted."""
    from ...kernels.cka import ENTRIES
    from ...kernels.tuning import together

    settings = [(student[n].shape, teacher[n].shape, teacher[n].dtype, mask[n] is None) for n in wanted]
    for alike in together(settings, len(settings)):
        same = [wanted[i] for i in alike]
        size = min(student[same[0]].shape[0], mean[same[0]].shape[0]) ** 2 * score_dtype(student[0]).itemsize
        for part in equal_parts(len(same), min(ENTRIES, max(1, WORKSPACE // max(1, size)))):
            members = same[part]
            xs, ts, means = ([each[n] for n in members] for each in (student, teacher, mean))
            yield _Batch(members, xs, ts, [mask[n] for n in members], means)


# ---- products --------------------------------------------------------------------------------------------------------


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b of batches of matrices, summed up in the dtype of the total."""
    if a.dtype == total.dtype or not a.is_cuda:  # Triton's interpreter, in tests
        total.baddbmm_(a.to(total.dtype), b.to(total.dtype))
    else:
        torch.baddbmm(total, a, b, out_dtype=total.dtype, out=total)


def _norms(*xs: Tensor) -> list[Tensor]:
    """In float64: near convergence the loss is what norms differ by."""
    return [torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.float64) for x in xs]


def _from_grams(batch: _Batch, eps: float, squared: bool) -> tuple[Tensor, Tensor]:
    """The losses [P] and factors [P, N, N]."""
    tokens, grams = batch.student[0].shape[0], []
    for model in batch.models:
        grams.append(batch.student[0].new_zeros(len(batch.mean), tokens, tokens, dtype=batch.exact))
        for pairs, _, x in batch.columns(*model):
            _add_product_(grams[-1][pairs], x, x.mT)
    theirs, ours = grams
    t, s = _norms(theirs, ours)
    c = (ours * theirs).sum((1, 2), dtype=torch.float64).clamp_min(0).sqrt()
    loss, alpha, beta = loss_of_norms(c, s, t, batch.count(), eps, squared)
    return loss, ours.mul_(beta.view(-1, 1, 1)).sub_(theirs.mul_(alpha.view(-1, 1, 1)))


def _from_covariances(batch: _Batch, eps: float, squared: bool) -> tuple[Tensor, Tensor]:
    """The losses [P] and factors [P, W, Ds]."""
    (_, of_teacher), (xs, of_student) = batch.models
    width, widths = of_teacher.stop, of_student.stop
    ours = xs[0].new_zeros(len(batch.mean), widths, xs[0].shape[1], dtype=batch.exact)  # (B|A)^T A
    theirs = ours.new_zeros(len(batch.mean), width, width)  # B^T B
    for pairs, _, x in batch.rows():
        b = x[:, :, of_teacher]
        _add_product_(ours[pairs], x.mT, x[:, :, of_student])
        _add_product_(theirs[pairs], b.mT, b)
    cross, own = ours[:, of_teacher], ours[:, of_student]
    c, s, t = _norms(cross, own, theirs)
    loss, alpha, beta = loss_of_norms(c, s, t, batch.count(), eps, squared)
    cross.mul_(-alpha.view(-1, 1, 1))
    own.mul_(beta.view(-1, 1, 1))
    return loss, ours


# ---- forward and backward --------------------------------------------------------------------------------------------


def gpu_forward(
    student: Sequence[Tensor],  # [N, Ds] each
    teacher: Sequence[Tensor],  # [N, Dt] each
    mask: Sequence[Tensor | None],  # [N] bool each
    mean: Sequence[Tensor],  # [W] float64 each, of (B|A), to be written
    factor: Sequence[Tensor],  # [W, Ds], or [N, N] by Grams, each, likewise; empty where it is not wanted
    by_grams: Sequence[bool],
    eps: float,
    squared: bool,
) -> Tensor:
    """The losses [pairs] float64."""
    from ...kernels.cka import means_

    losses: dict[int, Tensor] = {}
    for batch in _batches(student, teacher, mask, mean, range(len(student))):
        for xs, own in batch.models:
            means_(xs, batch.mask, [mean[own] for mean in batch.mean], batch.exact)
        from_products = _from_grams if by_grams[batch.members[0]] else _from_covariances
        for n, loss, found in zip(batch.members, *from_products(batch, eps, squared), strict=True):
            losses[n] = loss
            if factor[n].numel() > 0:
                factor[n].copy_(found)
    return torch.stack([losses[n] for n in range(len(student))])


def gpu_backward_(
    student: Sequence[Tensor],  # [N, Ds] each
    teacher: Sequence[Tensor],  # [N, Dt] each
    mask: Sequence[Tensor | None],  # [N] bool each
    mean: Sequence[Tensor],  # [W] each
    factor: Sequence[Tensor],  # [W, Ds], or [N, N] by Grams, each
    gradients: Sequence[bool],
    grad_loss: Tensor,  # [pairs] float64
    results: Sequence[Tensor],  # [N, Ds] each
) -> None:
    """Writes the gradients that are asked for: (B|A) factor, or factor A."""
    wanted = [n for n, out in enumerate(results) if gradients[n] and out.numel() > 0]
    for batch in _batches(student, teacher, mask, mean, wanted):
        factors = torch.stack([factor[n] for n in batch.members])
        grams = factors.shape[1] == factors.shape[2]
        # a power of two that brings them into the range of fp16: the more tokens, the smaller they are
        _, exponent = torch.frexp(factors.abs().amax((1, 2)))
        lift = torch.ldexp(torch.ones_like(exponent, dtype=batch.exact), (12 - exponent).clamp(-100, 100))
        scale = torch.stack([grad_loss[n] for n in batch.members]) / lift
        factors = factors.mul_(lift.view(-1, 1, 1)).to(batch.dtype)
        for pairs, part, x in batch.columns(*batch.models[1]) if grams else batch.rows():
            matrices = (factors[pairs], x) if grams else (x, factors[pairs])
            for n, found, one in zip(
                batch.members[pairs], product(*matrices, batch.exact), scale[pairs], strict=True
            ):  # fmt: skip
                torch.mul(found, one, out=results[n][:, part] if grams else results[n][part])
        for n in batch.members:
            valid = mask[n]
            if valid is not None:
                results[n].masked_fill_(~valid.unsqueeze(1), 0)
