"""Rows of scores whose statistics come in parts: shards of a row on several ranks, and students wider than teachers.

A rank sums its shard up as if it were the row, and the ranks compute the same row from what they gather of these
(../vocabulary_shards.py has the maths). A student may also have columns that the teacher has none of, its tail. There
the divergence is of the columns that both have, and the cross-entropy of all: the tail adds to its sum of exponentials,
and its gradient is that of a row without a teacher.

R rows, V columns of the student, of which the teacher has the first; K ranks. Labels count from the first column here;
those of other ranks are ELSEWHERE, those of nobody -1. Of the statistics [R, 7] the last is here the logarithm of what
it is to the kernels: it is relative to the maximum of the shared columns, over which a tail may be by any number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ... import distributed
from ...divergence import divergence_code
from ..dtypes import score_dtype
from .divergence_rows import ELSEWHERE, divergence_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["RowBlock", "known_labels", "whole_row_gradient", "whole_row_stats"]

JSD = divergence_code("jsd")
REVERSE_KL = divergence_code("reverse_kl")
MASKED = -1e30  # what the kernels take scores of -inf for
INFINITE = 1e20  # divergences over it come from a masked column
LARGEST = 600.0  # logarithm of the largest sum that kernels are told of: to what is beside it, any larger is the same
NEARLY_EQUAL = 0.1  # divergence, in nats, under which the kernels' gradient is computed with care


class RowBlock(NamedTuple):
    """Some rows, or shards of them."""

    rows: slice
    student: Tensor  # [n, V]
    teacher: Tensor | None  # [n, at most V]

    @property
    def shared(self) -> int:
        """How many columns both models have; without a teacher, the student's."""
        return self.student.shape[1] if self.teacher is None else self.teacher.shape[1]


def known_labels(labels: Tensor, columns: int) -> Tensor:
    """Labels of whole rows, with -1 for what is none."""
    return labels.masked_fill((labels < 0) | (labels >= columns), -1)


def _labels_in(labels: Tensor | None, start: int, stop: int) -> Tensor | None:
    """Labels as those of the columns [start, stop)."""
    if labels is None:
        return None
    elsewhere = torch.where(labels >= 0, ELSEWHERE, labels)
    return torch.where((labels >= start) & (labels < stop), labels - start, elsewhere)


def _of_tail(divergence: float, beta: float, temperature: float, kd_weight: float, ce_weight: float) -> tuple:
    """The objective where there is no teacher."""
    return divergence, beta, temperature, 0.0, ce_weight


def _own_stats(
    block: RowBlock,
    coefficient: Tensor,
    labels: Tensor | None,
    stats: Tensor,
    metrics: Tensor | None,
    *objective: Any,
) -> None:
    """Writes [n, 7]: a shard's statistics alone; in place of the sixth the student's score at the label, if here."""
    stats.zero_()
    if metrics is not None:
        metrics.zero_()
    shared, columns = block.shared, block.student.shape[1]
    here = _labels_in(labels, 0, shared)
    student = block.student[:, :shared]
    divergence_rows(student, block.teacher, coefficient, here, None, stats, None, *objective, metrics=metrics)
    stats[:, 6].log_()
    if labels is None or columns == 0:
        return
    if shared < columns:
        tail, here = torch.zeros_like(stats), _labels_in(labels, shared, columns)
        of_tail = block.student[:, shared:], None, coefficient, here
        divergence_rows(*of_tail, None, tail, None, *_of_tail(*objective))
        _add_tail_(stats, tail)
    scores = block.student.gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1).double()
    stats[:, 5] = torch.where(labels >= 0, scores, 0)


def _add_tail_(stats: Tensor, tail: Tensor) -> None:
    """Adds what the tail adds: to the cross-entropy's sum alone, and the maximum stays, unless there is no other."""
    (max_s, log_sum), (max_tail, log_tail) = ((x[:, 0], x[:, 6]) for x in (stats, tail))
    log_tail = log_tail.log()
    alone = log_sum == -torch.inf
    added = torch.where(log_tail == -torch.inf, log_tail, log_tail + (max_tail - max_s))
    stats[:, 6] = torch.where(alone, log_tail, torch.logaddexp(log_sum, added))
    stats[:, 0] = torch.where(alone, max_tail, max_s)


