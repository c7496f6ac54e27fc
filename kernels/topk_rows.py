"""The row primitive of teachers known by their top, in Triton: what csrc/cpu/topk_rows.cpp is for CPUs.

Its contract is fastkd/ops/drivers/topk_rows.py. One program takes one row, of which K columns, and the label's, are set
aside; the others are the rest. Two passes go over the row in blocks of columns:

- the first makes the rest's maximum and sum of exponentials, every thread of its own columns: an element costs one
  exponential, a sum and a comparison, and the row one reduction. Which columns are set aside is asked only in blocks
  that have some, of a histogram of their ids: no search per element, and nothing that must be subtracted again;
- the second writes one factor times each exponential, and the corrected columns after it.

Between them the K + 1 categories, few beside the row, are computed with in fp64, where a tail of mass 1e-12 keeps its
digits: no sum of all columns is ever taken that a tail would be a small part of. A row is read twice, the second time
mostly from the second-level cache, and written once.

R rows, V columns, K ids. stats [R, 3]: the rest's maximum, and its sums at the temperature and, for labels, at 1.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    FORWARD_KL,
    JSD,
    REVERSE_KL,
    SKEW_KL,
    SKEW_REVERSE_KL,
    TVD,
    _beta_constants,
    _coslope,
    _double,
    _excess,
    _log_1p,
    _pair_of,
    _slope,
    _value,
    _with_infinity,
)

__all__ = ["topk_rows"]

# Scores of -inf, masked columns, are worked on as the first of these, and the maximum of none but such is the second:
# e^(their difference) is 0, where -inf - -inf would be NaN.
MASKED = tl.constexpr(-1e30)
NOTHING = tl.constexpr(-1e29)
# The logarithm of no mass: differences stay finite, and a divergence beyond what it allows is infinite.
NO_MASS = tl.constexpr(-1e100)
# The column of what is none.
NOWHERE = tl.constexpr(2**31 - 1)


# ---- the rest of a row -----------------------------------------------------------------------------------------------


@triton.jit
def _exp_of(x, tau, EXACT: tl.constexpr, F: tl.constexpr):
    """e^(x / tau); EXACT, for a finite x, puts back what rounding takes from log2(e) / tau, which would bias a sum."""
    if tl.float64 == F:
        power = tl.exp(x / tau)
    else:
        scale = 1.4426950408889634 / tau
        rounded = scale.to(F)
        power = tl.exp2(x * rounded)
        if EXACT:
            power += power * (x * ((scale - rounded.to(tl.float64)) * 0.6931471805599453).to(F))
    return power


@triton.jit
def _add(high, low, x):
    """A sum carried as two numbers, with x added: what rounding takes from the first is in the second."""
    total = high + x
    back = total - high
    return total, low + ((high - (total - back)) + (x - back))


@triton.jit
def _next_aside(ids, label, start):
    """The first column, from `start` on, that is set aside."""
    return tl.minimum(tl.min(tl.where(ids >= start, ids, NOWHERE), 0), tl.where(label >= start, label, NOWHERE))


@triton.jit
def _columns(start, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    return start + tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _read(row, column, columns, MASK: tl.constexpr, F: tl.constexpr):
    """A block's scores. Without MASK all its columns exist, and a thread reads a group at once."""
    pointers = row[0] + column.to(tl.int64) * row[1]
    s = tl.load(pointers, mask=column < columns, other=MASKED) if MASK else tl.load(pointers)
    return s.to(F)


@triton.jit
def _grown(top, high, low, moved, s, tau, F: tl.constexpr):
    """Sums of e^((s - top) / tau), of which those so far were relative to what `top` has `moved` from."""
    factor = _exp_of(moved, tau, True, F)
    return _add(high * factor, low * factor, tl.sum(_exp_of(s - top[:, None], tau, True, F), 1))


