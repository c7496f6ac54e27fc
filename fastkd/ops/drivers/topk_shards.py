"""Rows of a top-k teacher whose columns are spread over ranks: what drivers/whole_rows.py is of whole teachers.

The teacher is the same on all ranks. Of its ids each rank has scores of some, and of the tail some columns. It sums up
its part of the tail and the masses of its ids; what the ranks gather of that says what every category has of the whole
row, and the shares of D that a rank's own ids make are summed up over the ranks, with what the mean of u needs of them.
All this is done in float64, on K numbers a row; kernels read and write the columns.

R rows, V columns of a shard, K ids. Ids and labels count from a shard's first column here; those of other ranks are
ELSEWHERE, and those of nobody -1. Statistics of a row are [R, 9] float64: three of this rank's columns that are neither
an id's nor the label's, the maximum and the sums of e^((s - maximum) / temperature) and of e^(s - maximum); and six of
the whole row, which `_Row` names.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import distributed
from ...backend import backend_for
from ...divergence import DIVERGENCES
from .topk_call import TopKCall
from .topk_rows import topk_rows

__all__ = ["WHOLE_STATS", "topk_call_rows", "topk_whole_stats"]

WHOLE_STATS = 9
NOTHING = -torch.inf  # the logarithm of no mass
MASKED = 1e30  # the logarithm of a quotient of masses of which one is none
LARGEST = 700.0  # that of one in a mixture, in nats: any larger is the same

# ---- schema ---------------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastkd", "FRAGMENT")
_library.define(
    "topk_shard_stats(Tensor student, Tensor aside, Tensor coefficient, Tensor(a!) stats, float temperature) -> ()"
)
_library.define(
    "topk_shard_gradient(Tensor student, Tensor aside, Tensor coefficient, Tensor stats, Tensor factors, "
    "Tensor at_ids, Tensor(a!) gradient, float temperature) -> ()"
)

# ---- fake -----------------------------------------------------------------------------------------------------------

for _name in ("topk_shard_stats", "topk_shard_gradient"):
    # they write into tensors they are given
    torch.library.register_fake(f"fastkd::{_name}", lambda *_: None, lib=_library)

# ---- implementation: the extension registers its own for CPU tensors ------------------------------------------------


def _in_triton(name: str, *arguments: Any) -> None:
    from ...kernels import topk_rows

    getattr(topk_rows, name)(*arguments)


for _name in ("topk_shard_stats", "topk_shard_gradient"):
    _library.impl(_name, functools.partial(_in_triton, _name), "CUDA")


def _call(name: str, student: Tensor, *arguments: Any) -> None:
    """Nothing is written of shards without columns."""
    if student.shape[1] == 0:
        return
    if backend_for(student.device)[0] == "triton":
        _in_triton(name, student, *arguments)
    else:
        getattr(torch.ops.fastkd, name)(student, *arguments)


# ---- what a shard has of a row ---------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """Of whole rows, [R] each: logarithms of sums of exponentials, and what the gradient needs of the categories."""

    log_z: Tensor  # of s / temperature, over all categories
    log_tail: Tensor  # over the tail
    log_others: Tensor  # of s, over all columns but the label's
    log_sum: Tensor  # over all
    shift: Tensor  # what a category's gradient has for each unit of q
    saturated: Tensor  # bits of the divergences whose gradient is that of coslopes


class _Shard:
    """Where a rank has the scores of ids and labels, and these scores once they are read."""

    def __init__(self, call: TopKCall):
        _, self.conditional, _, self.tau, kd_weight, ce_weight = _objective(call)
        ids = call.ids if kd_weight != 0 else torch.full_like(call.ids, -1)
        labels = torch.full_like(ids[:, 0], -1) if call.labels is None or ce_weight == 0 else call.labels
        self.coefficient, label = call.coefficient, labels.unsqueeze(1)
        self.here = ids >= 0  # [R, K]
        self.is_label = self.here & (ids == label)  # [R, K]
        self.label_aside = (labels >= 0) & ~self.is_label.any(1)  # [R]: it is none of the ids
        self.columns = torch.cat([ids, label], 1)  # [R, K + 1]
        set_aside = torch.cat([self.here, self.label_aside.unsqueeze(1)], 1)
        self.aside = self.columns.masked_fill(~set_aside, -1)
        self.read_scores = call.coefficient.new_full(self.columns.shape, NOTHING)

    def read(self, rows: slice, student: Tensor) -> None:
        """Of a row that counts for nothing they are any number."""
        if student.shape[1]:
            columns, skipped = self.columns[rows], (self.coefficient[rows] == 0).unsqueeze(1)
            scores = student.gather(1, columns.clamp_min(0)).double().masked_fill(skipped, 0)
            self.read_scores[rows] = scores.masked_fill(columns < 0, NOTHING)

    @property
    def scores(self) -> Tensor:
        """[R, K]"""
        return self.read_scores[:, :-1]

    @property
    def label(self) -> Tensor:
        """[R]"""
        return self.read_scores[:, -1]

    def sums(self, stats: Tensor) -> list[Tensor]:
        """[R] each, in logarithms: the tail's sum and the ids' at the temperature; the others' and the label's at 1."""
        top, *totals = stats[:, :3].unbind(1)
        tail, others = (
            torch.where(x == 0, NOTHING, top.masked_fill(x == 0, 0) / tau + x.log())
            for x, tau in zip(totals, (self.tau, 1.0), strict=True)
        )
        own, rest = self.label.masked_fill(~self.label_aside, NOTHING), self.scores.masked_fill(self.is_label, NOTHING)
        return [
            _log_add(tail, own / self.tau),
            _log_sum(self.scores / self.tau),
            _log_add(others, _log_sum(rest)),
            self.label,
        ]

    def highest(self, stats: Tensor, first: Tensor) -> list[Tensor]:
        """[R] each: the highest score that is compared, and that of the teacher's first id."""
        highest = self.scores.amax(1)
        if not self.conditional:
            of_tail = stats[:, 0].masked_fill(stats[:, 1] == 0, NOTHING)
            highest = torch.maximum(torch.maximum(highest, of_tail), self.label)
        return [highest, self.scores.gather(1, first.unsqueeze(1)).squeeze(1)]