def _chain_rule(own: Tensor, log_p: Tensor, log_q: Tensor, tau: float) -> Tensor:
    """[R] sum p log(p / q) from each shard's own [K, R] and the logarithms of its probabilities: never negative."""
    ruled_out = (log_p == -torch.inf) | (log_q == -torch.inf)  # then `own` means nothing
    own = own.masked_fill(ruled_out, 0)
    p, q = log_p.exp(), log_q.exp()
    # a score that is masked in all of a shard is to the ranks what it is to the kernels
    log_ratio = torch.where(log_q == -torch.inf, -MASKED / tau, log_p - log_q)
    near = p * (log_ratio + torch.expm1(-log_ratio))
    excess = torch.where(log_ratio.abs() < 1, near, p * log_ratio + (q - p))
    return (p * own + torch.where(p == 0, q, excess)).sum(0)


class _Top(NamedTuple):
    """Of one model: each shard's maximum less the row's, and the logarithm of its probability."""

    lower: Tensor  # [K, R]
    log_share: Tensor  # [K, R]


def _whole(shards: Tensor, tau: float, divergence: int) -> tuple[Tensor, Tensor, Tensor, tuple[_Top, _Top]]:
    """(D, stats [R, 7], the student's scores at the labels, both models' tops), from all statistics [K, R, 7].

    D is that of divergences with a closed form; the mean of u is theirs, too.
    """
    max_s, sum_s, max_t, sum_t, own, score, log_1 = shards.unbind(-1)  # [K, R]

    def top(maxima: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
        """The maximum of the rows, and by how much those of shards are lower."""
        maxima = maxima.masked_fill(empty, -torch.inf)
        highest = maxima.amax(0)
        highest = highest.masked_fill(highest == -torch.inf, 0)
        return highest, maxima - highest

    # by columns that both models have where there are any, as the cross-entropy alone can do with another maximum
    has_s = torch.where((sum_s != 0).any(0), sum_s != 0, log_1 != -torch.inf)
    top_s, lower_s = top(max_s, ~has_s)
    top_t, lower_t = top(max_t, sum_t == 0)
    total_s, total_t = ((sums * (lower / tau).exp()).sum(0) for sums, lower in ((sum_s, lower_s), (sum_t, lower_t)))
    stats = torch.zeros_like(shards[0])
    for i, column in enumerate((top_s, total_s, top_t, total_t)):
        stats[:, i] = column
    stats[:, 6] = torch.logsumexp(log_1 + (max_s - top_s).masked_fill(log_1 == -torch.inf, 0), 0)
    log_q, log_p = (
        sums.log() + lower / tau - total.log()
        for sums, lower, total in ((sum_s, lower_s, total_s), (sum_t, lower_t, total_t))
    )
    if divergence == REVERSE_KL:
        found = stats[:, 4] = _chain_rule(own, log_q, log_p, tau)
    else:
        found = _chain_rule(own, log_p, log_q, tau)
    stats[:, 5] = found < NEARLY_EQUAL
    return found, stats, score.sum(0), (_Top(lower_s, log_q), _Top(lower_t, log_p))


def _whole_metrics(own: Tensor, tops: tuple[_Top, _Top], empty: Tensor) -> Tensor:
    """[R, 6]: entropies and columns of whole rows from all shards' [K, R, 6]; a column, with its shard, is a number."""
    shards, columns = own.shape[0], []
    metrics = torch.zeros_like(own[0])
    for i, (lower, log_share) in enumerate(tops):
        inside = own[..., 2 + i] - log_share.masked_fill(log_share == -torch.inf, 0)
        metrics[:, 2 + i] = (log_share.exp() * inside).sum(0)
        owner = lower.argmax(0, keepdim=True)  # the first of those that are as high
        columns.append(own[..., 4 + i].gather(0, owner).squeeze(0) * shards + owner.squeeze(0))
    metrics[:, 4], metrics[:, 5] = columns
    return metrics.masked_fill(empty.unsqueeze(1), 0)


def _from_sums(
    blocks: Sequence[RowBlock], coefficient: Tensor, stats: Tensor, group: ProcessGroup | None, *objective: Any
) -> Tensor:
    """[R] D of the divergences without a closed form, and what their gradient needs into `stats`: a second look."""
    sums = coefficient.new_zeros(coefficient.shape[0], 3)
    for rows, student, teacher in blocks:
        shared = student[:, : RowBlock(rows, student, teacher).shared]
        of_rows = coefficient[rows], None, None, stats[rows], None
        divergence_rows(shared, teacher, *of_rows, *objective[:-1], 0.0, sums=sums[rows])
    value, mean, comean = (sums if group is None else distributed.sum_(sums, group)).unbind(1)
    saturated = comean < mean
    stats[:, 4], stats[:, 5] = torch.where(saturated, -comean, mean), saturated
    return value


def whole_row_stats(
    blocks: Sequence[RowBlock],  # of all R rows
    coefficient: Tensor,  # [R]
    labels: Tensor | None,  # [R]
    loss: Tensor,  # [R]
    stats: Tensor,  # [R, 7]
    group: ProcessGroup | None,
    *objective: Any,
    metrics: Tensor | None = None,  # [R, 6]
) -> None:
    """Writes loss, statistics and metrics of whole rows, as `divergence_rows` does, on every rank the same.

    But for the columns of the highest scores, which are any number that two of the same have in common.
    """
    divergence, _, tau, kd_weight, ce_weight = objective
    labels = labels if ce_weight != 0 else None
    own = torch.empty_like(stats)
    own_metrics = None if metrics is None else torch.empty_like(metrics)
    for rows, student, teacher in blocks:
        block = RowBlock(rows, student, teacher if kd_weight != 0 else None)
        row_labels = None if labels is None else labels[rows]
        row_metrics = None if own_metrics is None else own_metrics[rows]
        _own_stats(block, coefficient[rows], row_labels, own[rows], row_metrics, *objective)
    shards = own.unsqueeze(0) if group is None else distributed.gather(own, group)
    found, whole, score, tops = _whole(shards, tau, int(divergence))
    loss.zero_()
    if metrics is not None:
        metrics.zero_()
    if kd_weight != 0:
        empty = (whole[:, 1] == 0) | (whole[:, 3] == 0)
        if divergence >= JSD:
            whole[:, 4:6] = 0
            found = _from_sums(blocks, coefficient, whole, group, *objective)
        found = torch.where(found > INFINITE, torch.inf, found)
        if divergence == REVERSE_KL:
            whole[:, 4] = found
        whole[:, 4] = whole[:, 4].masked_fill(empty, 0)
        found = found.masked_fill(empty, 0)
        loss += kd_weight * tau**2 * found
        if metrics is not None and own_metrics is not None:
            parts = own_metrics.unsqueeze(0) if group is None else distributed.gather(own_metrics, group)
            metrics.copy_(_whole_metrics(parts, tops, empty))
            metrics[:, 0] = tau**2 * found
    if labels is not None:
        cross_entropy = (whole[:, 0] - score + whole[:, 6]).masked_fill(labels == -1, torch.nan)
        loss += ce_weight * cross_entropy
        if metrics is not None:
            metrics[:, 1] = cross_entropy
    if metrics is not None:
        metrics.masked_fill_((coefficient == 0).unsqueeze(1), 0)
    stats.copy_(whole)
    loss.mul_(coefficient).masked_fill_(coefficient == 0, 0)


def whole_row_gradient(
    block: RowBlock,
    stats: Tensor,  # [n, 7]
    coefficient: Tensor,  # [n]
    labels: Tensor | None,  # [n]
    gradient: Tensor,  # [n, V], may be the student
    *objective: Any,
) -> None:
    """Writes coefficient * d loss / d student by the statistics of whole rows."""
    student, teacher, shared, columns = block.student, block.teacher, block.shared, block.student.shape[1]
    log_sum = stats[:, 6]
    of_shared = stats.clone()
    of_shared[:, 6] = log_sum.clamp_max(LARGEST).exp()
    here = _labels_in(labels, 0, shared)
    target = gradient[:, :shared]
    divergence_rows(student[:, :shared], teacher, coefficient, here, None, of_shared, target, *objective)
    if shared == columns:
        return
    # A logarithm of the sum of exponentials is as good as a maximum: no score is larger. It is rounded to a score's
    # precision as a maximum is, and the sum makes up for that.
    nothing = log_sum == -torch.inf
    log_sum = (stats[:, 0] + log_sum).masked_fill(nothing, 0)
    tail = torch.zeros_like(stats)
    tail[:, 0] = log_sum.to(score_dtype(student))
    tail[:, 6] = (log_sum - tail[:, 0]).exp().masked_fill(nothing, 0)
    here = _labels_in(labels, shared, columns)
    target = gradient[:, shared:]
    divergence_rows(student[:, shared:], None, coefficient, here, None, tail, target, *_of_tail(*objective))