@triton.jit
def _set_aside(ids, label, start, column, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Which columns of a block are an id's or the label's."""
    here = (ids >= start) & (ids < start + GROUPS * WIDTH)
    count = tl.histogram(tl.where(here, ids - start, 0), GROUPS * WIDTH, mask=here)
    return (tl.reshape(count, (GROUPS, WIDTH)) > 0) | (column == label)


@triton.jit
def _rest_of_block(
    student, ids, label, aside, start, columns, tau, top, high, low, high_1, low_1,
    SEPARATE: tl.constexpr, MASK: tl.constexpr, F: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Maxima and sums [GROUPS] with a block more, and the first column set aside after it."""
    BLOCK: tl.constexpr = GROUPS * WIDTH
    column = _columns(start, GROUPS, WIDTH)
    s = _read(student, column, columns, MASK, F)
    s = tl.maximum(s, MASKED, propagate_nan=tl.PropagateNan.ALL)
    if aside < start + BLOCK:
        s = tl.where(_set_aside(ids, label, start, column, GROUPS, WIDTH), MASKED, s)
        aside = _next_aside(ids, label, start + BLOCK)
    before, top = top, tl.maximum(top, tl.max(s, 1))
    high, low = _grown(top, high, low, before - top, s, tau, F)
    if SEPARATE:
        high_1, low_1 = _grown(top, high_1, low_1, before - top, s, _double(1.0), F)
    return aside, top, high, low, high_1, low_1


@triton.jit
def _rest(
    student, ids, label, columns, tau,
    SEPARATE: tl.constexpr, F: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Pass 1: (maximum, sum of e^((s - maximum) / tau), sum of e^(s - maximum)) over the rest, in fp64."""
    top = tl.full((GROUPS,), NOTHING, F)
    high, low = tl.zeros((GROUPS,), F), tl.zeros((GROUPS,), F)
    high_1, low_1 = high, low
    aside = _next_aside(ids, label, 0)
    whole = columns - columns % (GROUPS * WIDTH)
    for start in range(0, whole, GROUPS * WIDTH):
        aside, top, high, low, high_1, low_1 = _rest_of_block(
            student, ids, label, aside, start, columns, tau, top, high, low, high_1, low_1,
            SEPARATE, False, F, GROUPS, WIDTH,
        )  # fmt: skip
    if whole < columns:
        aside, top, high, low, high_1, low_1 = _rest_of_block(
            student, ids, label, aside, whole, columns, tau, top, high, low, high_1, low_1,
            SEPARATE, True, F, GROUPS, WIDTH,
        )  # fmt: skip
    highest = tl.max(top, 0).to(tl.float64)
    lower = top.to(tl.float64) - highest
    total = tl.sum((high.to(tl.float64) + low.to(tl.float64)) * tl.exp(lower / tau), 0)
    total_1 = total
    if SEPARATE:
        total_1 = tl.sum((high_1.to(tl.float64) + low_1.to(tl.float64)) * tl.exp(lower), 0)
    return highest, total, total_1


# ---- the categories --------------------------------------------------------------------------------------------------
# Lane k is the k-th id's, lane K the tail's; lanes of no category have no mass in either model.


@triton.jit
def _excluding(lane, index, x):
    """The sum of x over the lanes but one."""
    return tl.sum(tl.where(lane == index, 0.0, x), 0)


@triton.jit
def _divergences(lane, log_weights, log_p, weights, beta):
    """(weighted D, q (u - mean), q, log q) from logarithms: the student's unnormalised masses, the teacher's masses.

    The largest of the student's masses is 1 less the others, and its gradient minus the sum of the others': what a
    confident student differs by from a certain one is in these alone.
    """
    largest = tl.argmax(log_weights, 0)
    relative = log_weights - tl.max(log_weights, 0)
    log_q = relative - _log_1p(_excluding(lane, largest, tl.exp(relative)))
    pair = _pair_of(tl.exp(tl.maximum(log_p, log_q)), log_p - log_q)
    p, q, difference, log_ratio, _, _, _ = pair
    gap = tl.sum(difference, 0)  # 0, unless the teacher's masses do not sum to 1
    value, slopes = _double(0.0), tl.zeros_like(q)
    if weights[FORWARD_KL] != 0:
        value += weights[FORWARD_KL] * (tl.sum(_excess(p, q, log_ratio), 0) - gap)
        slopes += weights[FORWARD_KL] * (difference - q * gap)
    if weights[REVERSE_KL] != 0:
        reverse = _with_infinity(tl.sum(_excess(q, p, -log_ratio), 0) + gap)
        value += weights[REVERSE_KL] * reverse
        slopes -= weights[REVERSE_KL] * q * (log_ratio + reverse)
    b = _beta_constants(beta, None, tl.float64)
    for code in tl.static_range(JSD, TVD + 1):
        if weights[code] != 0:
            value += weights[code] * tl.sum(_value(pair, b, code), 0)
            if code == SKEW_KL:
                value -= weights[code] * (1 - beta) * gap
            elif code == SKEW_REVERSE_KL:
                value += weights[code] * (1 - beta) * gap
            slope, coslope = _slope(pair, b, code), _coslope(pair, b, code)
            mean, comean = tl.sum(slope, 0), tl.sum(coslope, 0)
            slopes += weights[code] * tl.where(comean < mean, q * comean - coslope, slope - q * mean)
    slopes = tl.where(lane == largest, -_excluding(lane, largest, slopes), slopes)
    return _with_infinity(value), slopes, q, log_q


# ---- one row ---------------------------------------------------------------------------------------------------------
# A label is (its column, NOWHERE if out of range; its score, then NaN; whether it is an id's). Logarithms of masses are
# relative to one score of the row, and NO_MASS for none.


@triton.jit
def _log_mass(score, reference, tau):
    return tl.where(score < NOTHING, NO_MASS, (score - reference) / tau)  # NaN passes


@triton.jit
def _log_sum(x, y):
    """log(e^x + e^y)"""
    return tl.maximum(x, y) + _log_1p(tl.exp(-tl.abs(x - y)))


@triton.jit
def _tail(label, top, total, reference, tau):
    """Logarithms of the tail's mass, and of the label's in it."""
    rest = tl.where(total == 0, NO_MASS, (top - reference) / tau + tl.log(tl.where(total == 0, 1.0, total)))
    tail, own = rest, _double(NO_MASS)
    if label is not None:
        _, score, known = label
        own = tl.where(known, NO_MASS, _log_mass(score, reference, tau))
        tail = _log_sum(rest, own)
    return tail, own


@triton.jit
def _entropy(p, log_p):
    """-sum p log p over the lanes, in nats."""
    return tl.sum(tl.where(p == 0, 0.0, -p * log_p), 0)  # NaN passes


@triton.jit
def _cross_entropy(s, column, label, top, total_1):
    """(loss, gradient at the label's column, at the ids' others, and at the rest's maximum)"""
    label_column, score, _ = label
    s = tl.where(column == label_column, float("-inf"), s)
    top = tl.where(total_1 == 0, float("-inf"), top)
    highest = tl.maximum(tl.maximum(tl.max(s, 0), top), score)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    of_ids, of_rest, of_label = tl.exp(s - highest), tl.exp(top - highest), tl.exp(score - highest)
    others = tl.sum(of_ids, 0) + total_1 * of_rest  # beside them a confident student's label would hide the others
    whole = others + of_label
    loss = tl.where(score == highest, _log_1p(others), highest - score + tl.log(whole))
    share = 1 / tl.where(whole == 0, 1.0, whole)
    return loss, -others * share, of_ids * share, of_rest * share


@triton.jit
def _write_block(
    student, gradient, ids, label, aside, start, columns, top, tau, of_tail, of_all,
    READ: tl.constexpr, SEPARATE: tl.constexpr, MASK: tl.constexpr, F: tl.constexpr,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes a block, and returns the first column set aside after it."""
    BLOCK: tl.constexpr = GROUPS * WIDTH
    pointer, stride = gradient
    column = _columns(start, GROUPS, WIDTH)
    if READ:
        s = _read(student, column, columns, MASK, F) - top
        if SEPARATE:
            g = of_tail * _exp_of(s, tau, False, F) + of_all * _exp_of(s, _double(1.0), False, F)
        else:
            g = (of_tail + of_all) * _exp_of(s, tau, False, F)
    else:
        g = tl.zeros((GROUPS, WIDTH), F)
    pointers, g = pointer + column.to(tl.int64) * stride, g.to(pointer.dtype.element_ty)
    if aside < start + BLOCK:
        tl.store(pointers, g, mask=(column < columns) & ~_set_aside(ids, label, start, column, GROUPS, WIDTH))
        aside = _next_aside(ids, label, start + BLOCK)
    elif MASK:
        tl.store(pointers, g, mask=column < columns)
    else:
        tl.store(pointers, g)
    return aside


@triton.jit
def _write_rest(
    student, gradient, ids, label, columns, top, tau, of_tail, of_all,
    READ: tl.constexpr, SEPARATE: tl.constexpr, F: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Pass 2: of_tail e^((s - top) / tau) + of_all e^(s - top), the gradient of the rest's columns; without READ 0."""
    top, of_tail, of_all = top.to(F), of_tail.to(F), of_all.to(F)
    aside = _next_aside(ids, label, 0)
    whole = columns - columns % (GROUPS * WIDTH)
    for start in range(0, whole, GROUPS * WIDTH):
        aside = _write_block(
            student, gradient, ids, label, aside, start, columns, top, tau, of_tail, of_all,
            READ, SEPARATE, False, F, GROUPS, WIDTH,
        )  # fmt: skip
    if whole < columns:
        _write_block(
            student, gradient, ids, label, aside, whole, columns, top, tau, of_tail, of_all,
            READ, SEPARATE, True, F, GROUPS, WIDTH,
        )  # fmt: skip


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
            _write_rest(
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
                top, total, total_1 = _rest(student, column, aside, columns, tau, SEPARATE, F, GROUPS, WIDTH)
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
        log_weights = _log_mass(s, reference, tau)
        log_p = tl.where(known, log_p, NO_MASS)
        if not CONDITIONAL:
            tail, own = _tail(label, top, total, reference, tau)
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
        value, slopes, q, log_q = _divergences(lane, log_weights, log_p, weights, beta)
        empty = (tl.max(log_weights, 0) < 0.5 * NO_MASS) | (tl.max(log_p, 0) < 0.5 * NO_MASS)
        value, slopes = tl.where(empty, 0.0, value), tl.where(empty, 0.0, weight / tau * slopes)
        if metrics is not None:
            tl.store(
                metrics, tl.where(kd_weight == 0, 0.0, tau * tau / tl.where(kd_weight == 0, 1.0, kd_weight) * value)
            )
            tl.store(metrics + 1, zero)
            told = ~empty & (kd_weight != 0)
            tl.store(metrics + 2, tl.where(told, _entropy(q, log_q), 0.0))
            tl.store(metrics + 3, tl.where(told, _entropy(tl.exp(log_p), log_p), 0.0))
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
            entropy, at_label, at_ids, at_top = _cross_entropy(s, column, label, top, total_1)
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
            _write_rest(
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
        top, total, total_1 = _rest(row, column, nowhere, columns, tau, SEPARATE, F, GROUPS, WIDTH)
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
        _write_rest(row, target, none, NOWHERE, columns, zero, tau, zero, zero, False, SEPARATE, F, GROUPS, WIDTH)
    else:
        column, known, lane = _ids_aside(aside, index, entries, columns, LANES)
        top, of_tail, of_all = (
            tl.load(stats + index * 3),
            tl.load(factors + index * 2),
            tl.load(factors + index * 2 + 1),
        )
        nowhere = _double(NOWHERE).to(tl.int32)
        _write_rest(row, target, column, nowhere, columns, top, tau, of_tail, of_all, True, SEPARATE, F, GROUPS, WIDTH)
        values = tl.load(at_ids + index * entries + lane, mask=known, other=0.0)
        element: tl.constexpr = gradient.dtype.element_ty
        tl.store(target[0] + column.to(tl.int64) * gradient_column, values.to(F).to(element), mask=known)


# ---- launch ----------------------------------------------------------------------------------------------------------

# Columns a block; tests have smaller ones.
LARGEST_BLOCK = 2048


def sizes_and_options(columns: int, entries: int, dtype: torch.dtype, nvidia: bool) -> tuple[dict[str, int], dict]:
    """Lanes and the shape of a block, of groups of 16 bytes, and launch options.

    A thread has 16 columns of a block, which are in flight at once, and at most two lanes. As in rows.py, ptxas is told
    a ceiling, with which four blocks of 4 warps run side by side.
    """
    width, lanes = 16 // dtype.itemsize, triton.next_power_of_2(entries + 1)
    block = min(LARGEST_BLOCK, max(32 * width, triton.next_power_of_2(columns)))
    options = {
        "num_warps": max(1, block // 512, lanes // 64),
        "enable_fp_fusion": True,  # Triton's default differs by version
    }
    if nvidia:
        options["maxnreg"] = 255 if dtype == torch.float64 or lanes > 256 else 128
    return {"LANES": lanes, "GROUPS": block // width, "WIDTH": width}, options


def _check(name: str, x: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    wanted = dtypes or (x.dtype,)
    if x.shape != shape or x.dtype not in wanted or not (dtypes or x.is_floating_point()):
        what = " or ".join(map(str, dtypes)) or "floating"
        raise ValueError(f"{name}: expected {what} {list(shape)}, got {x.dtype} {list(x.shape)}")
    if dtypes and not x.is_contiguous():
        raise ValueError(f"{name}: expected contiguous, got strides {x.stride()}")


def topk_rows(
    student: Tensor,  # [R, V]
    ids: Tensor,  # [R, K]
    log_probs: Tensor,  # [R, K]
    tail_log_prob: Tensor | None,  # [R]
    coefficient: Tensor,  # [R]
    labels: Tensor | None,  # [R]
    loss: Tensor | None,  # [R]
    stats: Tensor | None,  # [R, 3], given where there is no loss
    gradient: Tensor | None,  # [R, V], of any float dtype and stride; it may be the student
    divergences: Sequence[float],  # [6]
    conditional: bool,
    beta: float,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    metrics: Tensor | None = None,  # [R, 6]
) -> None:
    """Writes each row's loss, statistics and metrics, and coefficient * d loss / d student: of these what is given."""
    (rows, columns), entries, wide = student.shape, ids.shape[-1], (torch.float64,)
    labels = labels if ce_weight != 0 else None
    tail_log_prob = None if conditional else tail_log_prob
    if len(divergences) != 6:
        raise ValueError(f"divergences: expected 6 weights, got {len(divergences)}")
    if loss is None and stats is None:
        raise ValueError("stats: needed unless there is a loss")
    if loss is None and metrics is not None:
        raise ValueError("metrics of rows go with a loss")
    for name, x, shape, dtypes in (
        ("student", student, (rows, columns), ()),
        ("ids", ids, (rows, entries), (torch.int64,)),
        ("log_probs", log_probs, (rows, entries), wide),
        ("tail_log_prob", tail_log_prob, (rows,), wide),
        ("coefficient", coefficient, (rows,), wide),
        ("labels", labels, (rows,), (torch.int64,)),
        ("loss", loss, (rows,), wide),
        ("stats", stats, (rows, 3), wide),
        ("gradient", gradient, (rows, columns), ()),
        ("metrics", metrics, (rows, 6), wide),
    ):
        if x is not None:
            _check(name, x, shape, *dtypes)
    if rows == 0:
        return
    scale = kd_weight * temperature**2
    nvidia = student.is_cuda and torch.version.hip is None
    sizes, options = sizes_and_options(columns, entries, student.dtype, nvidia)
    with torch.cuda.device_of(student):
        topk_rows_kernel[(rows,)](
            student,
            ids,
            log_probs,
            tail_log_prob,
            coefficient,
            labels,
            loss,
            stats,
            gradient,
            metrics,
            columns,
            entries,
            *student.stride(),
            *(gradient.stride() if gradient is not None else (0, 0)),
            *(scale * float(weight) for weight in divergences),
            float(beta),
            float(temperature),
            float(scale),
            float(ce_weight),
            CONDITIONAL=conditional,
            SEPARATE=labels is not None and temperature != 1,
            **sizes,
            **options,
        )


def topk_shard_stats(
    student: Tensor,  # [R, V]
    aside: Tensor,  # [R, K + 1]
    coefficient: Tensor,  # [R]
    stats: Tensor,  # [R, 3]
    temperature: float,
) -> None:
    """Writes the maximum and the sums of the columns that are not set aside."""
    (rows, columns), entries = student.shape, aside.shape[-1]
    sizes, options = _shard_options(
        student, aside, (("coefficient", coefficient, (rows,)), ("stats", stats, (rows, 3)))
    )
    with torch.cuda.device_of(student):
        topk_shard_stats_kernel[(rows,)](
            student, aside, coefficient, stats, columns, entries, *student.stride(), float(temperature),
            SEPARATE=temperature != 1, **sizes, **options,
        )  # fmt: skip


def topk_shard_gradient(
    student: Tensor,  # [R, V]
    aside: Tensor,  # [R, K + 1]
    coefficient: Tensor,  # [R]
    stats: Tensor,  # [R, 3]
    factors: Tensor,  # [R, 2]
    at_ids: Tensor,  # [R, K + 1]
    gradient: Tensor,  # [R, V], of any float dtype and stride; it may be the student
    temperature: float,
) -> None:
    """Writes factors times exponentials, and what is given of the columns set aside."""
    (rows, columns), entries = student.shape, aside.shape[-1]
    _check("gradient", gradient, (rows, columns))
    wide = (("coefficient", coefficient, (rows,)), ("stats", stats, (rows, 3)), ("factors", factors, (rows, 2)))
    sizes, options = _shard_options(student, aside, (*wide, ("at_ids", at_ids, (rows, entries))))
    with torch.cuda.device_of(student):
        topk_shard_gradient_kernel[(rows,)](
            student, aside, coefficient, stats, factors, at_ids, gradient, columns, entries, *student.stride(),
            *gradient.stride(), float(temperature), SEPARATE=temperature != 1, **sizes, **options,
        )  # fmt: skip


def _shard_options(student: Tensor, aside: Tensor, wide: Sequence[tuple[str, Tensor, tuple]]) -> tuple[dict, dict]:
    _check("aside", aside, (student.shape[0], aside.shape[-1]), torch.int64)
    for name, x, shape in wide:
        _check(name, x, shape, torch.float64)
    nvidia = student.is_cuda and torch.version.hip is None
    return sizes_and_options(student.shape[1], aside.shape[-1], student.dtype, nvidia)
