"""One row in passes over its blocks of columns: statistics, values, loss and gradient."""

from collections import namedtuple
from typing import NamedTuple

import triton
import triton.language as tl

from ..common import (
    FORWARD_KL,
    JSD,
    LOG2E,
    NOTHING,
    REVERSE_KL,
    beta_constants,
    coslope_of,
    double,
    member_weight,
    mixes,
    slope_of,
    unmasked,
    value_of,
    with_infinity,
)
from .column import RowStats, column_gradient, column_pair, row_constants

LOWEST = tl.constexpr(float("-inf"))
# Divergence, in nats, under which a row is computed with care: csrc/cpu/row_kernel.h says why.
NEARLY_EQUAL = tl.constexpr(0.1)
# Divergence over which the mean of log(q / p) is refined: one so large is summed up with its own last digit's error.
FAR_APART = tl.constexpr(16.0)
# The label of a row that is a shard of a longer one, in another shard of which the label lies.
ELSEWHERE = tl.constexpr(-(2**63))


class Shape(NamedTuple):
    """What a kernel is compiled for, beside its arguments' types."""

    DIVERGENCE: tl.constexpr
    SEPARATE: tl.constexpr  # whether the cross-entropy needs exponentials of its own
    METRICS: tl.constexpr  # whether they are wanted
    SHARD: tl.constexpr  # whether rows are shards, of which no more than statistics and metrics are wanted
    ALIGNED: tl.constexpr  # whether all rows begin at multiples of 16 bytes, and columns lie side by side
    F: tl.constexpr  # the working precision
    BLOCK: tl.constexpr  # columns


# Numbers in fp64; weights are those of a mix, or None.
Objective = namedtuple("Objective", "beta weights tau kd_weight ce_weight")
# A row of a matrix.
Scores = namedtuple("Scores", "pointer stride")
# `valid` is whether there is such a column, `score` the student's in it.
Label = namedtuple("Label", "column valid score")
# What there is of a row: the teacher, the gradient, which may be the student, and the label may be None.
Row = namedtuple("Row", "student teacher gradient label columns")


@triton.jit
def label_of(student, label, columns):
    """A row's label; of one that is elsewhere column -1, in which no share of the sums and of the gradient is."""
    valid = (label >= 0) & (label < columns)
    elsewhere = label == ELSEWHERE
    column = tl.where(valid, label, 0)
    score = tl.load(student.pointer + column * student.stride).to(tl.float64)
    return Label(tl.where(elsewhere, -1, column).to(tl.int32), valid, tl.where(elsewhere, LOWEST, score))


@triton.jit
def _columns(row, start, S):
    """A block's [groups, columns of 16 bytes]. A thread has a group to itself, and sums it up without the others.

    A group lies side by side where a thread can read it at once, and else with its neighbours between.
    """
    WIDTH: tl.constexpr = 128 // row.student.pointer.dtype.element_ty.primitive_bitwidth
    GROUPS: tl.constexpr = S.BLOCK // WIDTH
    group, inside = tl.arange(0, GROUPS)[:, None], tl.arange(0, WIDTH)[None, :]
    return start + (group * WIDTH + inside if S.ALIGNED else inside * GROUPS + group)


