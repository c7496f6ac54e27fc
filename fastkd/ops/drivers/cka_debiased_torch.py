"""cka_loss(debiased=True) by torch's GEMMs, on any device: HSIC without the diagonals of its Grams.

With K = A A^T and L = B B^T the Grams of student and teacher, HSIC counts how like itself each token is, and finds that
even independent hidden states have this in common. The unbiased estimate of Song et al. (2012), HSIC_1, leaves the
diagonals out. But for a factor N (N - 3), which CKA does not have, it is the inner product of U-centred Grams (Székely
and Rizzo, 2014), which are 0 on the diagonal and off it

    U(K)_ij = K_ij - (r_i + r_j) / (N - 2) + sum r / ((N - 1) (N - 2)),    r_i = sum of K_ij over j != i

So <U(K), U(K)> is never negative, while <U(K), U(L)> may be. Of centred hidden states, with k_i = |a_i|^2 and l_i =
|b_i|^2, the r_i are -k_i; then no N x N matrix is needed, neither for the products nor for their gradients 2 U(L) A and
4 U(K) A:

    <U(K), U(L)> = |B^T A|^2 - N / (N - 2) sum k_i l_i + (sum k) (sum l) / ((N - 1) (N - 2))
    U(L) A = B (B^T A) - N / (N - 2) diag(l) A + (sum l) / ((N - 1) (N - 2)) A + 1 (A^T l)^T / (N - 2)

That is the covariances of the biased estimate, some sums of the k_i and l_i beside them, and two terms beside the GEMM
of the gradient. Taking off diagonals costs digits, where tokens are few for their widths or one is far from all others:
so these are in float64, at half the speed of the biased loss. Alone, fewer tokens than W have their Grams U-centred.

N tokens, Ds and Dt widths, W their sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import distributed
from ...reference import CONSTANT, LEAST_TOKENS, ROOT
from . import cka_loss_torch as gemms

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["EXTRA_ROWS", "debiased_backward_", "debiased_forward"]

# Of the factor, behind the W that the rows (B|A) are multiplied with: what all rows of the gradient have, and how much
# of its own a_i each has, for every l_i and for every k_i.
EXTRA_ROWS = 3
# Of covariances: hidden states count as constant where no more is left of |A^T A|^2 without the diagonal, in roundings,
# of which sums over thousands of tokens have hundreds.
LEFT = 4096


def _loss(
    cross: Tensor,  # <U(K), U(L)>
    s: Tensor,  # |U(K)|
    t: Tensor,  # |U(L)|
    constant: Tensor,  # whether one model's is nothing
    count: Tensor,
    eps: float,
    squared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a pair, and alpha and beta of its gradient beta U(K) A - alpha U(L) A: all 0-d float64."""
    scale = (s + eps) * (t + eps)
    cka = torch.where(constant, 0, cross / scale)
    value, slope = cka, torch.ones_like(cka)
    if not squared:
        smooth = cka.square() + ROOT**2
        value, slope = cka * smooth**-0.25, (0.5 * cka.square() + ROOT**2) * smooth**-1.25
    nothing = constant | (count < LEAST_TOKENS)
    alpha = torch.where(nothing, 0, 2 * slope / scale)
    beta = torch.where(nothing, 0, 2 * slope * cka / (s * (s + eps)))
    return torch.where(count < LEAST_TOKENS, 0, 1 - value), alpha, beta


# ---- few tokens: N x N Grams ----------------------------------------------------------------------------------------


def _u_centre_(gram: Tensor, mask: Tensor | None, count: Tensor) -> Tensor:
    """U(gram), in place; rows and columns of tokens that are not valid are 0 before and after."""
    gram.fill_diagonal_(0)
    rows = gram.sum(1, dtype=torch.float64) / (count - 2).clamp_min(1)
    rest = (rows - rows.sum() / (2 * (count - 1).clamp_min(1))).to(gram.dtype)  # each takes half of the total
    gram.sub_(rest).sub_(rest.unsqueeze(1)).fill_diagonal_(0)
    if mask is not None:
        gram.masked_fill_(~mask, 0).masked_fill_(~mask.unsqueeze(1), 0)
    return gram


