"""cka_loss on a GPU: by covariances in Triton (kernels/cka/), by N x N Grams, which are small, in torch's products.

Of Grams, pairs of the same shapes go together, as many as a workspace holds, and one by blocks of its columns where it
alone is larger. fastkd/ops/cka_loss.py has the mathematics.

Hidden states of 16 bits are centred in fp32 and rounded once for the tensor cores, the factor of the gradient too.

P pairs, N tokens, Ds and Dt widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dtypes import score_dtype
from .chunks import equal_parts
from .cka_loss_torch import loss_of_norms

__all__ = ["gpu_backward_", "gpu_forward"]

# Numbers of centred hidden states at a time.
WORKSPACE = 2**23


def _batches(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Sequence[Tensor | None]) -> list[list[int]]:
    """Which pairs go together."""
    alike: dict[tuple, list[int]] = {}
    for n, (x, t, valid) in enumerate(zip(student, teacher, mask, strict=True)):
        alike.setdefault((x.shape, t.shape, t.dtype, valid is None), []).append(n)
    batches = []
    for members in alike.values():
        x, t = student[members[0]], teacher[members[0]]
        size = max(1, WORKSPACE // max(1, x.shape[0] * max(x.shape[1], t.shape[1])))
        batches += [members[i : i + size] for i in range(0, len(members), size)]
    return batches


def _stacked(mask: Sequence[Tensor | None]) -> Tensor | None:
    """[P, N, 1]"""
    given = [valid for valid in mask if valid is not None]
    return torch.stack(given).unsqueeze(2) if given else None


def _operands(student: Tensor, teacher: Tensor) -> torch.dtype:
    """Of products: the wider of both models', and of scores at most."""
    exact, dtype = score_dtype(student), torch.promote_types(student.dtype, teacher.dtype)
    return dtype if dtype.itemsize < exact.itemsize else exact


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a b of batches of matrices, summed up in the dtype of the total."""
    if a.dtype == total.dtype or not a.is_cuda:  # Triton's interpreter, in tests
        return total.baddbmm_(a.to(total.dtype), b.to(total.dtype))
    return torch.baddbmm(total, a, b, out_dtype=total.dtype, out=total)


def _centred(
    xs: Sequence[Tensor], mask: Tensor | None, dtype: torch.dtype, exact: torch.dtype, mean: Sequence[Tensor]
) -> Iterator[tuple[slice, Tensor]]:
    """Columns of xs [N, D], centred by their means [D], as operands [P, N, columns]: 0 where a token is not valid."""
    tokens, width = xs[0].shape
    for columns in equal_parts(width, max(1, WORKSPACE // max(1, len(xs) * tokens))):
        x = torch.stack([x[:, columns] for x in xs]).to(exact)
        of_columns = torch.stack([m[columns] for m in mean]).unsqueeze(1)
        rounded = of_columns.to(exact)
        x.sub_(rounded).sub_((of_columns - rounded).to(exact))
        yield columns, (x if mask is None else x.masked_fill_(~mask, 0)).to(dtype)


def _write_means(xs: Sequence[Tensor], mask: Tensor | None, exact: torch.dtype, mean: Sequence[Tensor]) -> None:
    """From the first valid token on: an offset costs nothing, and tokens that are all the same have that mean."""
    tokens, width = xs[0].shape
    for columns in equal_parts(width, max(1, WORKSPACE // max(1, len(xs) * tokens))):
        x = torch.stack([x[:, columns] for x in xs]).to(exact)
        if tokens == 0:
            found = x.new_zeros(len(xs), x.shape[2], dtype=torch.float64)
        elif mask is None:
            found = x[:, 0] + (x - x[:, :1]).mean(1, dtype=torch.float64)
        else:
            x.masked_fill_(~mask, 0)
            first = x.gather(1, mask.int().argmax(1, keepdim=True).expand(-1, -1, x.shape[2]))
            count = mask.sum(1, dtype=torch.float64).clamp_min(1)
            found = first[:, 0] + x.sub_(first).masked_fill_(~mask, 0).sum(1, dtype=torch.float64) / count
        for out, one in zip(mean, found, strict=True):
            out[columns] = one


def _gram(
    xs: Sequence[Tensor], mask: Tensor | None, dtype: torch.dtype, exact: torch.dtype, mean: Sequence[Tensor]
) -> Tensor:
    """A A^T [P, N, N]"""
    _write_means(xs, mask, exact, mean)
    total = xs[0].new_zeros(len(xs), xs[0].shape[0], xs[0].shape[0], dtype=exact)
    for _, x in _centred(xs, mask, dtype, exact, mean):
        _add_product_(total, x, x.mT)
    return total


def _grams_forward(
    student: Sequence[Tensor],  # [N, Ds] each
    teacher: Sequence[Tensor],  # [N, Dt] each
    mask: Sequence[Tensor | None],  # [N] bool each
    mean: Sequence[Tensor],  # [Dt + Ds] float64 each, of (B|A), to be written
    factor: Sequence[Tensor],  # [N, N] each, likewise; empty where it is not wanted
    eps: float,
    squared: bool,
) -> list[Tensor]:
    """The losses, 0-d float64."""
    losses: dict[int, Tensor] = {}
    for members in _batches(student, teacher, mask):
        xs, ts, means = ([each[n] for n in members] for each in (student, teacher, mean))
        dtype, exact, valid = _operands(xs[0], ts[0]), score_dtype(xs[0]), _stacked([mask[n] for n in members])
        width, tokens = ts[0].shape[1], xs[0].shape[0]
        ours = _gram(xs, valid, dtype, exact, [m[width:] for m in means])
        theirs = _gram(ts, valid, dtype, exact, [m[:width] for m in means])
        s, t = (torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.float64) for x in (ours, theirs))
        c = (ours * theirs).sum((1, 2), dtype=torch.float64).clamp_min(0).sqrt()
        count = torch.full_like(s, tokens) if valid is None else valid.sum((1, 2), dtype=torch.float64)
        found, alpha, beta = loss_of_norms(c, s, t, count, eps, squared)
        for i, n in enumerate(members):
            losses[n] = found[i]
            if factor[n].numel() > 0:
                factor[n].copy_(ours[i].mul_(beta[i]).sub_(theirs[i].mul_(alpha[i])))
    return [losses[n] for n in range(len(student))]


def _grams_backward_(
    student: Sequence[Tensor],  # [N, Ds] each
    teacher: Sequence[Tensor],  # [N, Dt] each
    mask: Sequence[Tensor | None],  # [N] bool each
    mean: Sequence[Tensor],  # [Dt + Ds] each
    factor: Sequence[Tensor],  # [N, N] each
    grad_loss: Sequence[Tensor],  # 0-d float64
    results: Sequence[Tensor],  # [N, Ds] each, to be written
) -> None:
    """The gradients, of factor A."""
    for members in _batches(student, teacher, mask):
        xs, means = ([each[n] for n in members] for each in (student, mean))
        dtype, exact = _operands(xs[0], teacher[members[0]]), score_dtype(xs[0])
        width, valid = teacher[members[0]].shape[1], _stacked([mask[n] for n in members])
        factors = torch.stack([factor[n] for n in members])
        # a power of two that brings them into the range of fp16: the more tokens, the smaller they are
        _, exponent = torch.frexp(factors.abs().amax((1, 2), keepdim=True))
        lift = torch.ldexp(torch.ones_like(exponent, dtype=exact), (12 - exponent).clamp(-100, 100))
        scale = (torch.stack([grad_loss[n] for n in members]).view(-1, 1, 1) / lift).to(exact)
        factors = factors.mul_(lift).to(dtype)
        for columns, x in _centred(xs, valid, dtype, exact, [m[width:] for m in means]):
            found = _add_product_(x.new_zeros(x.shape, dtype=exact), factors, x).mul_(scale)
            if valid is not None:
                found.masked_fill_(~valid, 0)
            for n, one in zip(members, found, strict=True):
                results[n][:, columns] = one


def gpu_forward(
    student: Sequence[Tensor],  # [N, Ds] each
    teacher: Sequence[Tensor],  # [N, Dt] each
    mask: Sequence[Tensor | None],  # [N] bool each
    mean: Sequence[Tensor],  # [Dt + Ds] float64 each, of (B|A), to be written
    factor: Sequence[Tensor],  # [Dt + Ds, Ds], or [N, N] by Grams, each, likewise; empty where it is not wanted
    by_grams: Sequence[bool],
    eps: float,
    squared: bool,
) -> Tensor:
    """The losses [pairs] float64."""
    from ...kernels import cka as kernels

    losses: dict[int, Tensor] = {}
    forms: Any = (True, _grams_forward), (False, kernels.cka_loss)
    for grams, forward in forms:
        members = [n for n, chosen in enumerate(by_grams) if chosen == grams]
        if members:
            lists: list[Any] = [[each[n] for n in members] for each in (student, teacher, mask, mean, factor)]
            losses.update(zip(members, forward(*lists, eps, squared), strict=True))
    return torch.stack([losses[n] for n in range(len(student))])


def gpu_backward_(
    student: Sequence[Tensor],  # [N, Ds] each
    teacher: Sequence[Tensor],  # [N, Dt] each
    mask: Sequence[Tensor | None],  # [N] bool each
    mean: Sequence[Tensor],  # [Dt + Ds] each
    factor: Sequence[Tensor],  # [Dt + Ds, Ds], or [N, N] by Grams, each
    gradients: Sequence[bool],
    grad_loss: Tensor,  # [pairs] float64
    results: Sequence[Tensor],  # [N, Ds] each
) -> None:
    """Writes the gradients that are asked for."""
    from ...kernels import cka as kernels

    wanted = [n for n, out in enumerate(results) if gradients[n] and out.numel() > 0]
    for grams, backward_ in ((True, _grams_backward_), (False, kernels.cka_loss_backward_)):
        members = [n for n in wanted if (factor[n].shape[0] == factor[n].shape[1]) == grams]
        if members:
            lists: list[Any] = [
                [each[n] for n in members] for each in (student, teacher, mask, mean, factor, grad_loss, results)
            ]
            backward_(*lists)