@triton.jit
def _zeros(row, DTYPE: tl.constexpr, S):
    """One for each group."""
    return tl.zeros((S.BLOCK * row.student.pointer.dtype.element_ty.primitive_bitwidth // 128,), DTYPE)


@triton.jit
def _read(scores, column, columns, MASK: tl.constexpr, F: tl.constexpr):
    """Scores in the working precision; -inf past the end of the row. Without MASK all columns are before it.

    Offsets pass 2^31 in transposed matrices.
    """
    pointers = scores.pointer + column.to(tl.int64) * scores.stride
    x = tl.load(pointers, mask=column < columns, other=LOWEST) if MASK else tl.load(pointers)
    return x.to(F)


@triton.jit
def write_block(scores, column, columns, x, MASK: tl.constexpr):
    pointers = scores.pointer + column.to(tl.int64) * scores.stride
    tl.store(pointers, x.to(scores.pointer.dtype.element_ty), mask=column < columns if MASK else None)


@triton.jit
def _read_both(row, start, S):
    """Both models' scores of a block, past the end of the row -inf."""
    column = _columns(row, start, S)
    return _read(row.student, column, row.columns, True, S.F), _read(row.teacher, column, row.columns, True, S.F)


@triton.jit
def _sum(x):
    """Of each group."""
    return tl.sum(x, 1).to(tl.float64)


@triton.jit
def _total(x, factor):
    return tl.sum(x.to(tl.float64) * factor.to(tl.float64), 0)


@triton.jit
def _position(scores, tops, blocks, top, columns, S):
    """The column, from 1, of the first score that is the maximum, from each group's and the blocks that they are in."""
    column = tl.min(tl.where(tops == top, blocks, columns), 0) + tl.arange(0, S.BLOCK)
    x = _read(scores, column, columns, True, S.F)
    return (tl.min(tl.where(x == top, column, columns), 0) + 1).to(tl.float64)


@triton.jit
def _entropy(own, exponentials):
    """In nats, from the sum e log e of exponentials e and their sum; 0 where there are none."""
    exponentials = tl.where(exponentials == 0, 1.0, exponentials)
    entropy = tl.log(exponentials) - own / exponentials
    return tl.where(entropy < 0, 0.0, entropy)


@triton.jit
def _grown(sums, row, start, scale, BY_STUDENT: tl.constexpr, MASK: tl.constexpr, S):
    """Each group's running maxima, and sums relative to them, by a block more."""
    max_s, max_t, sum_s, sum_t, moment, sum_1, own_s, own_t, block_s, block_t = sums
    column = _columns(row, start, S)
    x = unmasked(_read(row.student, column, row.columns, MASK, S.F))
    before, max_s = max_s, tl.maximum(max_s, tl.max(x, 1))
    down_s, x = before - max_s, x - max_s[:, None]
    s_factor, q = tl.exp2(down_s * scale), tl.exp2(x * scale)
    if row.label is not None:
        factor, e = (tl.exp2(down_s * LOG2E), tl.exp2(x * LOG2E)) if S.SEPARATE else (s_factor, q)
        sum_1 = sum_1 * factor + tl.sum(tl.where(column == row.label.column, 0, e), 1)
    if row.teacher is not None:
        y = unmasked(_read(row.teacher, column, row.columns, MASK, S.F))
        before, max_t = max_t, tl.maximum(max_t, tl.max(y, 1))
        down_t, y = before - max_t, y - max_t[:, None]
        t_factor, p = tl.exp2(down_t * scale), tl.exp2(y * scale)
        # log(p / q) is relative to both maxima, so its moment follows when either moves
        if BY_STUDENT:
            moment = s_factor * (moment + sum_s * (down_s - down_t)) + tl.sum(q * (x - y), 1)
        else:
            moment = t_factor * (moment + sum_t * (down_t - down_s)) + tl.sum(p * (y - x), 1)
        if S.METRICS:  # logarithms are lower by what the maximum is higher
            own_s = s_factor * (own_s + sum_s * down_s) + tl.sum(q * x, 1)
            own_t = t_factor * (own_t + sum_t * down_t) + tl.sum(p * y, 1)
            block_s, block_t = tl.where(down_s < 0, start, block_s), tl.where(down_t < 0, start, block_t)
        sum_s, sum_t = sum_s * s_factor + tl.sum(q, 1), sum_t * t_factor + tl.sum(p, 1)
    return max_s, max_t, sum_s, sum_t, moment, sum_1, own_s, own_t, block_s, block_t


@triton.jit
def _divergence(moment, sum_s, sum_t, BY_STUDENT: tl.constexpr):
    """A KL divergence, from the moment of log(p / q), or for the student's of log(q / p)."""
    log_sums = tl.log(sum_s / sum_t)
    return moment / sum_s - log_sums if BY_STUDENT else moment / sum_t + log_sums


@triton.jit
def _careful_sums(row, max_s, max_t, tau, DIVERGENCE: tl.constexpr, S):
    """(sum_s, sum_t, D) of a row whose models nearly agree, where both are small differences of what is summed up."""
    one = double(1.0)  # with sums of 1, probabilities are the plain exponentials
    constants = row_constants(RowStats(max_s, one, max_t, one, one, one, one), tau, S.F)
    sum_t = _zeros(row, tl.float64, S)
    gap, excess = sum_t, sum_t
    for start in range(0, row.columns, S.BLOCK):
        s, t = _read_both(row, start, S)
        pair = column_pair(unmasked(s), unmasked(t), constants)
        sum_t += _sum(pair.p)
        gap += _sum(pair.difference)
        excess += _sum(value_of(pair, None, DIVERGENCE))
    sum_t, gap, excess = tl.sum(sum_t, 0), tl.sum(gap, 0), tl.sum(excess, 0)
    sum_s = sum_t + gap
    moment = excess + gap if DIVERGENCE == REVERSE_KL else excess - gap
    return sum_s, sum_t, _divergence(moment, sum_s, sum_t, DIVERGENCE == REVERSE_KL)


@triton.jit
def first_pass(row, tau, DIVERGENCE: tl.constexpr, S):
    """Pass 1: the row's statistics, with D in the mean's place where they give it; entropies and highest columns."""
    BY_STUDENT: tl.constexpr = DIVERGENCE == REVERSE_KL
    KL: tl.constexpr = REVERSE_KL if BY_STUDENT else FORWARD_KL
    zero, scale = double(0.0), (1 / tau * LOG2E).to(S.F)
    none, block = _zeros(row, S.F, S), _zeros(row, tl.int32, S)
    sums = (none + NOTHING, none + NOTHING, none, none, none, none, none, none, block, block)
    whole = row.columns - row.columns % S.BLOCK
    for start in range(0, whole, S.BLOCK):
        sums = _grown(sums, row, start, scale, BY_STUDENT, False, S)
    if whole < row.columns:
        sums = _grown(sums, row, whole, scale, BY_STUDENT, True, S)
    tops_s, tops_t, sum_s, sum_t, moment, sum_1, own_s, own_t, block_s, block_t = sums
    max_s, max_t = tl.max(tops_s, 0), tl.max(tops_t, 0)
    down_s, down_t = tops_s - max_s, tops_t - max_t
    s_factor, t_factor = tl.exp2(down_s * scale), tl.exp2(down_t * scale)
    unit = scale.to(tl.float64) / LOG2E  # 1 / tau as the exponents have it, rounded
    if BY_STUDENT:
        moment = unit * _total(moment + sum_s * (down_s - down_t), s_factor)
    else:
        moment = unit * _total(moment + sum_t * (down_t - down_s), t_factor)
    if S.METRICS:
        own_s, own_t = _total(own_s + sum_s * down_s, s_factor), _total(own_t + sum_t * down_t, t_factor)
    sum_s, sum_t = _total(sum_s, s_factor), _total(sum_t, t_factor)
    own = [zero, zero, zero, zero]
    if S.METRICS and row.teacher is not None:
        # of each model by itself: in a shard one may have a distribution where the other has none
        position_s = _position(row.student, tops_s, block_s, max_s, row.columns, S)
        position_t = _position(row.teacher, tops_t, block_t, max_t, row.columns, S)
        own = [_entropy(unit * own_s, sum_s), _entropy(unit * own_t, sum_t), position_s, position_t]
    # of a row of nothing but -inf it must not make -inf - -inf
    max_s = tl.where(max_s == NOTHING, 0.0, max_s).to(tl.float64)
    max_t = tl.where(max_t == NOTHING, 0.0, max_t).to(tl.float64)
    # The label's own exponential comes last and in fp64: beside it the others of a confident student would vanish.
    sum_1 = zero if row.label is None else _total(sum_1, tl.exp2(down_s * LOG2E)) + tl.exp(row.label.score - max_s)
    divergence, careful = zero, zero
    if row.teacher is not None:
        divergence, full = _divergence(moment, sum_s, sum_t, BY_STUDENT), (sum_s != 0) & (sum_t != 0)
        careful = (full & (divergence < NEARLY_EQUAL)).to(tl.float64)
        if careful != 0:
            sum_s, sum_t, divergence = _careful_sums(row, max_s, max_t, tau, KL, S)
        if BY_STUDENT and (divergence > FAR_APART) & (divergence < 1e20):
            # The digits that a large mean lost are what sum q (log(q / p) - mean) falls short of its true value, zero.
            stats = RowStats(max_s, sum_s, max_t, sum_t, divergence, careful, sum_1)
            constants, residual = row_constants(stats, tau, S.F), _zeros(row, tl.float64, S)
            for start in range(0, row.columns, S.BLOCK):
                s, t = _read_both(row, start, S)
                residual += _sum(column_gradient(s, t, None, constants, REVERSE_KL, False))
            divergence += tl.sum(residual, 0)
    return RowStats(max_s, sum_s, max_t, sum_t, divergence, careful, sum_1), own


@triton.jit
def value_sums(row, stats, objective, DIVERGENCE: tl.constexpr, S):
    """Pass 2, for divergences without a closed form: (D, mean of u, mean of v)."""
    b = beta_constants(objective.beta, objective.weights, S.F)
    constants = row_constants(stats, objective.tau, S.F)
    value = _zeros(row, tl.float64, S)
    mean, comean = value, value
    for start in range(0, row.columns, S.BLOCK):
        s, t = _read_both(row, start, S)
        pair = column_pair(unmasked(s), unmasked(t), constants)
        value += _sum(value_of(pair, b, DIVERGENCE))
        mean += _sum(slope_of(pair, b, DIVERGENCE))
        comean += _sum(coslope_of(pair, b, DIVERGENCE))
    return tl.sum(value, 0), tl.sum(mean, 0), tl.sum(comean, 0)


@triton.jit
def loss_of_row(row, objective, S):
    """Passes 1 and 2: (the row's loss before its coefficient, its stats, its metrics)."""
    # a mix's reverse KL comes of the first pass
    MIXED_REVERSE: tl.constexpr = mixes(S.DIVERGENCE, REVERSE_KL)
    FIRST: tl.constexpr = REVERSE_KL if MIXED_REVERSE else S.DIVERGENCE
    SECOND: tl.constexpr = S.DIVERGENCE - 2 if MIXED_REVERSE else S.DIVERGENCE
    stats, own = first_pass(row, objective.tau, FIRST, S)
    loss, kd, cross_entropy, mean = double(0.0), double(0.0), double(0.0), double(0.0)
    careful, divergence = stats.careful, stats.mean
    if row.teacher is not None:
        # A row of nothing but -inf has no distribution: it counts as masked, with loss and gradient 0.
        empty = (stats.sum_s == 0) | (stats.sum_t == 0)
        if FIRST == REVERSE_KL:
            mean = with_infinity(divergence)
        if S.DIVERGENCE >= JSD:
            value, slope, coslope = value_sums(row, stats, objective, SECOND, S)
            careful = (coslope < slope).to(tl.float64)
            second_mean = tl.where(coslope < slope, -coslope, slope)
            if MIXED_REVERSE:
                unit = member_weight(objective.weights, REVERSE_KL)
                divergence, mean = unit * divergence + value, unit * mean + second_mean
            else:
                divergence, mean = value, second_mean
        mean = tl.where(empty, 0.0, mean)
        kd = tl.where(empty, 0.0, objective.tau * objective.tau * with_infinity(divergence))
        loss = objective.kd_weight * kd
        if S.METRICS:
            own = [tl.where(empty, 0.0, x) for x in own]
    if row.label is not None:
        cross_entropy = tl.where(row.label.valid, stats.max_s - row.label.score + tl.log(stats.sum_1), float("nan"))
        loss += objective.ce_weight * cross_entropy
    stats = RowStats(stats.max_s, stats.sum_s, stats.max_t, stats.sum_t, mean, careful, stats.sum_1)
    terms = [kd, cross_entropy]
    return loss, stats, terms + own


@triton.jit
def _write_gradient_block(row, start, kd, ce, CAREFUL: tl.constexpr, MASK: tl.constexpr, S):
    column = _columns(row, start, S)
    s = _read(row.student, column, row.columns, MASK, S.F)
    g = tl.zeros_like(s)
    if row.teacher is not None:
        kd_scale, b, constants = kd
        t = _read(row.teacher, column, row.columns, MASK, S.F)
        g = kd_scale * column_gradient(s, t, b, constants, S.DIVERGENCE, CAREFUL)
    if row.label is not None:
        at_label, ce_scale, top = ce
        g += tl.where(column == row.label.column, at_label, ce_scale * tl.exp2((s - top) * LOG2E))
    write_block(row.gradient, column, row.columns, g, MASK)


@triton.jit
def write_gradient(row, stats, coefficient, objective, CAREFUL: tl.constexpr, S):
    """Pass 3: coefficient * d loss / d s."""
    max_s, sum_1, kd, ce = stats.max_s, stats.sum_1, None, None
    if row.teacher is not None:
        empty = (stats.sum_s == 0) | (stats.sum_t == 0)
        sum_s, sum_t = tl.where(empty, 1.0, stats.sum_s), tl.where(empty, 1.0, stats.sum_t)
        kd_scale = tl.where(empty, 0.0, coefficient * objective.kd_weight * objective.tau).to(S.F)
        b = beta_constants(objective.beta, objective.weights, S.F)
        unit = member_weight(objective.weights, REVERSE_KL) if mixes(S.DIVERGENCE, REVERSE_KL) else double(1.0)
        stats = RowStats(max_s, sum_s, stats.max_t, sum_t, stats.mean, stats.careful, sum_1)
        kd = kd_scale, b, row_constants(stats, objective.tau, S.F, unit)
    if row.label is not None:
        # The label's own column is done apart and in fp64: softmax - 1 would lose every digit of a confident student.
        ce_scale = tl.where(sum_1 == 0, 0.0, coefficient * objective.ce_weight / tl.where(sum_1 == 0, 1.0, sum_1))
        at_label = tl.where(row.label.valid, ce_scale * (tl.exp(row.label.score - max_s) - sum_1), float("nan"))
        ce = tl.where(sum_1 == 0, 0.0, at_label).to(S.F), ce_scale.to(S.F), max_s.to(S.F)
    whole = row.columns - row.columns % S.BLOCK
    for start in range(0, whole, S.BLOCK):
        _write_gradient_block(row, start, kd, ce, CAREFUL, False, S)
    if whole < row.columns:
        _write_gradient_block(row, whole, kd, ce, CAREFUL, True, S)