def _from_grams(student, teacher, mask, mean, count, eps, squared, workspace) -> tuple[Tensor, Tensor]:
    """The loss, and the factor [N, N]."""
    width, like = teacher.shape[1], gemms.like_scores(student)
    grams, norms, constant = [], [], count < 0
    for x, own in ((student, mean[width:]), (teacher, mean[:width])):
        gram = gemms.gram(x, own, mask, like, workspace)
        whole = gemms.symmetric_norm(gram)
        grams.append(_u_centre_(gram, mask, count))
        norms.append(gemms.symmetric_norm(gram))
        constant = constant | (norms[-1] <= CONSTANT * torch.finfo(like.dtype).eps * whole)
    ours, theirs = grams
    cross = (ours * theirs).sum(dtype=torch.float64)
    loss, alpha, beta = _loss(cross, norms[0], norms[1], constant, count, eps, squared)
    return loss, ours.mul_(beta).sub_(theirs.mul_(alpha))


# ---- many tokens: covariances ---------------------------------------------------------------------------------------


def _rows(
    student: Tensor, teacher: Tensor, mask: Tensor | None, mean: Tensor, like: Tensor, workspace: gemms.Memory
) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
    """Centred rows (B|A) [n, W] and their (l, k) [n, 2], in a workspace that the next ones overwrite."""
    width = teacher.shape[1]
    _, rest = gemms.halves(mean, like.dtype)
    for rows, chunk in gemms.row_chunks(student, teacher, mask, mean, like, workspace):
        chunk.sub_(rest)
        if mask is not None and isinstance(rows, slice):
            chunk.masked_fill_(~mask[rows].unsqueeze(1), 0)
        norms = [torch.linalg.vector_norm(part, dim=1) for part in (chunk[:, :width], chunk[:, width:])]
        yield rows, chunk, torch.stack(norms, 1).square()


def _from_covariance(
    student, teacher, mask, mean, count, eps, squared, wanted, group, products, workspace
) -> tuple[Tensor, Tensor]:
    """The loss, and the factor [W + 3, Ds] if it is wanted."""
    width, widths = teacher.shape[1], mean.shape[0]
    like = student.new_empty(0, dtype=torch.float64)
    covariance = products.take(like, widths, widths).zero_()
    # of (l, k): their sums, the sums of their products, and those with the rows of A
    sums = torch.zeros(2, 3 + student.shape[1], dtype=torch.float64, device=like.device)
    for _, chunk, squares in _rows(student, teacher, mask, mean, like, workspace):
        gemms.add_symmetric_(covariance, chunk, width, student.shape[1])
        sums[:, 0] += squares.sum(0)
        sums[:, 1:3] += squares.T @ squares
        sums[:, 3:] += squares.T @ chunk[:, width:]
    if group is not None:
        distributed.sum_(covariance, group)
        distributed.sum_(sums, group)

    of_rows, of_all = count / (count - 2).clamp_min(1), 1 / ((count - 1) * (count - 2)).clamp_min(1)
    cross, ours, theirs = covariance[:width, width:], covariance[width:, width:], covariance[:width, :width]
    # the squared norms of covariances, then without the Grams' diagonals: of B^T B, B^T A, A^T A
    whole = torch.stack([gemms.symmetric_norm(theirs), torch.linalg.vector_norm(cross, dtype=torch.float64),
                         gemms.symmetric_norm(ours)]).square()  # fmt: skip
    (teachers, students), moments = sums[:, 0], torch.stack([sums[0, 1], sums[0, 2], sums[1, 2]])
    totals = torch.stack([teachers * teachers, teachers * students, students * students])
    t2, product, s2 = whole - of_rows * moments + of_all * totals
    least = LEFT * torch.finfo(like.dtype).eps * whole
    s, t = s2.clamp_min(0).sqrt(), t2.clamp_min(0).sqrt()
    loss, alpha, beta = _loss(product, s, t, (t2 <= least[0]) | (s2 <= least[2]), count, eps, squared)
    if not wanted:
        return loss, like
    gemms.mirror_(ours)
    factor = like.new_empty(widths + EXTRA_ROWS, student.shape[1])
    torch.mul(cross, -alpha, out=factor[:width])
    torch.mul(ours, beta, out=factor[width:widths])
    factor[width:widths].diagonal().add_(of_all * (beta * students - alpha * teachers))
    factor[widths] = (beta * sums[1, 3:] - alpha * sums[0, 3:]) / (count - 2).clamp_min(1)
    factor[widths + 1] = of_rows * alpha
    factor[widths + 2] = -of_rows * beta
    return loss, factor


