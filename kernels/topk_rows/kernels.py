"""The kernels: one program takes one row, or a shard of one."""

import triton
import triton.language as tl

from ..common import double
from .categories import cross_entropy, divergences, label_beside, log_masses, metrics_of, shared_out
from .rest import NOTHING, NOWHERE, sums_of_rest, write_gradient, write_rest


@triton.jit
def _columns_aside(ids, index, entries, columns, LANES: tl.constexpr):
    """A row's columns that are set aside: (lanes, columns), which are NOWHERE for padding."""
    lane = tl.arange(0, LANES)
    column = tl.load(ids + index * entries + lane, mask=lane < entries, other=-1)
    return lane, tl.where((column >= 0) & (column < columns), column, NOWHERE).to(tl.int32)


@triton.jit
def _store(pointer, numbers):
    for i in tl.static_range(len(numbers)):
        tl.store(pointer + i, numbers[i])


@triton.jit
def _stats_of(
    student, aside, columns, tau, loss, stats,
    SEPARATE: tl.constexpr, F: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The rest's, of this pass or of one before."""
    if loss is not None:
        rest = sums_of_rest(student, aside, columns, tau, SEPARATE, F, GROUPS, WIDTH)
        if stats is not None:
            _store(stats, rest)
    else:
        rest = tl.load(stats), tl.load(stats + 1), tl.load(stats + 2)
    return rest


@triton.jit
def topk_rows_kernel(
    student, ids, log_probs,
    tail_log_prob,  # None: no mass
    coefficient, labels,
    loss,  # None: stats are read
    stats,  # None: they are not kept
    gradient,  # None: it is not wanted
    metrics,  # None: they are not wanted, or there is no loss
    columns, entries,
    student_row, student_column, gradient_row, gradient_column,  # strides
    # the divergences' weights, and kd_weight, are times tau^2
    forward_kl: tl.float64, reverse_kl: tl.float64, jsd: tl.float64, skew_kl: tl.float64, skew_reverse_kl: tl.float64,
    tvd: tl.float64, beta: tl.float64, tau: tl.float64, kd_weight: tl.float64, ce_weight: tl.float64,
    CONDITIONAL: tl.constexpr,
    SEPARATE: tl.constexpr,  # whether the cross-entropy needs exponentials of its own
    LANES: tl.constexpr,  # more than there are entries
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row: loss, stats and metrics, unless they are given, and the gradient, if wanted."""
    F: tl.constexpr = tl.float64 if student.dtype.element_ty == tl.float64 else tl.float32
    READ: tl.constexpr = not CONDITIONAL or labels is not None  # whether more than K scores count
    beta, tau, zero = double(beta), double(tau), double(0.0)
    index = tl.program_id(0).to(tl.int64)
    student = (student + index * student_row, student_column)
    if gradient is not None:
        gradient = (gradient + index * gradient_row, gradient_column)
    if stats is not None:
        stats += index * 3
    weight = tl.load(coefficient + index)
    if weight == 0:  # the row is not read
        if loss is not None:
            tl.store(loss + index, zero)
            if stats is not None:
                _store(stats, (zero, zero, zero))
        if metrics is not None:
            _store(metrics + index * 6, (zero, zero, zero, zero, zero, zero))
        if gradient is not None:
            write_rest(student, gradient, columns, zero, tau, zero, zero, False, SEPARATE, F, GROUPS, WIDTH)
    else:
        lane, aside = _columns_aside(ids, index, entries, columns, LANES)
        log_p = tl.load(log_probs + index * entries + lane, mask=lane < entries, other=float("-inf")).to(tl.float64)
        aside = tl.where(log_p == float("-inf"), NOWHERE, aside)
        known, of_tail, label = aside != NOWHERE, lane == entries, None
        if labels is not None:
            label = label_beside(student, tl.load(labels + index), aside, columns)
            aside = tl.where(of_tail & ~label[2], label[0], aside)
        pointers = student[0] + aside.to(tl.int64) * student_column
        s = tl.load(pointers, mask=aside != NOWHERE, other=float("-inf")).to(tl.float64)
        rest = double(NOTHING), zero, zero
        if READ:
            rest = _stats_of(student, aside, columns, tau, loss, stats, SEPARATE, F, GROUPS, WIDTH)
        tail_log_p = None
        if tail_log_prob is not None:
            tail_log_p = tl.load(tail_log_prob + index).to(tl.float64)
        log_q, log_p, tail = log_masses(known, of_tail, s, log_p, tail_log_p, label, rest, tau, CONDITIONAL)
        weights = (forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, tvd)
        value, slopes, q, log_q, empty = divergences(lane, log_q, log_p, weights, beta)
        entropy = zero
        if label is not None:
            entropy, at_aside, at_top = cross_entropy(s, aside, label, rest)
        if metrics is not None:
            told = metrics_of(
                lane, known, s, tail[2], q, log_q, log_p, value, kd_weight, entropy, tau, empty, CONDITIONAL
            )
            _store(metrics + index * 6, told)
        if loss is not None:
            tl.store(loss + index, weight * (value + ce_weight * entropy))
        if gradient is not None:
            of_rest, slopes = shared_out(of_tail, weight / tau * slopes, tail, rest, tau, CONDITIONAL)
            of_all = zero
            if label is not None:
                of_all = weight * ce_weight * at_top
                slopes += weight * ce_weight * at_aside
            write_gradient(
                student, gradient, aside, slopes, columns, rest[0], tau, of_rest, of_all,
                READ, SEPARATE, F, GROUPS, WIDTH,
            )  # fmt: skip


# ---- a shard of a row: what fastkd/ops/drivers/topk_shards.py puts together ------------------------------------------


@triton.jit
def topk_shard_stats_kernel(
    student,
    ids,  # and the label where it is none of them
    coefficient, stats, columns, entries, student_row, student_column, tau: tl.float64,
    SEPARATE: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row: the maximum and the sums of the columns that are not set aside."""
    F: tl.constexpr = tl.float64 if student.dtype.element_ty == tl.float64 else tl.float32
    index, tau, zero = tl.program_id(0).to(tl.int64), double(tau), double(0.0)
    rest = zero, zero, zero
    if tl.load(coefficient + index) != 0:
        _, aside = _columns_aside(ids, index, entries, columns, LANES)
        row = (student + index * student_row, student_column)
        rest = sums_of_rest(row, aside, columns, tau, SEPARATE, F, GROUPS, WIDTH)
    _store(stats + index * 3, rest)


@triton.jit
def topk_shard_gradient_kernel(
    student, ids, coefficient, stats,
    factors,  # of e^((s - maximum) / tau), and of e^(s - maximum)
    at_ids,  # the gradient at the columns set aside
    gradient,  # may be the student
    columns, entries, student_row, student_column, gradient_row, gradient_column, tau: tl.float64,
    SEPARATE: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row: factors times exponentials, and what is given of the columns set aside."""
    F: tl.constexpr = tl.float64 if student.dtype.element_ty == tl.float64 else tl.float32
    index, tau, zero = tl.program_id(0).to(tl.int64), double(tau), double(0.0)
    factors += index * 2
    row, target = (student + index * student_row, student_column), (gradient + index * gradient_row, gradient_column)
    if tl.load(coefficient + index) == 0:  # the row is not read
        write_rest(row, target, columns, zero, tau, zero, zero, False, SEPARATE, F, GROUPS, WIDTH)
    else:
        lane, aside = _columns_aside(ids, index, entries, columns, LANES)
        slopes = tl.load(at_ids + index * entries + lane, mask=aside != NOWHERE, other=0.0)
        top, of_rest, of_all = tl.load(stats + index * 3), tl.load(factors), tl.load(factors + 1)
        write_gradient(row, target, aside, slopes, columns, top, tau, of_rest, of_all, True, SEPARATE, F, GROUPS, WIDTH)
