"""The row primitive in Triton, for GPUs: what csrc/cpu/divergence_rows.cpp is for CPUs, with the same arguments.

One program takes one row, in blocks of columns: once for the running maxima and sums of exponentials (online softmax of
both models at once), once more for the divergences that need normalised probabilities, and once for the gradient. The
fused kernel makes all passes one after the other, so that the later ones find the row in the second-level cache.

The mathematics is that of csrc/divergence.h, whose comments derive it; functions have its names and order. It differs
in one respect: every row is computed with care, since a choice by row would cost a GPU both variants' registers. Three
things make the sums of the first pass good enough for rows of any kind (see `_statistics`):

- each block adds its sums up in the working precision, and the row adds up the blocks in fp64;
- in a block whose models nearly agree, the student's sum is the teacher's plus the summed difference, which has more
  digits than the difference of two sums;
- there, too, a divergence's moment is summed up as p log(p / q) + q - p, which is small of second order like the
  divergence itself. The q - p in it cancels when the row is complete, and its rounding error with it.

Rows may be shards of longer ones, whose other columns are on other GPUs: `shard_kernel` makes the statistics of a shard
alone, fastkd/ops/vocabulary_shards.py those of the whole row from all of them, and `rows_kernel` the gradient.

R rows, V columns. coefficient [R] float64, labels [R] int64, loss [R] float64, stats [R, 7] float64, metrics [R, 6]
float64 (fastkd/ops/drivers/divergence_rows.py says of what). Number of columns and strides are run-time arguments; the
block size follows the vocabulary and the dtype. Nothing waits for the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    FORWARD_KL,
    JSD,
    MIX,
    REVERSE_KL,
    TVD,
    _beta_constants,
    _coslope,
    _double,
    _excess,
    _pair_of,
    _slope,
    _unmasked,
    _value,
    _weight,
    _with_infinity,
    beta_arguments,
)
from .common import _exp_nonpositive as _exp_nonpositive
from .common import _log_1p as _log_1p

__all__ = [
    "divergence_rows",
    "divergence_shard_stats",
    "divergence_shard_sums",
]

LOWEST = tl.constexpr(float("-inf"))
# Models nearly agree in a block where the sums of their exponentials differ by less than this share of the teacher's.
NEARLY_EQUAL = tl.constexpr(0.5)
# Divergence over which the mean of log(q / p) is refined: one so large is summed up with its own last digit's error.
FAR_APART = tl.constexpr(16.0)
# The label of a row that is a shard of a longer one, in another shard of which the label lies.
ELSEWHERE = tl.constexpr(-(2**63))


@triton.jit
def _split(x, F: tl.constexpr):
    """An fp64 number carried as two of the working type, so that s - t + shift is exact where it matters."""
    high = x.to(F)
    return high, (x - high.to(tl.float64)).to(F)


# ---- one row ---------------------------------------------------------------------------------------------------------
# The statistics of a row are (max_s, sum_s, max_t, sum_t, mean, saturated, sum_1), all fp64; RowStats in divergence.h
# explains them. `saturated` is its `careful`, and the maximum of a row of nothing but -inf is 0 here.


@triton.jit
def _mean_unit(weights, DIVERGENCE: tl.constexpr):
    """What log(q / p) is multiplied with in u, where the mean of u is subtracted inside it."""
    unit = _double(1.0)
    if DIVERGENCE >= MIX and DIVERGENCE // 2 % 2 == 1:
        unit = _weight(weights, REVERSE_KL)
    return unit


@triton.jit
def _row_constants(stats, tau, unit, F: tl.constexpr):
    """The same in the working precision, ready for the inner loop."""
    max_s, sum_s, max_t, sum_t, mean, _, _ = stats
    # log(Z_t) - log(Z_s) in units of score: t - s less this is tau log(p / q)
    shift = (max_t - max_s) - tau * tl.log(sum_s / sum_t)
    shift_high, shift_low = _split(shift, F)
    centred_high, centred_low = _split(shift - tau * mean / unit, F)  # for u = -log(p / q) less its mean
    return (
        max_s.to(F),
        (1 / sum_s).to(F),
        max_t.to(F),
        (1 / sum_t).to(F),
        (1 / tau).to(F),
        shift_high,
        shift_low,
        centred_high,
        centred_low,
        mean.to(F),
    )


@triton.jit
def _running_constants(max_s, max_t, inv_tau, F: tl.constexpr):
    """The same while the sums are not known yet: with sums of 1, probabilities are the plain exponentials."""
    one = tl.full((), 1, F)
    high, low = _split(max_t - max_s, F)
    return max_s.to(F), one, max_t.to(F), one, inv_tau.to(F), high, low, high, low, one


# ---- one column ------------------------------------------------------------------------------------------------------


@triton.jit
def _shifted_ratio(s, t, shift_high, shift_low, inv_tau):
    """(t - s - shift) / tau, with what rounding takes from t - s (Knuth's two-sum) put back."""
    d = t - s
    back = d - t
    lost = (t - (d - back)) - (s + back)
    return ((d - shift_high) + (lost - shift_low)) * inv_tau


@triton.jit
def _pair(s, t, row):
    """What `_pair_of` says of a column's scores."""
    max_s, inv_sum_s, max_t, inv_sum_t, inv_tau, shift_high, shift_low, _, _, _ = row
    log_ratio = _shifted_ratio(s, t, shift_high, shift_low, inv_tau)
    teacher_larger = log_ratio >= 0
    top = tl.where(teacher_larger, t - max_t, s - max_s)
    return _pair_of(tl.exp(top * inv_tau) * tl.where(teacher_larger, inv_sum_t, inv_sum_s), log_ratio)


@triton.jit
def _gradient_of(s, t, b, row, DIVERGENCE: tl.constexpr, SATURATED: tl.constexpr):
    """q (u - mean): tau times the gradient of D in s."""
    max_s, inv_sum_s, _, _, inv_tau, _, _, centred_high, centred_low, mean = row
    if DIVERGENCE == REVERSE_KL:
        q = tl.exp((s - max_s) * inv_tau) * inv_sum_s
        gradient = -q * _shifted_ratio(s, t, centred_high, centred_low, inv_tau)
    else:
        pair = _pair(s, t, row)
        if DIVERGENCE == FORWARD_KL:
            gradient = pair[2]
        elif DIVERGENCE >= MIX:
            BOUNDED: tl.constexpr = DIVERGENCE // 4 * 4
            gradient = -_coslope(pair, b, BOUNDED) if SATURATED else _slope(pair, b, BOUNDED)
            if DIVERGENCE % 2 == 1:
                gradient += b[4][0] * pair[2]
            if DIVERGENCE // 2 % 2 == 1:
                gradient -= b[4][1] * pair[1] * _shifted_ratio(s, t, centred_high, centred_low, inv_tau)
            else:
                gradient -= pair[1] * mean
        elif SATURATED:
            gradient = -_coslope(pair, b, DIVERGENCE) - pair[1] * mean
        else:
            gradient = _slope(pair, b, DIVERGENCE) - pair[1] * mean
    return gradient


# ---- one row in passes -----------------------------------------------------------------------------------------------
# A row of a matrix is (pointer, column stride). The teacher's may be None, and so may the label: (column, whether there
# is such a column, the student's score in it).


@triton.jit
def _label(student, label, columns):
    """A row's label; of one that is elsewhere column -1, in which no share of the sums and of the gradient is."""
    pointer, stride = student
    valid = (label >= 0) & (label < columns)
    elsewhere = label == ELSEWHERE
    column = tl.where(valid, label, 0)
    score = tl.load(pointer + column * stride).to(tl.float64)
    return tl.where(elsewhere, -1, column), valid, tl.where(elsewhere, LOWEST, score)


@triton.jit
def _at(row, start, columns, BLOCK: tl.constexpr):
    """Pointers to a block of columns, and which of them exist. Offsets pass 2^31 in transposed matrices."""
    pointer, stride = row
    column = start + tl.arange(0, BLOCK)
    return pointer + column.to(tl.int64) * stride, column < columns


@triton.jit
def _read(row, start, columns, F: tl.constexpr, BLOCK: tl.constexpr):
    """A block of scores [BLOCK] in the working precision; -inf past the end of the row."""
    pointers, exists = _at(row, start, columns, BLOCK)
    return tl.load(pointers, mask=exists, other=LOWEST).to(F)


@triton.jit
def _write(row, start, columns, x, BLOCK: tl.constexpr):
    pointers, exists = _at(row, start, columns, BLOCK)
    tl.store(pointers, x.to(row[0].dtype.element_ty), mask=exists)


@triton.jit
def _rescale(before, now, inv_tau):
    """What sums of e^((x - before) / tau) are multiplied with when the running maximum moves to `now`."""
    return tl.where(before == now, 1.0, tl.exp((before - now) * inv_tau))


@triton.jit
def _finite(maximum):
    """The maximum as it is subtracted inside exponentials: of a row so far all -inf it must not make -inf - -inf."""
    return tl.where(maximum == LOWEST, 0.0, maximum)


@triton.jit
def _sum(x):
    return tl.sum(x, 0).to(tl.float64)


@triton.jit
def _position(row, start, columns, maximum, F: tl.constexpr, BLOCK: tl.constexpr):
    """The column, from 1, of the first score that is the maximum, in the block that it is in."""
    x = _read(row, start, columns, F, BLOCK)
    column = start + tl.arange(0, BLOCK)
    return (tl.min(tl.where(x == maximum.to(F), column, columns), 0) + 1).to(tl.float64)


@triton.jit
def _entropy(own, exponentials):
    """In nats, from the sum e log e of exponentials e and their sum; 0 where there are none."""
    exponentials = tl.where(exponentials == 0, 1.0, exponentials)
    entropy = tl.log(exponentials) - own / exponentials
    return tl.where(entropy < 0, 0.0, entropy)


@triton.jit
def _statistics(
    student,
    teacher,
    label,
    columns,
    tau,
    DIVERGENCE: tl.constexpr,
    SEPARATE: tl.constexpr,  # whether the cross-entropy needs exponentials of its own
    METRICS: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pass 1: running statistics of the row, and D where they give it: (D, stats, entropies and highest columns)."""
    BY_STUDENT: tl.constexpr = DIVERGENCE == REVERSE_KL
    zero, one = _double(0.0), _double(1.0)
    inv_tau = 1 / tau
    max_s, max_t = _double(LOWEST), _double(LOWEST)
    sum_s, sum_t, sum_1, moment = zero, zero, zero, zero
    own_s, own_t = zero, zero  # sums of q log q and p log p
    block_s, block_t = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)  # where the maxima are
    for start in range(0, columns, BLOCK):
        s = _read(student, start, columns, F, BLOCK)
        before_s, before_t = max_s, max_t
        max_s = tl.maximum(max_s, tl.max(s, 0).to(tl.float64))
        if teacher is not None:
            t = _read(teacher, start, columns, F, BLOCK)
            max_t = tl.maximum(max_t, tl.max(t, 0).to(tl.float64))
        top_s, top_t = _finite(max_s), _finite(max_t)
        if (max_s > before_s) | (max_t > before_t):  # seldom after the first few blocks
            sum_1 *= _rescale(before_s, max_s, one)
            s_factor, t_factor = _rescale(before_s, max_s, inv_tau), _rescale(before_t, max_t, inv_tau)
            # log(p / q) is relative to both maxima, so its moment follows when either moves
            moved = inv_tau * (_finite(before_t) - _finite(before_s) - top_t + top_s)
            moment = s_factor * (moment - sum_s * moved) if BY_STUDENT else t_factor * (moment + sum_t * moved)
            if METRICS:  # logarithms are lower by what the maximum is higher
                own_s = s_factor * (own_s - sum_s * inv_tau * (top_s - _finite(before_s)))
                own_t = t_factor * (own_t - sum_t * inv_tau * (top_t - _finite(before_t)))
                block_s = tl.where(max_s > before_s, start, block_s)
                block_t = tl.where(max_t > before_t, start, block_t)
            sum_s *= s_factor
            sum_t *= t_factor

        s = _unmasked(s)
        if teacher is not None:
            row = _running_constants(top_s, top_t, inv_tau, F)
            p, q, difference, log_ratio, _, _, _ = _pair(s, _unmasked(t), row)
            student_sum, teacher_sum, gap = _sum(q), _sum(p), _sum(difference)
            nearly_equal = tl.abs(gap) < teacher_sum * NEARLY_EQUAL
            sum_s += tl.where(nearly_equal, teacher_sum + gap, student_sum)
            sum_t += teacher_sum
            if METRICS:
                own_s += inv_tau * _sum(q * (s - top_s.to(F)))
                own_t += inv_tau * _sum(p * (_unmasked(t) - top_t.to(F)))
            if DIVERGENCE == FORWARD_KL:
                moment += tl.where(nearly_equal, _sum(_excess(p, q, log_ratio)) - gap, _sum(p * log_ratio))
            elif DIVERGENCE == REVERSE_KL:
                moment += tl.where(nearly_equal, _sum(_excess(q, p, -log_ratio)) + gap, _sum(-q * log_ratio))
        if label is not None:
            exponential = tl.exp(s - top_s.to(F)) if SEPARATE or teacher is None else q
            sum_1 += _sum(tl.where(start + tl.arange(0, BLOCK) == label[0], 0, exponential))

    divergence, mean = zero, zero
    if label is not None:
        # The label's own exponential comes last and in fp64: beside it the others of a confident student would vanish.
        sum_1 += tl.exp(label[2] - _finite(max_s))
    if teacher is not None:
        if DIVERGENCE == FORWARD_KL:
            divergence = moment / sum_t + tl.log(sum_s / sum_t)
        elif DIVERGENCE == REVERSE_KL:
            divergence = moment / sum_s - tl.log(sum_s / sum_t)
            mean = divergence
    entropy_s, entropy_t, position_s, position_t = zero, zero, zero, zero
    if METRICS and teacher is not None:
        # of each model by itself: in a shard one may have a distribution where the other has none
        entropy_s, entropy_t = _entropy(own_s, sum_s), _entropy(own_t, sum_t)
        position_s = _position(student, block_s, columns, max_s, F, BLOCK)
        position_t = _position(teacher, block_t, columns, max_t, F, BLOCK)
    stats = (_finite(max_s), sum_s, _finite(max_t), sum_t, mean, zero, sum_1)
    return divergence, stats, (entropy_s, entropy_t, position_s, position_t)


@triton.jit
def _mean_residual(student, teacher, columns, stats, tau, F: tl.constexpr, BLOCK: tl.constexpr):
    """What sum q (log(q / p) - mean) falls short of its true value, zero: the digits that a large mean lost."""
    row = _row_constants(stats, tau, 1.0, F)
    residual = _double(0.0)
    for start in range(0, columns, BLOCK):
        s = _unmasked(_read(student, start, columns, F, BLOCK))
        t = _unmasked(_read(teacher, start, columns, F, BLOCK))
        residual += _sum(_gradient_of(s, t, None, row, REVERSE_KL, False))
    return residual


@triton.jit
def _value_sums(
    student, teacher, columns, stats, b, tau, DIVERGENCE: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr
):
    """Pass 2, for divergences without a closed form: (D, mean of u, mean of v)."""
    row = _row_constants(stats, tau, 1.0, F)
    value, mean, comean = _double(0.0), _double(0.0), _double(0.0)
    for start in range(0, columns, BLOCK):
        s = _unmasked(_read(student, start, columns, F, BLOCK))
        t = _unmasked(_read(teacher, start, columns, F, BLOCK))
        pair = _pair(s, t, row)
        value += _sum(_value(pair, b, DIVERGENCE))
        mean += _sum(_slope(pair, b, DIVERGENCE))
        comean += _sum(_coslope(pair, b, DIVERGENCE))
    return value, mean, comean


@triton.jit
def _refined(divergence, student, teacher, columns, stats, tau, F: tl.constexpr, BLOCK: tl.constexpr):
    """A reverse KL, with the digits that a large one lost."""
    max_s, sum_s, max_t, sum_t, _, saturated, sum_1 = stats
    if (divergence > FAR_APART) & (divergence < 1e20):
        stats = (max_s, sum_s, max_t, sum_t, divergence, saturated, sum_1)
        divergence += _mean_residual(student, teacher, columns, stats, tau, F, BLOCK)
    return divergence


@triton.jit
def _loss(
    student,
    teacher,
    label,
    columns,
    beta,
    weights,
    tau,
    kd_weight,
    ce_weight,
    DIVERGENCE: tl.constexpr,
    SEPARATE: tl.constexpr,
    METRICS: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Passes 1 and 2: (the row's loss before its coefficient, its stats, its metrics)."""
    # a mix's reverse KL comes of the first pass
    MIXED_REVERSE: tl.constexpr = DIVERGENCE >= MIX and DIVERGENCE // 2 % 2 == 1
    FIRST: tl.constexpr = REVERSE_KL if MIXED_REVERSE else DIVERGENCE
    SECOND: tl.constexpr = DIVERGENCE - 2 if MIXED_REVERSE else DIVERGENCE
    divergence, stats, own = _statistics(student, teacher, label, columns, tau, FIRST, SEPARATE, METRICS, F, BLOCK)
    max_s, sum_s, max_t, sum_t, mean, saturated, sum_1 = stats
    entropy_s, entropy_t, position_s, position_t = own
    loss, kd, cross_entropy = _double(0.0), _double(0.0), _double(0.0)
    if teacher is not None:
        # A row of nothing but -inf has no distribution: it counts as masked, with loss and gradient 0.
        empty = (sum_s == 0) | (sum_t == 0)
        if FIRST == REVERSE_KL:
            divergence = _refined(divergence, student, teacher, columns, stats, tau, F, BLOCK)
            mean = _with_infinity(divergence)
        if DIVERGENCE >= JSD:
            b = _beta_constants(beta, weights, F)
            value, slope, coslope = _value_sums(student, teacher, columns, stats, b, tau, SECOND, F, BLOCK)
            saturated = (coslope < slope).to(tl.float64)
            second_mean = tl.where(coslope < slope, -coslope, slope)
            if MIXED_REVERSE:
                unit = _weight(weights, REVERSE_KL)
                divergence, mean = unit * divergence + value, unit * mean + second_mean
            else:
                divergence, mean = value, second_mean
        mean = tl.where(empty, 0.0, mean)
        kd = tl.where(empty, 0.0, tau * tau * _with_infinity(divergence))
        loss = kd_weight * kd
        if METRICS:
            entropy_s, entropy_t = tl.where(empty, 0.0, entropy_s), tl.where(empty, 0.0, entropy_t)
            position_s, position_t = tl.where(empty, 0.0, position_s), tl.where(empty, 0.0, position_t)
    if label is not None:
        _, valid, score = label
        cross_entropy = tl.where(valid, max_s - score + tl.log(sum_1), float("nan"))
        loss += ce_weight * cross_entropy
    return (
        loss,
        (max_s, sum_s, max_t, sum_t, mean, saturated, sum_1),
        (kd, cross_entropy, entropy_s, entropy_t, position_s, position_t),
    )


@triton.jit
def _gradient(
    student,
    teacher,
    label,
    gradient,
    columns,
    stats,
    coefficient,
    beta,
    weights,
    tau,
    kd_weight,
    ce_weight,
    DIVERGENCE: tl.constexpr,
    SATURATED: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pass 3: coefficient * d loss / d s, written to `gradient`, which may be `student`."""
    max_s, sum_s, max_t, sum_t, mean, saturated, sum_1 = stats
    if teacher is not None:
        empty = (sum_s == 0) | (sum_t == 0)
        sum_s, sum_t = tl.where(empty, 1.0, sum_s), tl.where(empty, 1.0, sum_t)
        unit = _mean_unit(weights, DIVERGENCE)
        row = _row_constants((max_s, sum_s, max_t, sum_t, mean, saturated, sum_1), tau, unit, F)
        b = _beta_constants(beta, weights, F)
        kd_scale = tl.where(empty, 0.0, coefficient * kd_weight * tau).to(F)
    if label is not None:
        # The label's own column is done apart and in fp64: softmax - 1 would lose every digit of a confident student.
        label_column, valid, score = label
        ce_scale = tl.where(sum_1 == 0, 0.0, coefficient * ce_weight / tl.where(sum_1 == 0, 1.0, sum_1))
        at_label = tl.where(valid, ce_scale * (tl.exp(score - max_s) - sum_1), float("nan"))
        at_label = tl.where(sum_1 == 0, 0.0, at_label).to(F)
        ce_scale, top_s = ce_scale.to(F), max_s.to(F)
    for start in range(0, columns, BLOCK):
        s = _unmasked(_read(student, start, columns, F, BLOCK))
        g = tl.zeros_like(s)
        if teacher is not None:
            t = _unmasked(_read(teacher, start, columns, F, BLOCK))
            g = kd_scale * _gradient_of(s, t, b, row, DIVERGENCE, SATURATED)
        if label is not None:
            column = start + tl.arange(0, BLOCK)
            g += tl.where(column == label_column, at_label, ce_scale * tl.exp(s - top_s))
        _write(gradient, start, columns, g, BLOCK)


@triton.jit
def rows_kernel(
    student,
    teacher,
    coefficient,
    labels,
    loss,  # None: stats are read
    stats,  # None: they are not kept
    gradient,  # None: it is not wanted
    metrics,  # None: they are not wanted
    columns,
    student_row,  # strides
    student_column,
    teacher_row,
    teacher_column,
    gradient_row,
    gradient_column,
    weights,  # of a mix, or None
    beta: tl.float64,
    tau: tl.float64,
    kd_weight: tl.float64,
    ce_weight: tl.float64,
    DIVERGENCE: tl.constexpr,
    SEPARATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: loss, stats and metrics, unless they are given, and the gradient, if wanted."""
    F: tl.constexpr = tl.float64 if student.dtype.element_ty == tl.float64 else tl.float32
    beta, tau, kd_weight, ce_weight = _double(beta), _double(tau), _double(kd_weight), _double(ce_weight)
    index = tl.program_id(0).to(tl.int64)
    student = (student + index * student_row, student_column)
    if teacher is not None:
        teacher = (teacher + index * teacher_row, teacher_column)
    if gradient is not None:
        gradient = (gradient + index * gradient_row, gradient_column)
    if stats is not None:
        stats += index * 7
    if metrics is not None:
        metrics += index * 6
    weight = tl.load(coefficient + index)
    if weight == 0:  # the row is not read
        if loss is not None:
            tl.store(loss + index, _double(0.0))
            if stats is not None:
                for i in tl.static_range(7):
                    tl.store(stats + i, _double(0.0))
            if metrics is not None:
                for i in tl.static_range(6):
                    tl.store(metrics + i, _double(0.0))
        if gradient is not None:
            for start in range(0, columns, BLOCK):
                _write(gradient, start, columns, tl.zeros((BLOCK,), F), BLOCK)
    else:
        label = None
        if labels is not None:
            label = _label(student, tl.load(labels + index), columns)
            tl.debug_barrier()  # every thread has read the score before one overwrites it with its gradient
        if loss is not None:
            row_loss, row_stats, row_metrics = _loss(
                student,
                teacher,
                label,
                columns,
                beta,
                weights,
                tau,
                kd_weight,
                ce_weight,
                DIVERGENCE,
                SEPARATE,
                metrics is not None,
                F,
                BLOCK,
            )
            tl.store(loss + index, weight * row_loss)
            if stats is not None:
                for i in tl.static_range(7):
                    tl.store(stats + i, row_stats[i])
            if metrics is not None:
                for i in tl.static_range(6):
                    tl.store(metrics + i, row_metrics[i])
        else:
            max_s, sum_s, max_t, sum_t = tl.load(stats), tl.load(stats + 1), tl.load(stats + 2), tl.load(stats + 3)
            row_stats = (max_s, sum_s, max_t, sum_t, tl.load(stats + 4), tl.load(stats + 5), tl.load(stats + 6))
        if gradient is not None:
            if DIVERGENCE < JSD or teacher is None:
                _gradient(
                    student, teacher, label, gradient, columns, row_stats, weight, beta, weights, tau, kd_weight,
                    ce_weight, DIVERGENCE, False, F, BLOCK,
                )  # fmt: skip
            elif row_stats[5] != 0:
                _gradient(
                    student, teacher, label, gradient, columns, row_stats, weight, beta, weights, tau, kd_weight,
                    ce_weight, DIVERGENCE, True, F, BLOCK,
                )  # fmt: skip
            else:
                _gradient(
                    student, teacher, label, gradient, columns, row_stats, weight, beta, weights, tau, kd_weight,
                    ce_weight, DIVERGENCE, False, F, BLOCK,
                )  # fmt: skip


@triton.jit
def shard_kernel(
    student,
    teacher,
    coefficient,
    labels,
    stats,
    sums,  # None: stats are written
    metrics,  # None: they are not wanted
    columns,
    student_row,  # strides
    student_column,
    teacher_row,
    teacher_column,
    weights,  # of a mix, or None
    beta: tl.float64,
    tau: tl.float64,
    DIVERGENCE: tl.constexpr,
    SEPARATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One shard of a row: its statistics, as if it were all of the row, or by those of the row the sums of pass 2."""
    F: tl.constexpr = tl.float64 if student.dtype.element_ty == tl.float64 else tl.float32
    beta, tau = _double(beta), _double(tau)
    index = tl.program_id(0).to(tl.int64)
    student = (student + index * student_row, student_column)
    if teacher is not None:
        teacher = (teacher + index * teacher_row, teacher_column)
    stats += index * 7
    kept = tl.load(coefficient + index) != 0  # of others the row is not read
    if sums is None:
        if kept:
            label = None
            if labels is not None:
                label = _label(student, tl.load(labels + index), columns)
            divergence, row_stats, own = _statistics(
                student, teacher, label, columns, tau, DIVERGENCE, SEPARATE, metrics is not None, F, BLOCK
            )
            if teacher is not None and DIVERGENCE == REVERSE_KL:
                divergence = _refined(divergence, student, teacher, columns, row_stats, tau, F, BLOCK)
            max_s, sum_s, max_t, sum_t, _, saturated, sum_1 = row_stats
            row_stats = (max_s, sum_s, max_t, sum_t, divergence, saturated, sum_1)
            for i in tl.static_range(7):
                tl.store(stats + i, row_stats[i])
            if metrics is not None:
                for i in tl.static_range(4):
                    tl.store(metrics + index * 6 + 2 + i, own[i])
        else:
            for i in tl.static_range(7):
                tl.store(stats + i, _double(0.0))
    else:
        sums += index * 3
        max_s, sum_s, max_t, sum_t = tl.load(stats), tl.load(stats + 1), tl.load(stats + 2), tl.load(stats + 3)
        if kept & (sum_s != 0) & (sum_t != 0):
            zero = _double(0.0)
            row_stats = (max_s, sum_s, max_t, sum_t, zero, zero, zero)
            b = _beta_constants(beta, weights, F)
            found = _value_sums(student, teacher, columns, row_stats, b, tau, DIVERGENCE, F, BLOCK)
            for i in tl.static_range(3):
                tl.store(sums + i, found[i])
        else:
            for i in tl.static_range(3):
                tl.store(sums + i, _double(0.0))


# ---- launch ----------------------------------------------------------------------------------------------------------


def block_and_options(columns: int, dtype: torch.dtype, nvidia: bool, mix: bool = False) -> tuple[int, dict]:
    """Columns a block, and launch options: as many columns a thread as fit its registers (tests/test_compile_gpu.py).

    Left to itself, ptxas spills a few row constants to fit one block more into a multiprocessor; told a ceiling it does
    not. With 128 registers two blocks of 8 warps run side by side, one computing while the other waits.
    """
    largest, per_thread, registers = (1024, 4, 255) if dtype == torch.float64 else (2048, 8, 128)
    if mix and dtype != torch.float64:  # its members' sums and weights take the registers of half the columns
        largest, per_thread = 1024, 4
    block = min(largest, max(32 * per_thread, triton.next_power_of_2(columns)))
    options = {
        "num_warps": block // (32 * per_thread),
        "enable_fp_fusion": True,  # Triton's default differs by version; the two-sum has no product to fuse
    }
    if nvidia:
        options["maxnreg"] = registers
    return block, options


def _check_matrix(name: str, x: Tensor, rows: int, columns: int) -> None:
    if x.shape != (rows, columns) or not x.is_floating_point():
        raise ValueError(f"{name}: expected floating [{rows}, {columns}], got {x.dtype} {list(x.shape)}")


def _check_rows(name: str, x: Tensor, rows: int, dtype: torch.dtype, *trailing: int) -> None:
    if x.shape != (rows, *trailing) or x.dtype != dtype or not x.is_contiguous():
        raise ValueError(f"{name}: expected contiguous {dtype} {[rows, *trailing]}, got {x.dtype} {list(x.shape)}")


def _checked(
    student: Tensor,
    teacher: Tensor | None,
    coefficient: Tensor,
    labels: Tensor | None,
    divergence: int,
    kd_weight: float,
    ce_weight: float,
) -> tuple[Tensor | None, Tensor | None]:
    """The teacher and the labels, each None where its weight is 0; raises for arguments that do not fit."""
    if teacher is None and kd_weight != 0:
        raise ValueError("teacher: needed unless kd_weight is 0")
    if labels is None and ce_weight != 0:
        raise ValueError("labels: needed unless ce_weight is 0")
    if not 0 <= divergence <= TVD.value and not MIX.value < divergence < 2 * MIX.value:
        raise ValueError(f"divergence: expected 0 to {TVD.value} or a mix's code, got {divergence}")
    teacher = teacher if kd_weight != 0 else None
    labels = labels if ce_weight != 0 else None
    rows, columns = student.shape
    for name, matrix in (("student", student), ("teacher", teacher)):
        if matrix is not None:
            _check_matrix(name, matrix, rows, columns)
    _check_rows("coefficient", coefficient, rows, torch.float64)
    if labels is not None:
        _check_rows("labels", labels, rows, torch.int64)
    return teacher, labels


def divergence_rows(
    student: Tensor,  # [R, V]
    teacher: Tensor | None,  # [R, V]
    coefficient: Tensor,  # [R]
    labels: Tensor | None,  # [R]
    loss: Tensor | None,  # [R]
    stats: Tensor | None,  # [R, 7], given where there is no loss
    gradient: Tensor | None,  # [R, V], of any float dtype and stride; it may be the student
    divergence: int,
    beta: float | Sequence[float],
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    *,
    metrics: Tensor | None = None,  # [R, 6]
) -> None:
    """Writes each row's loss, statistics and metrics, and coefficient * d loss / d student: of these what is given."""
    rows, columns = student.shape
    teacher, labels = _checked(student, teacher, coefficient, labels, divergence, kd_weight, ce_weight)
    if gradient is not None:
        _check_matrix("gradient", gradient, rows, columns)
    if loss is not None:
        _check_rows("loss", loss, rows, torch.float64)
    if stats is not None:
        _check_rows("stats", stats, rows, torch.float64, 7)
    if metrics is not None:
        _check_rows("metrics", metrics, rows, torch.float64, 6)
        if loss is None:
            raise ValueError("metrics: expected None, because they go with a loss, and there is none")
    if rows == 0:
        return
    nvidia = student.is_cuda and torch.version.hip is None
    block, options = block_and_options(columns, student.dtype, nvidia, divergence >= MIX.value)
    with torch.cuda.device_of(student):
        rows_kernel[(rows,)](
            student,
            teacher,
            coefficient,
            labels,
            loss,
            stats,
            gradient,
            metrics,
            columns,
            *student.stride(),
            *(teacher.stride() if teacher is not None else (0, 0)),
            *(gradient.stride() if gradient is not None else (0, 0)),
            **beta_arguments(beta),
            tau=float(temperature),
            kd_weight=float(kd_weight),
            ce_weight=float(ce_weight),
            DIVERGENCE=divergence,
            SEPARATE=labels is not None and temperature != 1,
            BLOCK=block,
            **options,
        )


def _launch_shard(
    student: Tensor,
    teacher: Tensor | None,
    coefficient: Tensor,
    labels: Tensor | None,
    stats: Tensor,
    sums: Tensor | None,
    metrics: Tensor | None,
    divergence: int,
    beta: float | Sequence[float],
    temperature: float,
    kd_weight: float,
    ce_weight: float,
) -> None:
    rows, columns = student.shape
    teacher, labels = _checked(student, teacher, coefficient, labels, divergence, kd_weight, ce_weight)
    _check_rows("stats", stats, rows, torch.float64, 7)
    if sums is not None:
        _check_rows("sums", sums, rows, torch.float64, 3)
    if metrics is not None:
        _check_rows("metrics", metrics, rows, torch.float64, 6)
    if rows == 0:
        return
    nvidia = student.is_cuda and torch.version.hip is None
    block, options = block_and_options(columns, student.dtype, nvidia, divergence >= MIX.value)
    with torch.cuda.device_of(student):
        shard_kernel[(rows,)](
            student,
            teacher,
            coefficient,
            labels,
            stats,
            sums,
            metrics,
            columns,
            *student.stride(),
            *(teacher.stride() if teacher is not None else (0, 0)),
            **beta_arguments(beta),
            tau=float(temperature),
            DIVERGENCE=divergence,
            SEPARATE=labels is not None and temperature != 1,
            BLOCK=block,
            **options,
        )


def divergence_shard_stats(
    student: Tensor,  # [R, V]
    teacher: Tensor | None,  # [R, V]
    coefficient: Tensor,  # [R]
    labels: Tensor | None,  # [R]
    stats: Tensor,  # [R, 7]
    *objective: Any,
    metrics: Tensor | None = None,  # [R, 6], 0
) -> None:
    """Writes the statistics of shards of rows, each of its shard alone; in the mean's place its own D.

    And of metrics what a shard has alone: entropies and columns.
    """
    _launch_shard(student, teacher, coefficient, labels, stats, None, metrics, *objective)


def divergence_shard_sums(
    student: Tensor,  # [R, V]
    teacher: Tensor,  # [R, V]
    stats: Tensor,  # [R, 7]
    coefficient: Tensor,  # [R]
    sums: Tensor,  # [R, 3]
    *objective: Any,
) -> None:
    """Writes what shards add to D, to the mean of u and to that of v, by the statistics of the whole rows."""
    divergence, beta, temperature, kd_weight, _ = objective
    numbers = int(divergence), beta, temperature, kd_weight, 0.0
    _launch_shard(student, teacher, coefficient, None, stats, sums, None, *numbers)