def debiased_forward(
    student: Sequence[Tensor],  # [N, Ds] each
    teacher: Sequence[Tensor],  # [N, Dt] each
    mask: Sequence[Tensor | None],  # [N] bool each
    by_grams: Sequence[bool],
    gradients: Sequence[bool],
    eps: float,
    squared: bool,
    group: ProcessGroup | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Losses [pairs], means [W] and factors [N, N] or [W + 3, Ds] each; a factor that is not asked for is empty."""
    products, workspace = gemms.Memory(), gemms.Memory()
    exact = student[0].new_empty(0, dtype=torch.float64)
    counts, means = gemms.statistics(student, teacher, mask, group, exact, workspace)
    losses, factors = [], []
    for i, pair in enumerate(zip(student, teacher, mask, means, counts, strict=True)):
        if by_grams[i] and group is None:
            loss, factor = _from_grams(*pair, eps, squared, workspace)
        else:
            loss, factor = _from_covariance(*pair, eps, squared, gradients[i], group, products, workspace)
            if group is not None:
                factor *= distributed.world_size(group)
        losses.append(loss)
        factors.append(factor if gradients[i] else factor.new_empty(0))
    return torch.stack(losses), means, factors


# ---- backward -------------------------------------------------------------------------------------------------------


def _gradient(student, teacher, mask, mean, factor, out: Tensor, workspace: gemms.Memory) -> None:
    """out [N, Ds] = (B|A|1) factor + diag(l, k) A, by the rows of a factor [W + 3, Ds]."""
    width, widths = teacher.shape[1], mean.shape[0]
    product = gemms.Memory()
    if mask is not None:
        out.zero_()
    for rows, chunk, squares in _rows(student, teacher, mask, mean, factor, workspace):
        target = product.take(chunk, chunk.shape[0], factor.shape[1])
        torch.addmm(factor[widths], chunk, factor[:widths], out=target)
        own = squares @ factor[widths + 1 :, 0]
        target.addcmul_(chunk[:, width:], own.unsqueeze(1))
        if mask is not None and isinstance(rows, slice):
            target.masked_fill_(~mask[rows].unsqueeze(1), 0)
        out[rows] = target.to(out.dtype)


def debiased_backward_(
    student: Sequence[Tensor],  # [N, Ds] each
    teacher: Sequence[Tensor],  # [N, Dt] each
    mask: Sequence[Tensor | None],  # [N] bool each
    mean: Sequence[Tensor],  # [W] each
    factor: Sequence[Tensor],  # [W + 3, Ds] or [N, N] each
    gradients: Sequence[bool],
    grad_loss: Tensor,  # [pairs] float64
    results: Sequence[Tensor],  # [N, Ds] each
) -> None:
    """Writes the gradients that are asked for."""
    workspace = gemms.Memory()
    for i, out in enumerate(results):
        if gradients[i]:
            scaled = factor[i] * grad_loss[i].to(factor[i].dtype)
            of_grams = factor[i].shape[0] == factor[i].shape[1]
            gradient = gemms.gradient if of_grams else _gradient
            gradient(student[i], teacher[i], mask[i], mean[i], scaled, out, workspace)