def _objective(call: TopKCall) -> tuple[Any, ...]:
    """(the divergences that count, conditional, beta, temperature, kd_weight, ce_weight)"""
    weights, *others = call.objective
    return [(name, w) for name, w in zip(DIVERGENCES, weights, strict=True) if w != 0], *others


def _log_sum(x: Tensor, dim: int = 1) -> Tensor:
    """logsumexp where there may be nothing but -inf."""
    nothing = (x == NOTHING).all(dim, keepdim=True)
    return x.masked_fill(nothing, 0).logsumexp(dim).masked_fill(nothing.squeeze(dim), NOTHING)


def _log_add(x: Tensor, y: Tensor) -> Tensor:
    return _log_sum(torch.stack([x, y], 1))


# ---- the categories --------------------------------------------------------------------------------------------------


class _Categories:
    """[R, K + 1], the ids and last the tail: no mass in either model where an id is another rank's or padding."""

    def __init__(self, shard: _Shard, call: TopKCall, log_z: Tensor, log_tail: Tensor):
        tail, nothing = call.tail_log_prob, log_tail == NOTHING
        _, self.conditional, self.beta, *_ = _objective(call)
        log_p = call.log_probs
        if self.conditional or tail is None:
            of_tail = torch.full_like(log_z, NOTHING)
        else:  # a tail that the student has nothing in is shared out among the ids
            of_ids = _log_sum(log_p)
            log_p = log_p - of_ids.masked_fill(~nothing | (of_ids == NOTHING), 0).unsqueeze(1)
            of_tail = tail.masked_fill(nothing, NOTHING)
        if self.conditional:
            log_tail = torch.full_like(log_z, NOTHING)
        self.all_log_p = torch.cat([log_p, of_tail.unsqueeze(1)], 1)  # those of other ranks, too
        self.empty = (log_z == NOTHING) | (self.all_log_p == NOTHING).all(1)  # [R]
        self.sums_to_1 = self.conditional or tail is not None
        present = torch.cat([shard.here, torch.ones_like(shard.here[:, :1])], 1) & ~self.empty.unsqueeze(1)
        log_q = torch.cat([shard.scores / shard.tau, log_tail.unsqueeze(1)], 1)
        self.log_q = (log_q - log_z.masked_fill(self.empty, 0).unsqueeze(1)).masked_fill(~present, NOTHING)
        self.log_p = self.all_log_p.masked_fill(~present, NOTHING)
        self.p, self.q = self.log_p.exp(), self.log_q.exp()
        neither = (self.log_p == NOTHING) & (self.log_q == NOTHING)
        self.ratio = (self.log_p - self.log_q).masked_fill(neither, 0).clamp(-MASKED, MASKED)
        #: q - p, with the digits it has where they nearly agree
        self.difference = torch.where(
            self.ratio >= 0, self.p * torch.expm1(-self.ratio), -self.q * torch.expm1(self.ratio)
        )

    def member(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Shares of D, and q u in the two forms that csrc/divergence.h has: slopes, coslopes."""
        p, q, ratio, difference = self.p, self.q, self.ratio, self.difference
        if name == "forward_kl":
            value = (p * ratio + difference).masked_fill((self.log_q == NOTHING) & (p > 0), torch.inf)
            return value, difference, torch.zeros_like(p)
        if name == "reverse_kl":
            value = (-q * ratio - difference).masked_fill((self.log_p == NOTHING) & (q > 0), torch.inf)
            return value, -q * ratio, torch.zeros_like(p)
        if name == "tvd":
            sign = difference.sign()
            return difference.abs() / 2, q * sign / 2, q * (1 - sign) / 2
        ratio = ratio.clamp(-LARGEST, LARGEST)
        a = 1 - self.beta if name == "skew_reverse_kl" else self.beta
        rest, m = 1 - a, a * p + (1 - a) * q
        p_over_m, q_over_m = -(rest * torch.expm1(-ratio)).log1p(), -(a * torch.expm1(ratio)).log1p()  # logarithms
        of_limit, share = (a / rest * ratio.exp()).log1p(), torch.where(m > 0, q / m.clamp_min(1e-300), 0)
        of_p, of_q = p * p_over_m + rest * difference, q * q_over_m - a * difference
        if name == "jsd":
            return a * of_p + rest * of_q, rest * q * q_over_m, rest * q * of_limit
        if name == "skew_kl":
            return of_p, rest * rest * difference * share, rest * p * share
        return of_q, q * q_over_m - a * rest * difference * share, q * of_limit - a * p * share

    def gradient(self, call: TopKCall, row: _Row) -> Tensor:
        """[R, K + 1] of D in the logarithms of the student's masses."""
        total = self.q * row.shift.unsqueeze(1)
        bits = row.saturated.long()
        members, *_ = _objective(call)
        for i, (name, weight) in enumerate(members):
            _, slope, coslope = self.member(name)
            total += weight * torch.where(((bits >> i) & 1 == 1).unsqueeze(1), -coslope, slope)
        return total.masked_fill(self.empty.unsqueeze(1), 0)

    def whole(self, call: TopKCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """([R] each: D, shift and saturated of `_Row`, the student's entropy), by a sum over the ranks."""
        assert call.group is not None
        members, *_ = _objective(call)
        own = self.log_q.new_ones(self.log_q.shape[1])
        own[-1] = distributed.rank_in(call.group) == 0  # every rank has the tail
        found = [self.member(name) for name, _ in members]
        parts = [self.difference, *(x for member in found for x in member), torch.special.entr(self.q)]
        sums = distributed.sum_(torch.stack([torch.where(own > 0, x, 0).sum(1) for x in parts]), call.group)
        value, shift, saturated = (torch.zeros_like(sums[0]) for _ in range(3))
        for i, (name, weight) in enumerate(members):
            share, mean, comean = sums[1 + 3 * i : 4 + 3 * i]
            if not self.sums_to_1:  # forward_kl or skew_kl
                share = share - (1 if name == "forward_kl" else 1 - self.beta) * sums[0]
            if name in ("forward_kl", "reverse_kl"):
                limited = torch.zeros_like(self.empty)
                mean = mean.masked_fill(share == torch.inf, torch.inf)  # then the gradient becomes NaN
            else:
                limited = comean < mean
            value, shift = value + weight * share, shift + weight * torch.where(limited, comean, -mean)
            saturated += limited.double() * 2**i
        value, shift, saturated = (x.masked_fill(self.empty, 0) for x in (value, shift, saturated))
        return value, shift, saturated, sums[-1]


# ---- rows ------------------------------------------------------------------------------------------------------------


def topk_whole_stats(
    blocks: Sequence[tuple[slice, Tensor]],  # of all R rows of a shard
    call: TopKCall,
    loss: Tensor,  # [R]
    metrics: Tensor | None,  # [R, 6]
) -> Tensor:
    """Writes loss and metrics of whole rows, on every rank the same, and returns statistics [R, 9]."""
    assert call.group is not None
    _, conditional, _, tau, kd_weight, ce_weight = _objective(call)
    stats, shard = call.coefficient.new_zeros(len(loss), WHOLE_STATS), _Shard(call)
    for rows, student in blocks:
        shard.read(rows, student)
        if ce_weight != 0 or not conditional:
            own = stats.new_zeros(len(student), 3)
            _call("topk_shard_stats", student, shard.aside[rows], call.coefficient[rows], own, tau)
            stats[rows, :3] = own
    parts = shard.sums(stats)
    if metrics is not None:
        parts += shard.highest(stats, call.log_probs.argmax(1))
    everywhere = distributed.gather(torch.stack(parts, 1), call.group)  # [ranks, R, 4 or 6]
    log_tail, log_ids, log_others, label = (_log_sum(everywhere[..., i], 0) for i in range(4))
    log_z = log_ids if conditional else _log_add(log_tail, log_ids)
    for i, x in enumerate((log_z, log_tail, log_others, _log_add(log_others, label)), 3):
        stats[:, i] = x
    loss.zero_()
    told = loss.new_zeros(len(loss), 6)
    if kd_weight != 0:
        categories = _Categories(shard, call, log_z, log_tail)
        value, stats[:, 7], stats[:, 8], entropy = categories.whole(call)
        loss += kd_weight * tau**2 * value
        if metrics is not None:
            told[:, 2], told[:, 3] = entropy, torch.special.entr(categories.all_log_p.exp()).sum(1)
            told[:, 4] = everywhere[..., 5].amax(0) >= everywhere[..., 4].amax(0)
            told[:, 5] = 0 if conditional else (log_ids - log_z).exp()
            told.masked_fill_(categories.empty.unsqueeze(1), 0)
        told[:, 0] = tau**2 * value
    if call.labels is not None and ce_weight != 0:
        told[:, 1] = torch.nn.functional.softplus(log_others - label, threshold=40).masked_fill(
            call.labels == -1, torch.nan
        )
        loss += ce_weight * told[:, 1]
    skipped = call.coefficient == 0
    loss.mul_(call.coefficient).masked_fill_(skipped, 0)
    if metrics is not None:
        metrics.copy_(told.masked_fill(skipped.unsqueeze(1), 0))
    return stats


def _whole_gradient(student: Tensor, call: TopKCall, stats: Tensor, gradient: Tensor) -> None:
    """Writes coefficient * d loss / d student [R, V], which may be the student, by the statistics of whole rows."""
    _, conditional, _, tau, kd_weight, ce_weight = _objective(call)
    row, shard, coefficient = _Row(*stats[:, 3:].unbind(1)), _Shard(call), call.coefficient
    shard.read(slice(None), student)
    top, total, _ = stats[:, :3].unbind(1)
    top = top.masked_fill(total == 0, 0)
    factors, at_ids = stats.new_zeros(len(stats), 2), torch.zeros_like(shard.read_scores)
    if kd_weight != 0:
        categories = _Categories(shard, call, row.log_z, row.log_tail)
        slopes = (coefficient * kd_weight * tau).unsqueeze(1) * categories.gradient(call, row)
        at_ids[:, :-1] = slopes[:, :-1]
        if not conditional:
            of_tail, whole = slopes[:, -1], row.log_tail.masked_fill(row.log_tail == NOTHING, 0)
            factors[:, 0] = torch.where(total == 0, 0, of_tail * (top / tau - whole).exp())
            at_ids[:, -1] = of_tail * (shard.label / tau - whole).exp()
    if call.labels is not None and ce_weight != 0:
        scale = coefficient * ce_weight
        log_sum = row.log_sum.masked_fill(row.log_sum == NOTHING, 0)
        of_label = -(row.log_others - log_sum).exp()
        shares = (shard.scores - log_sum.unsqueeze(1)).exp()
        shares = torch.where(shard.is_label, of_label.unsqueeze(1), shares)
        at_ids[:, :-1] += scale.unsqueeze(1) * shares
        at_ids[:, -1] += scale * of_label
        factors[:, 1] = (scale * (top - log_sum).exp()).masked_fill(call.labels == -1, torch.nan)
    _call(
        "topk_shard_gradient",
        student,
        shard.aside,
        coefficient,
        stats[:, :3].contiguous(),
        factors,
        at_ids,
        gradient,
        tau,
    )


def topk_call_rows(
    student: Tensor,  # [R, V]
    call: TopKCall,
    loss: Tensor | None,  # [R]
    stats: Tensor | None,  # [R, 3], of a shard [R, 9]; given where there is no loss
    gradient: Tensor | None,  # [R, V], may be the student
    metrics: Tensor | None = None,  # [R, 6]
) -> None:
    """Writes losses, statistics and metrics of rows, and their gradients: of these what is given."""
    if call.group is None:
        topk_rows(student, *call[:5], loss, stats, gradient, *call.objective, metrics=metrics)
        return
    if loss is not None:
        stats = topk_whole_stats([(slice(0, len(loss)), student)], call, loss, metrics)
    if gradient is not None:
        assert stats is not None
        _whole_gradient(student, call, stats, gradient)
