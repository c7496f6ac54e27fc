"""The kernels: one program takes one row, or a shard of one."""

import triton
import triton.language as tl

from ..common import NOTHING, double, write_row
from .categories import cross_entropy, divergences, label_beside, log_masses, metrics_of, shared_out
from .rest import NOWHERE, Rest, row_of, sums_of_rest, write_gradient, write_rest


@triton.jit
def _columns_aside(ids, index, entries, student, S):
    """A row's columns that are set aside: (lanes, columns), which are NOWHERE for padding."""
    lane = tl.arange(0, S.LANES)
    column = tl.load(ids + index * entries + lane, mask=lane < entries, other=-1)
    return lane, tl.where((column >= 0) & (column < student.columns), column, NOWHERE).to(tl.int32)


@triton.jit(do_not_specialize=["entries"])
def topk_rows_kernel(
    student, ids, log_probs,
    tail_log_prob,  # None: no mass
    coefficient, labels,
    loss,  # None: stats are read
    stats,  # None: they are not kept
    gradient,  # None: it is not wanted
    metrics,  # None: they are not wanted, or there is no loss
    entries,
    # the divergences' weights, and kd_weight, are times tau^2
    forward_kl: tl.float64, reverse_kl: tl.float64, jsd: tl.float64, skew_kl: tl.float64, skew_reverse_kl: tl.float64,
    tvd: tl.float64, beta: tl.float64, tau: tl.float64, kd_weight: tl.float64, ce_weight: tl.float64,
    S,
):  # fmt: skip
    """One row: loss, stats and metrics, unless they are given, and the gradient, if wanted."""
    READ: tl.constexpr = not S.CONDITIONAL or labels is not None  # whether more than K scores count
    beta, tau, zero = double(beta), double(tau), double(0.0)
    index = tl.program_id(0).to(tl.int64)
    student, weight, nothing = row_of(student, index), tl.load(coefficient + index), Rest(zero, zero, zero)
    if gradient is not None:
        gradient = row_of(gradient, index)
    if weight == 0:  # the row is not read
        if loss is not None:  # else stats are given
            write_row(stats, index, nothing)
        write_row(loss, index, (zero,))
        write_row(metrics, index, (zero,) * 6)
        if gradient is not None:
            write_rest(student, gradient, nothing, tau, False, S)
    else:
        lane, aside = _columns_aside(ids, index, entries, student, S)
        log_p = tl.load(log_probs + index * entries + lane, mask=lane < entries, other=float("-inf")).to(tl.float64)
        aside = tl.where(log_p == float("-inf"), NOWHERE, aside)
        known, of_tail, label = aside != NOWHERE, lane == entries, None
        if labels is not None:
            label = label_beside(student, tl.load(labels + index), aside)
            aside = tl.where(of_tail & ~label.is_id, label.column, aside)
        pointers = student.pointer + aside.to(tl.int64) * student.stride
        s = tl.load(pointers, mask=aside != NOWHERE, other=float("-inf")).to(tl.float64)
        rest = Rest(double(NOTHING), zero, zero)
        if READ and loss is not None:
            rest = sums_of_rest(student, aside, tau, S)
            write_row(stats, index, rest)
        elif READ:
            rest = Rest(*[tl.load(stats + index * 3 + i) for i in (0, 1, 2)])
        tail_log_p = None
        if tail_log_prob is not None:
            tail_log_p = tl.load(tail_log_prob + index).to(tl.float64)
        log_q, log_p, tail = log_masses(known, of_tail, s, log_p, tail_log_p, label, rest, tau, S)
        weights = (forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, tvd)
        found = divergences(lane, log_q, log_p, weights, beta)
        entropy, of_all = zero, zero
        if label is not None:
            entropy, at_aside, of_all = cross_entropy(s, aside, label, rest)
        if loss is not None:
            tl.store(loss + index, weight * (found.value + ce_weight * entropy))
        if metrics is not None:
            write_row(
                metrics, index, metrics_of(lane, known, s, log_p, tail.reference, found, kd_weight, entropy, tau, S)
            )
        if gradient is not None:
            of_tail, slopes = shared_out(of_tail, weight / tau * found.slopes, tail, rest, tau, S)
            if label is not None:
                of_all *= weight * ce_weight
                slopes += weight * ce_weight * at_aside
            write_gradient(student, gradient, aside, slopes, Rest(rest.top, of_tail, of_all), tau, READ, S)


# ---- a shard of a row: what fastkd/ops/drivers/topk_shards.py puts together ------------------------------------------


@triton.jit(do_not_specialize=["entries"])
def topk_shard_stats_kernel(
    student,
    ids,  # and the label where it is none of them
    coefficient, stats, entries, tau: tl.float64, S,
):  # fmt: skip
    """One row: the maximum and the sums of the columns that are not set aside."""
    index, tau, zero = tl.program_id(0).to(tl.int64), double(tau), double(0.0)
    rest = Rest(zero, zero, zero)
    if tl.load(coefficient + index) != 0:
        _, aside = _columns_aside(ids, index, entries, student, S)
        rest = sums_of_rest(row_of(student, index), aside, tau, S)
    write_row(stats, index, rest)


@triton.jit(do_not_specialize=["entries"])
def topk_shard_gradient_kernel(
    student, ids, coefficient, stats,
    factors,  # of e^((s - maximum) / tau), and of e^(s - maximum)
    at_ids,  # the gradient at the columns set aside
    gradient,  # may be the student
    entries, tau: tl.float64, S,
):  # fmt: skip
    """One row: factors times exponentials, and what is given of the columns set aside."""
    index, tau, zero = tl.program_id(0).to(tl.int64), double(tau), double(0.0)
    factors += index * 2
    student, gradient = row_of(student, index), row_of(gradient, index)
    if tl.load(coefficient + index) == 0:  # the row is not read
        write_rest(student, gradient, Rest(zero, zero, zero), tau, False, S)
    else:
        lane, aside = _columns_aside(ids, index, entries, student, S)
        slopes = tl.load(at_ids + index * entries + lane, mask=aside != NOWHERE, other=0.0)
        rest = Rest(tl.load(stats + index * 3), tl.load(factors), tl.load(factors + 1))
        write_gradient(student, gradient, aside, slopes, rest, tau, True, S)
