"""The kernels: one program takes one row, or a shard of one."""

import triton
import triton.language as tl

from ..common import _double
from .categories import cross_entropy, divergences, lane_entropy, log_mass, tail_of
from .rest import NO_MASS, NOTHING, NOWHERE, sums_of_rest, write_rest


@triton.jit
def topk_rows_kernel(
    student,
    ids,
    log_probs,
    tail_log_prob,  # None: no mass
    coefficient,
    labels,
    loss,  # None: stats are read
    stats,  # None: they are not kept
    gradient,  # None: it is not wanted
    metrics,  # None: they are not wanted
    columns,
    entries,
    student_row,  # strides
    student_column,
    gradient_row,
    gradient_column,
    forward_kl: tl.float64,  # weights of the divergences
    reverse_kl: tl.float64,
    jsd: tl.float64,
    skew_kl: tl.float64,
    skew_reverse_kl: tl.float64,
    tvd: tl.float64,
    beta: tl.float64,
    tau: tl.float64,
    kd_weight: tl.float64,  # times tau^2, as the weights of the divergences are
    ce_weight: tl.float64,
    CONDITIONAL: tl.constexpr,
    SEPARATE: tl.constexpr,  # whether the cross-entropy needs exponentials of its own
    LANES: tl.constexpr,  # more than there are entries
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row: loss and stats, unless they are given, and if wanted the gradient and metrics."""
    F: tl.constexpr = tl.float64 if student.dtype.element_ty == tl.float64 else tl.float32
    READ: tl.constexpr = not CONDITIONAL or labels is not None  # whether more than K scores count
    beta, tau, zero = _double(beta), _double(tau), _double(0.0)
    index = tl.program_id(0).to(tl.int64)
    student = (student + index * student_row, student_column)
    if gradient is not None:
        gradient = (gradient + index * gradient_row, gradient_column)
    if stats is not None:
        stats += index * 3
    if metrics is not None:
        metrics += index * 6
    weight = tl.load(coefficient + index)
    if weight == 0:  # the row is not read
        if loss is not None:
            tl.store(loss + index, zero)
            if stats is not None:
                for i in tl.static_range(3):
                    tl.store(stats + i, zero)
        if metrics is not None:
            for i in tl.static_range(6):
                tl.store(metrics + i, zero)
        if gradient is not None:
            none = tl.full((LANES,), NOWHERE, tl.int32)
            write_rest(
                student, gradient, none, NOWHERE, columns, zero, tau, zero, zero, False, SEPARATE, F, GROUPS, WIDTH
            )
    else:
        lane = tl.arange(0, LANES)
        column = tl.load(ids + index * entries + lane, mask=lane < entries, other=-1)
        log_p = tl.load(log_probs + index * entries + lane, mask=lane < entries, other=float("-inf")).to(tl.float64)
        known = (column >= 0) & (column < columns) & (log_p != float("-inf"))
        column = tl.where(known, column, NOWHERE).to(tl.int32)
        s = tl.load(student[0] + column.to(tl.int64) * student_column, mask=known, other=float("-inf")).to(tl.float64)
        label = None
        aside = _double(NOWHERE).to(tl.int32)
        if labels is not None:
            at = tl.load(labels + index)
            exists = (at >= 0) & (at < columns)
            aside = tl.where(exists, at, NOWHERE).to(tl.int32)
            score = tl.load(student[0] + tl.where(exists, at, 0) * student_column).to(tl.float64)
            label = (aside, tl.where(exists, score, float("nan")), tl.sum((column == aside).to(tl.int32), 0) > 0)

        top, total, total_1 = _double(NOTHING), zero, zero
        if READ:
            if loss is not None:
                top, total, total_1 = sums_of_rest(student, column, aside, columns, tau, SEPARATE, F, GROUPS, WIDTH)
                if stats is not None:
                    tl.store(stats, top)
                    tl.store(stats + 1, total)
                    tl.store(stats + 2, total_1)
            else:
                top, total, total_1 = tl.load(stats), tl.load(stats + 1), tl.load(stats + 2)

        reference = tl.max(s, 0)
        if not CONDITIONAL:
            reference = tl.maximum(reference, top)
            if label is not None:
                reference = tl.maximum(reference, label[1])
        reference = tl.maximum(reference, NOTHING)  # of nothing but -inf
        log_weights = log_mass(s, reference, tau)
        log_p = tl.where(known, log_p, NO_MASS)
        if not CONDITIONAL:
            tail, own = tail_of(label, top, total, reference, tau)
            tail_log_p = _double(NO_MASS)
            if tail_log_prob is not None:
                mass = tl.load(tail_log_prob + index).to(tl.float64)
                tail_log_p = tl.where(mass == float("-inf"), NO_MASS, mass)
                if tail < 0.5 * NO_MASS:  # the student has none
                    tail_log_p = _double(NO_MASS)
                    log_p = tl.where(known, log_p - tl.log(tl.sum(tl.exp(log_p), 0)), NO_MASS)
            log_weights = tl.where(lane == entries, tail, log_weights)
            log_p = tl.where(lane == entries, tail_log_p, log_p)
        weights = (forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, tvd)
        value, slopes, q, log_q = divergences(lane, log_weights, log_p, weights, beta)
        empty = (tl.max(log_weights, 0) < 0.5 * NO_MASS) | (tl.max(log_p, 0) < 0.5 * NO_MASS)
        value, slopes = tl.where(empty, 0.0, value), tl.where(empty, 0.0, weight / tau * slopes)
        if metrics is not None:
            tl.store(
                metrics, tl.where(kd_weight == 0, 0.0, tau * tau / tl.where(kd_weight == 0, 1.0, kd_weight) * value)
            )
            tl.store(metrics + 1, zero)
            told = ~empty & (kd_weight != 0)
            tl.store(metrics + 2, tl.where(told, lane_entropy(q, log_q), 0.0))
            tl.store(metrics + 3, tl.where(told, lane_entropy(tl.exp(log_p), log_p), 0.0))
            rival = tl.max(s, 0)
            mass = zero
            if not CONDITIONAL:
                mass = tl.sum(tl.where(known, q, 0.0), 0)
                rival = tl.maximum(rival, tl.where(total == 0, float("-inf"), top))
                if label is not None:
                    rival = tl.maximum(rival, label[1])
            at_first = tl.sum(tl.where(lane == tl.argmax(tl.where(known, log_p, float("-inf")), 0), s, 0.0), 0)
            tl.store(metrics + 4, tl.where(told & (at_first >= rival), 1.0, 0.0))
            tl.store(metrics + 5, tl.where(told, mass, 0.0))
        if label is not None:
            entropy, at_label, at_ids, at_top = cross_entropy(s, column, label, top, total_1)
            value += ce_weight * entropy
            if metrics is not None:
                tl.store(metrics + 1, entropy)
        if loss is not None:
            tl.store(loss + index, weight * value)

        if gradient is not None:
            of_tail, of_all = zero, zero
            at_tail = tl.sum(tl.where(lane == entries, slopes, 0.0), 0)
            if not CONDITIONAL:
                of_tail = tl.where(total == 0, 0.0, at_tail * tl.exp((top - reference) / tau - tail))
            if label is not None:
                of_all = weight * ce_weight * at_top
                slopes += weight * ce_weight * tl.where(column == aside, at_label, at_ids)
            tl.debug_barrier()  # every thread has read the scores before one overwrites them with their gradients
            write_rest(
                student, gradient, column, aside, columns, top, tau, of_tail, of_all, READ, SEPARATE, F, GROUPS, WIDTH
            )
            element: tl.constexpr = gradient[0].dtype.element_ty
            tl.store(gradient[0] + column.to(tl.int64) * gradient_column, slopes.to(F).to(element), mask=known)
            if label is not None:
                own_slope = weight * ce_weight * at_label
                if not CONDITIONAL:
                    own_slope += at_tail * tl.exp(own - tail)
                if not label[2]:
                    tl.store(gradient[0] + tl.where(exists, at, 0) * gradient_column, own_slope.to(F).to(element))


# ---- a shard of a row: what fastkd/ops/drivers/topk_shards.py puts together ------------------------------------------


@triton.jit
def _ids_aside(aside, index, entries, columns, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    column = tl.load(aside + index * entries + lane, mask=lane < entries, other=-1)
    known = (column >= 0) & (column < columns)
    return tl.where(known, column, NOWHERE).to(tl.int32), known, lane


@triton.jit
def topk_shard_stats_kernel(
    student,
    aside,  # the ids, and the label where it is none of them
    coefficient,
    stats,
    columns,
    entries,
    student_row,
    student_column,
    tau: tl.float64,
    SEPARATE: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row: the maximum and the sums of the columns that are not set aside."""
    F: tl.constexpr = tl.float64 if student.dtype.element_ty == tl.float64 else tl.float32
    index, tau, zero = tl.program_id(0).to(tl.int64), _double(tau), _double(0.0)
    stats += index * 3
    top, total, total_1 = zero, zero, zero
    if tl.load(coefficient + index) != 0:
        column, _, _ = _ids_aside(aside, index, entries, columns, LANES)
        row, nowhere = (student + index * student_row, student_column), _double(NOWHERE).to(tl.int32)
        top, total, total_1 = sums_of_rest(row, column, nowhere, columns, tau, SEPARATE, F, GROUPS, WIDTH)
    tl.store(stats, top)
    tl.store(stats + 1, total)
    tl.store(stats + 2, total_1)


@triton.jit
def topk_shard_gradient_kernel(
    student,
    aside,
    coefficient,
    stats,
    factors,  # of e^((s - maximum) / tau), and of e^(s - maximum)
    at_ids,  # the gradient at the columns set aside
    gradient,  # may be the student
    columns,
    entries,
    student_row,
    student_column,
    gradient_row,
    gradient_column,
    tau: tl.float64,
    SEPARATE: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    F: tl.constexpr = tl.float64 if student.dtype.element_ty == tl.float64 else tl.float32
    index, tau, zero = tl.program_id(0).to(tl.int64), _double(tau), _double(0.0)
    row, target = (student + index * student_row, student_column), (gradient + index * gradient_row, gradient_column)
    if tl.load(coefficient + index) == 0:  # the row is not read
        none = tl.full((LANES,), NOWHERE, tl.int32)
        write_rest(row, target, none, NOWHERE, columns, zero, tau, zero, zero, False, SEPARATE, F, GROUPS, WIDTH)
    else:
        column, known, lane = _ids_aside(aside, index, entries, columns, LANES)
        top, of_tail, of_all = (
            tl.load(stats + index * 3),
            tl.load(factors + index * 2),
            tl.load(factors + index * 2 + 1),
        )
        nowhere = _double(NOWHERE).to(tl.int32)
        write_rest(row, target, column, nowhere, columns, top, tau, of_tail, of_all, True, SEPARATE, F, GROUPS, WIDTH)
        values = tl.load(at_ids + index * entries + lane, mask=known, other=0.0)
        element: tl.constexpr = gradient.dtype.element_ty
        tl.store(target[0] + column.to(tl.int64) * gradient_column, values.to(F).to(element), mask=known)
