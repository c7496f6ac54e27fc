"""linear_kl in Triton, for GPUs: row statistics and gradients of scores that are never written.

The scores of a tile, [BLOCK_M, BLOCK_N] tokens by vocabulary, are two products of hidden states and weights, one for
each model, that stay in registers. Programs are persistent: each takes items of work, a block of tokens and a stretch
of the vocabulary, and goes through the stretch in tiles.

- `statistics_kernel` keeps the running maxima and sums of exponentials of an item's rows, of both models at once.
- `combine_kernel` merges the stretches of each row, always in the same order, and has the loss and the statistics of
  kernels/rows.py, whose gradient could continue from them.
- `values_kernel` and `combine_values_kernel` take the second look that divergences without a closed form need.
- `gradient_kernel` multiplies once more and writes the gradient of the scores, the operand of the GEMMs that follow.

The mathematics is that of kernels/rows.py, row by row of a tile, and so is the care: a tile's sums are taken in the
working precision and added up in fp64; where both models nearly agree the student's sum is the teacher's plus the
summed difference, and a moment is summed up as p log(p / q) + q - p. There are two differences. The reference that
exponentials are taken against follows a row's maximum only where that has moved by more than SLACK, since rescaling
takes fp64 exponentials of every row. And the mean of reverse KL is not refined by another pass: scores are results of
fp32 arithmetic here, and one so large is known no better than they are.

Hidden states of a token whose coefficient is 0 are not read. 16-bit operands are multiplied as they are and summed up
in fp32; others in full, which no tensor core does.

T tokens, V vocabulary, Hs and Ht hidden widths. The widths are constants of the kernels, tokens and vocabulary not.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    FORWARD_KL,
    INTERPRETED,
    JSD,
    MIX,
    REVERSE_KL,
    _beta_constants,
    _coslope,
    _double,
    _excess,
    _rounded,
    _slope,
    _unmasked,
    _value,
    _with_infinity,
    beta_arguments,
)
from .rows import (
    LOWEST,
    NEARLY_EQUAL,
    _finite,
    _gradient_of,
    _mean_unit,
    _pair,
    _rescale,
    _row_constants,
    _running_constants,
)
from .tuning import launch

__all__ = ["gradient", "statistics"]

# How far a row's maximum may pass the reference of its exponentials, in units of score over temperature: e^4 costs
# their arguments two bits.
SLACK = tl.constexpr(4.0)
# What a stretch leaves of a row: max_s, sum_s, max_t, sum_t, moment, sum_1 without the label's exponential, the label's
# score. And of the second look: value, mean, comean.
PARTIAL = tl.constexpr(7)
VALUES = tl.constexpr(3)
STATS = tl.constexpr(7)

# ---- scores ----------------------------------------------------------------------------------------------------------
# A model is (hidden [T, H], its row stride, weight [V, H], its row stride, bias [V] or None, scale), or None.


@triton.jit
def _product(
    model,
    row_start,
    used,
    column_start,
    exists,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    F: tl.constexpr,
):
    """hidden @ weight.T of a tile, [used, exists]; rows and columns outside are not read and count as zeros."""
    hidden, hidden_stride, weight, weight_stride, _, _ = model
    row, column, k = tl.arange(0, used.shape[0]), tl.arange(0, exists.shape[0]), tl.arange(0, BLOCK_K)
    x_pointers = hidden + tl.cast(row_start, tl.int64) * hidden_stride
    x_pointers += row[:, None] * hidden_stride + k[None, :]
    w_pointers = weight + tl.cast(column_start, tl.int64) * weight_stride
    w_pointers += column[None, :] * weight_stride + k[:, None]
    total = tl.zeros((used.shape[0], exists.shape[0]), F)
    for start in range(0, WIDTH, BLOCK_K):
        x_used, w_used = used[:, None], exists[None, :]
        if WIDTH % BLOCK_K != 0:
            x_used, w_used = x_used & (k < WIDTH - start)[None, :], w_used & (k < WIDTH - start)[:, None]
        x, w = tl.load(x_pointers + start, mask=x_used, other=0), tl.load(w_pointers + start, mask=w_used, other=0)
        if x.dtype == tl.float64 or tl.float64 == F or INTERPRETED:
            x, w = x.to(F), w.to(F)
        total = tl.dot(x, w, total, input_precision="ieee", out_dtype=F)
    return total


@triton.jit
def _scores(
    model,
    row_start,
    used,
    column_start,
    columns,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    F: tl.constexpr,
):
    """Scores of a tile, [BLOCK_M, BLOCK_N]; -inf past the end of the vocabulary."""
    column = column_start + tl.arange(0, BLOCK_N)
    exists = column < columns
    scores = _product(model, row_start, used, column_start, exists, WIDTH, BLOCK_K, F) * _double(model[5]).to(F)
    if model[4] is not None:
        scores += tl.load(model[4] + column, mask=exists, other=0).to(F)[None, :]
    if column_start + BLOCK_N > columns:  # seldom, and what it needs would take registers from all other tiles
        scores = tl.where(exists[None, :], scores, LOWEST)
    return scores


@triton.jit
def _item(item, row_blocks, stretch, columns, coefficient, tokens, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """An item of work: (first token, tokens, which of them exist, which are not dropped, number, first, end of stretch)

    Items that come together go through the same stretch, so that the second-level cache has its weights for all.
    """
    row_start, number = item % row_blocks * BLOCK_M, item // row_blocks
    row = row_start + tl.arange(0, BLOCK_M)
    exists = row < tokens
    used = tl.load(coefficient + row, mask=exists, other=0) != 0
    first = number * stretch * BLOCK_N
    end = tl.where(tl.max(used.to(tl.int32), 0) == 0, first, tl.minimum(first + stretch * BLOCK_N, columns))
    return row_start, row, exists, used, number, first, end


@triton.jit
def _load_labels(labels, row, used, columns):
    """(label's column, or 0, whether there is such a column) of rows"""
    label = tl.load(labels + row, mask=used, other=0)
    valid = (label >= 0) & (label < columns)
    return tl.where(valid, label, 0), valid


@triton.jit
def _row_sum(x):
    return tl.sum(x, 1).to(tl.float64)


@triton.jit
def _load_stats(stats, row, used):
    """Statistics of rows, [BLOCK_M, 1] each; of dropped ones such that nothing is divided by zero."""
    pointers = stats + row * STATS
    return (
        tl.load(pointers, mask=used, other=0)[:, None],
        tl.load(pointers + 1, mask=used, other=1)[:, None],
        tl.load(pointers + 2, mask=used, other=0)[:, None],
        tl.load(pointers + 3, mask=used, other=1)[:, None],
        tl.load(pointers + 4, mask=used, other=0)[:, None],
        tl.load(pointers + 5, mask=used, other=0)[:, None],
        tl.load(pointers + 6, mask=used, other=1)[:, None],
    )


@triton.jit
def _not_empty(stats):
    """Sums of a row of nothing but -inf are 0: it has no distribution, and counts as masked."""
    max_s, sum_s, max_t, sum_t, mean, saturated, sum_1 = stats
    empty = (sum_s == 0) | (sum_t == 0)
    return empty, (max_s, tl.where(empty, 1.0, sum_s), max_t, tl.where(empty, 1.0, sum_t), mean, saturated, sum_1)


# ---- statistics ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens", "columns", "row_blocks", "items", "stretch"])
def statistics_kernel(
    student,
    teacher,
    coefficient,  # [T]
    labels,  # [T], or None
    partials,  # [stretches, PARTIAL, T]
    tokens,
    columns,
    row_blocks,
    items,
    stretch,  # tiles
    tau: tl.float64,
    DIVERGENCE: tl.constexpr,
    SEPARATE: tl.constexpr,  # whether the cross-entropy needs exponentials of its own
    WIDTH_S: tl.constexpr,
    WIDTH_T: tl.constexpr,  # 0 without a teacher
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    F: tl.constexpr,
):
    """What a stretch of the vocabulary adds to the statistics of rows: `_statistics` of kernels/rows.py, by tiles."""
    BY_STUDENT: tl.constexpr = DIVERGENCE == REVERSE_KL
    one, inv_tau = _double(1.0), 1 / _double(tau)
    slack = (_double(tau) * SLACK).to(F)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        row_start, row, row_exists, used, number, first, end = _item(
            item, row_blocks, stretch, columns, coefficient, tokens, BLOCK_M, BLOCK_N
        )
        if labels is not None:
            label = _load_labels(labels, row, used, columns)[0]
        zeros = tl.zeros((BLOCK_M,), tl.float64)
        max_s, max_t = tl.full((BLOCK_M,), LOWEST, F), tl.full((BLOCK_M,), LOWEST, F)
        sum_s, sum_t, moment, sum_1, label_score = zeros, zeros, zeros, zeros, tl.zeros((BLOCK_M,), F)
        for start in range(first, end, BLOCK_N):
            s = _scores(student, row_start, used, start, columns, WIDTH_S, BLOCK_N, BLOCK_K, F)
            found_s = tl.max(s, 1)
            move_s, move_t = found_s > max_s + slack, used & False
            found_t = found_s
            if WIDTH_T != 0:
                t = _scores(teacher, row_start, used, start, columns, WIDTH_T, BLOCK_N, BLOCK_K, F)
                found_t = tl.max(t, 1)
                move_t = found_t > max_t + slack
            if tl.max((move_s | move_t).to(tl.int32), 0) != 0:  # seldom after the first few tiles
                before_s, before_t = max_s.to(tl.float64), max_t.to(tl.float64)
                max_s, max_t = tl.where(move_s, found_s, max_s), tl.where(move_t, found_t, max_t)
                now_s, now_t = max_s.to(tl.float64), max_t.to(tl.float64)
                sum_1 *= _rescale(before_s, now_s, one)
                if WIDTH_T != 0:
                    s_factor, t_factor = _rescale(before_s, now_s, inv_tau), _rescale(before_t, now_t, inv_tau)
                    # log(p / q) is relative to both references, so its moment follows when either moves
                    moved = inv_tau * (_finite(before_t) - _finite(before_s) - _finite(now_t) + _finite(now_s))
                    moment = s_factor * (moment - sum_s * moved) if BY_STUDENT else t_factor * (moment + sum_t * moved)
                    sum_s *= s_factor
                    sum_t *= t_factor

            top_s, top_t = _finite(max_s)[:, None], _finite(max_t)[:, None]
            if labels is not None:
                at_label = label[:, None] == (start + tl.arange(0, BLOCK_N))[None, :]
                label_score += tl.sum(tl.where(at_label, s, 0), 1)  # of one number
            s = _unmasked(s)
            if labels is not None and (SEPARATE or WIDTH_T == 0):
                sum_1 += _row_sum(tl.where(at_label, 0, tl.exp(s - top_s)))
            if WIDTH_T != 0:
                constants = _running_constants(top_s.to(tl.float64), top_t.to(tl.float64), inv_tau, F)
                pair = _pair(s, _unmasked(t), constants)
                p, q, difference, log_ratio = pair[0], pair[1], pair[2], pair[3]
                student_sum, teacher_sum, gap = _row_sum(q), _row_sum(p), _row_sum(difference)
                nearly_equal = tl.abs(gap) < teacher_sum * NEARLY_EQUAL
                sum_s += tl.where(nearly_equal, teacher_sum + gap, student_sum)
                sum_t += teacher_sum
                if labels is not None and not SEPARATE:
                    sum_1 += _row_sum(tl.where(at_label, 0, q))
                if DIVERGENCE == FORWARD_KL:
                    near, far = _row_sum(_excess(p, q, log_ratio)) - gap, _row_sum(p * log_ratio)
                    moment += tl.where(nearly_equal, near, far)
                elif DIVERGENCE == REVERSE_KL:
                    near, far = _row_sum(_excess(q, p, -log_ratio)) + gap, _row_sum(-q * log_ratio)
                    moment += tl.where(nearly_equal, near, far)

        out = partials + tl.cast(number, tl.int64) * PARTIAL * tokens + row
        tl.store(out, max_s.to(tl.float64), mask=row_exists)
        tl.store(out + tokens, sum_s, mask=row_exists)
        tl.store(out + 2 * tokens, max_t.to(tl.float64), mask=row_exists)
        tl.store(out + 3 * tokens, sum_t, mask=row_exists)
        tl.store(out + 4 * tokens, moment, mask=row_exists)
        tl.store(out + 5 * tokens, sum_1, mask=row_exists)
        tl.store(out + 6 * tokens, label_score.to(tl.float64), mask=row_exists)


@triton.jit
def _store_stats(stats, row, exists, alive, row_stats):
    for i in tl.static_range(STATS):
        tl.store(stats + row * STATS + i, tl.where(alive, row_stats[i], 0), mask=exists)


@triton.jit(do_not_specialize=["tokens", "columns", "stretches"])
def combine_kernel(
    partials,  # [stretches, PARTIAL, T]
    coefficient,  # [T]
    labels,  # [T], or None
    loss,  # [T]
    stats,  # [T, STATS]
    label_scores,  # [T], or None
    tokens,
    columns,
    stretches,
    tau: tl.float64,
    kd_weight: tl.float64,
    ce_weight: tl.float64,
    DIVERGENCE: tl.constexpr,
    TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The statistics of a block of rows and, but for what a second look has to say, their losses."""
    BY_STUDENT: tl.constexpr = DIVERGENCE == REVERSE_KL
    tau, kd_weight, ce_weight, one = _double(tau), _double(kd_weight), _double(ce_weight), _double(1.0)
    inv_tau = 1 / tau
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = row < tokens
    weight = tl.load(coefficient + row, mask=exists, other=0)
    alive = weight != 0
    zeros = tl.zeros((BLOCK,), tl.float64)
    max_s, max_t = zeros + LOWEST, zeros + LOWEST
    sum_s, sum_t, moment, sum_1, score = zeros, zeros, zeros, zeros, zeros
    for n in range(stretches):
        part = partials + tl.cast(n, tl.int64) * PARTIAL * tokens + row
        part_s, part_t = tl.load(part, mask=exists), tl.load(part + 2 * tokens, mask=exists)
        top_s, top_t = tl.maximum(max_s, part_s), tl.maximum(max_t, part_t)
        before, now = _finite(max_t) - _finite(max_s), _finite(top_t) - _finite(top_s)
        moved, part_moved = inv_tau * (before - now), inv_tau * (_finite(part_t) - _finite(part_s) - now)
        factor_s, factor_t = _rescale(max_s, top_s, inv_tau), _rescale(max_t, top_t, inv_tau)
        part_factor_s, part_factor_t = _rescale(part_s, top_s, inv_tau), _rescale(part_t, top_t, inv_tau)
        part_sum_s, part_sum_t = tl.load(part + tokens, mask=exists), tl.load(part + 3 * tokens, mask=exists)
        part_moment = tl.load(part + 4 * tokens, mask=exists)
        if BY_STUDENT:
            moment = factor_s * (moment - sum_s * moved) + part_factor_s * (part_moment - part_sum_s * part_moved)
        else:
            moment = factor_t * (moment + sum_t * moved) + part_factor_t * (part_moment + part_sum_t * part_moved)
        sum_s = factor_s * sum_s + part_factor_s * part_sum_s
        sum_t = factor_t * sum_t + part_factor_t * part_sum_t
        part_sum_1 = tl.load(part + 5 * tokens, mask=exists)
        sum_1 = _rescale(max_s, top_s, one) * sum_1 + _rescale(part_s, top_s, one) * part_sum_1
        score += tl.load(part + 6 * tokens, mask=exists)
        max_s, max_t = top_s, top_t

    max_s, max_t = _finite(max_s), _finite(max_t)
    row_loss, mean = zeros, zeros
    if TEACHER:
        empty, full = _not_empty((max_s, sum_s, max_t, sum_t, mean, zeros, sum_1))
        full_s, full_t = full[1], full[3]
        log_sums = tl.log(full_s / full_t)
        if DIVERGENCE == FORWARD_KL:
            row_loss = moment / full_t + log_sums
        elif DIVERGENCE == REVERSE_KL:
            row_loss = moment / full_s - log_sums
            mean = tl.where(empty, 0.0, _with_infinity(row_loss))
        row_loss = tl.where(empty, 0.0, kd_weight * tau * tau * _with_infinity(row_loss))
    if labels is not None:
        _, valid = _load_labels(labels, row, alive, columns)
        # The label's own exponential comes last and in fp64: beside it the others of a confident student would vanish.
        sum_1 += tl.exp(score - max_s)
        row_loss += ce_weight * tl.where(valid, max_s - score + tl.log(sum_1), float("nan"))
        tl.store(label_scores + row, tl.where(alive, score, 0), mask=exists)
    tl.store(loss + row, tl.where(alive, weight * row_loss, 0), mask=exists)
    _store_stats(stats, row, exists, alive, (max_s, sum_s, max_t, sum_t, mean, zeros, sum_1))


@triton.jit(do_not_specialize=["tokens", "columns", "row_blocks", "items", "stretch"])
def values_kernel(
    student,
    teacher,
    coefficient,  # [T]
    stats,  # [T, STATS]
    partials,  # [stretches, VALUES, T]
    tokens,
    columns,
    row_blocks,
    items,
    stretch,  # tiles
    weights,  # of a mix, or None
    beta: tl.float64,
    tau: tl.float64,
    DIVERGENCE: tl.constexpr,
    WIDTH_S: tl.constexpr,
    WIDTH_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    F: tl.constexpr,
):
    """What a stretch adds to D and to the mean of u, from normalised probabilities."""
    b, tau = _beta_constants(beta, weights, F), _double(tau)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        row_start, row, row_exists, used, number, first, end = _item(
            item, row_blocks, stretch, columns, coefficient, tokens, BLOCK_M, BLOCK_N
        )
        _, row_stats = _not_empty(_load_stats(stats, row, used))
        constants = _row_constants(row_stats, tau, 1.0, F)
        zeros = tl.zeros((BLOCK_M,), tl.float64)
        value, mean, comean = zeros, zeros, zeros
        for start in range(first, end, BLOCK_N):
            s = _scores(student, row_start, used, start, columns, WIDTH_S, BLOCK_N, BLOCK_K, F)
            t = _scores(teacher, row_start, used, start, columns, WIDTH_T, BLOCK_N, BLOCK_K, F)
            pair = _pair(_unmasked(s), _unmasked(t), constants)
            value += _row_sum(_value(pair, b, DIVERGENCE))
            mean += _row_sum(_slope(pair, b, DIVERGENCE))
            comean += _row_sum(_coslope(pair, b, DIVERGENCE))
        out = partials + tl.cast(number, tl.int64) * VALUES * tokens + row
        tl.store(out, value, mask=row_exists)
        tl.store(out + tokens, mean, mask=row_exists)
        tl.store(out + 2 * tokens, comean, mask=row_exists)


@triton.jit(do_not_specialize=["tokens", "stretches"])
def combine_values_kernel(
    partials,  # [stretches, VALUES, T]
    coefficient,  # [T]
    loss,  # [T]
    stats,  # [T, STATS]
    tokens,
    stretches,
    factor: tl.float64,  # kd_weight * tau^2
    BLOCK: tl.constexpr,
):
    """Adds what the second look found to losses and statistics."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = row < tokens
    weight = tl.load(coefficient + row, mask=exists, other=0)
    alive = weight != 0
    value, mean = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    comean = tl.zeros((BLOCK,), tl.float64)
    for n in range(stretches):
        part = partials + tl.cast(n, tl.int64) * VALUES * tokens + row
        value += tl.load(part, mask=exists)
        mean += tl.load(part + tokens, mask=exists)
        comean += tl.load(part + 2 * tokens, mask=exists)
    max_s, sum_s, max_t, sum_t = (
        tl.load(stats + row * STATS, mask=exists),
        tl.load(stats + row * STATS + 1, mask=exists),
        tl.load(stats + row * STATS + 2, mask=exists),
        tl.load(stats + row * STATS + 3, mask=exists),
    )
    sum_1 = tl.load(stats + row * STATS + 6, mask=exists)
    counts = alive & (sum_s != 0) & (sum_t != 0)
    saturated = comean < mean
    mean = tl.where(counts, tl.where(saturated, -comean, mean), 0)
    added = tl.where(counts, weight * _double(factor) * _with_infinity(value), 0)
    tl.store(loss + row, tl.load(loss + row, mask=exists) + added, mask=exists)
    _store_stats(stats, row, exists, alive, (max_s, sum_s, max_t, sum_t, mean, saturated.to(tl.float64), sum_1))


# ---- gradient --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens", "columns", "row_blocks", "items", "stretch", "offset"])
def gradient_kernel(
    student,
    teacher,
    stats,  # [T, STATS]
    coefficient,  # [T]
    labels,  # [T], or None
    label_scores,  # [T], or None
    gradient,  # [T, count]
    gradient_stride,
    tokens,
    columns,
    offset,  # the first column that is wanted
    count,
    row_blocks,
    items,
    stretch,
    weights,  # of a mix, or None
    beta: tl.float64,
    tau: tl.float64,
    kd_weight: tl.float64,
    ce_weight: tl.float64,
    DIVERGENCE: tl.constexpr,
    WIDTH_S: tl.constexpr,
    WIDTH_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    F: tl.constexpr,
):
    """coefficient * d loss / d s of the columns from `offset` on: `_gradient` of kernels/rows.py, by tiles."""
    tau, kd_weight, ce_weight = _double(tau), _double(kd_weight), _double(ce_weight)
    b, unit = _beta_constants(beta, weights, F), _mean_unit(weights, DIVERGENCE)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        row_start, row, row_exists, used, number, _, _ = _item(
            item, row_blocks, stretch, count, coefficient, tokens, BLOCK_M, BLOCK_N
        )
        first = number * stretch * BLOCK_N  # also of tokens that are all dropped: their gradient is written
        weight = tl.load(coefficient + row, mask=row_exists, other=0)[:, None]
        empty, row_stats = _not_empty(_load_stats(stats, row, used))
        if WIDTH_T != 0:
            constants = _row_constants(row_stats, tau, unit, F)
            kd_scale = tl.where(empty, 0.0, weight * kd_weight * tau).to(F)
        if labels is not None:
            # The label's own column is done apart and in fp64: softmax - 1 would lose every digit of a confident one.
            label, valid = _load_labels(labels, row, used, columns)
            score = tl.load(label_scores + row, mask=used, other=0)[:, None]
            top_s, sum_1 = row_stats[0], row_stats[6]
            ce_scale = tl.where(sum_1 == 0, 0.0, weight * ce_weight / tl.where(sum_1 == 0, 1.0, sum_1))
            at_label = tl.where(valid[:, None], ce_scale * (tl.exp(score - top_s) - sum_1), float("nan"))
            at_label = tl.where(sum_1 == 0, 0.0, at_label).to(F)
            ce_scale, top_s = ce_scale.to(F), top_s.to(F)
        for start in range(first, tl.minimum(first + stretch * BLOCK_N, count), BLOCK_N):
            s = _unmasked(_scores(student, row_start, used, offset + start, columns, WIDTH_S, BLOCK_N, BLOCK_K, F))
            g = tl.zeros_like(s)
            if WIDTH_T != 0:
                t = _scores(teacher, row_start, used, offset + start, columns, WIDTH_T, BLOCK_N, BLOCK_K, F)
                t = _unmasked(t)
                g = _gradient_of(s, t, b, constants, DIVERGENCE, False)
                if DIVERGENCE >= JSD:
                    g = tl.where(row_stats[5] != 0, _gradient_of(s, t, b, constants, DIVERGENCE, True), g)
                g *= kd_scale
            column = start + tl.arange(0, BLOCK_N)
            if labels is not None:
                here = label[:, None] == offset + column[None, :]
                g += tl.where(here, at_label, ce_scale * tl.exp(s - top_s))
            g = tl.where(used[:, None], g, 0)
            pointers = gradient + tl.cast(row_start, tl.int64) * gradient_stride + start
            pointers += tl.arange(0, BLOCK_M)[:, None] * gradient_stride + tl.arange(0, BLOCK_N)[None, :]
            exists = row_exists[:, None] & (column < count)[None, :]
            tl.store(pointers, _rounded(g, gradient.dtype.element_ty), mask=exists)


# ---- launch ----------------------------------------------------------------------------------------------------------
# Rows that a program of the combining kernels takes.
COMBINED = 64
# Stretches that the vocabulary is cut into at most.
STRETCHES = 64


T = TypeVar("T")
# One model's head and what goes into it: hidden [T, H], weight [V, H], bias [V] or None, scale.
Model = tuple[Tensor, Tensor, Tensor | None, float]


def _arguments(model: Model | None) -> tuple | None:
    """As the kernels take it."""
    if model is None:
        return None
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in model[:2])
    bias = None if model[2] is None else model[2].contiguous()
    return hidden, hidden.stride(0), weight, weight.stride(0), bias, float(model[3])


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def _stretches(row_blocks: int, tiles: int, processors: int) -> int:
    """Into how many stretches the vocabulary is cut: as few as keep the processors nearly as busy as any number does.

    A processor's time is that of ceil(row_blocks * n / processors) items of ceil(tiles / n) tiles.
    """
    busy = {n: triton.cdiv(row_blocks * n, processors) * triton.cdiv(tiles, n) for n in range(1, STRETCHES + 1)}
    least = min(busy.values())
    return next(n for n, time in busy.items() if time <= 1.05 * least)


def _by_table(student: Model, teacher: Model | None, columns: int, divergence: int, run: Callable[[dict], T]) -> T:
    """run(tile and launch options)"""
    dtypes = [model[0].dtype for model in (student, teacher) if model is not None]
    kernel = "mix_scores" if divergence >= MIX.value else "mixture_scores" if divergence >= JSD.value else "scores"
    shapes = [tuple(x.shape) for model in (student, teacher) if model is not None for x in model[:2]]
    return launch(kernel, max(dtype.itemsize for dtype in dtypes), 0, (*dtypes, *shapes, columns), run)


def _work(student: Model, teacher: Model | None, columns: int, options: dict) -> tuple[int, dict, dict]:
    """(programs, how the work on `columns` columns is divided, constants and launch options)"""
    row_blocks = triton.cdiv(student[0].shape[0], options["BLOCK_M"])
    tiles = triton.cdiv(columns, options["BLOCK_N"])
    processors = _processors(student[0])
    stretch = triton.cdiv(tiles, _stretches(row_blocks, tiles, processors))
    items = row_blocks * triton.cdiv(tiles, stretch)
    divided = {"row_blocks": row_blocks, "items": items, "stretch": stretch}
    constants = options | {
        "WIDTH_S": student[0].shape[1],
        "WIDTH_T": 0 if teacher is None else teacher[0].shape[1],
        "F": tl.float64 if student[0].dtype == torch.float64 else tl.float32,
    }
    return min(items, processors), divided, constants


def statistics(
    student: Model,
    teacher: Model | None,
    columns: int,
    coefficient: Tensor,  # [T] float64
    labels: Tensor | None,  # [T] int64
    loss: Tensor,  # [T] float64
    divergence: int,
    beta: float | Sequence[float],
    temperature: float,
    kd_weight: float,
    ce_weight: float,
) -> tuple[Tensor, Tensor | None]:
    """Writes every token's loss; returns statistics [T, 7] as kernels/rows.py has them, and the labels' scores [T]."""
    tokens = coefficient.shape[0]
    stats = coefficient.new_empty(tokens, STATS.value)
    label_scores = None if labels is None else torch.empty_like(coefficient)
    models = _arguments(student), _arguments(teacher)
    common = {"tokens": tokens, "columns": columns, "tau": float(temperature), "DIVERGENCE": divergence}
    combined = (triton.cdiv(tokens, COMBINED),)

    def run(options: dict) -> None:
        programs, divided, constants = _work(student, teacher, columns, options)
        stretches = divided["items"] // divided["row_blocks"]
        partials = coefficient.new_empty(stretches, PARTIAL.value, tokens)
        statistics_kernel[(programs,)](
            *models, coefficient, labels, partials, SEPARATE=temperature != 1, **common, **divided, **constants
        )
        combine_kernel[combined](
            partials,
            coefficient,
            labels,
            loss,
            stats,
            label_scores,
            stretches=stretches,
            kd_weight=float(kd_weight),
            ce_weight=float(ce_weight),
            TEACHER=teacher is not None,
            BLOCK=COMBINED,
            num_warps=2,
            **common,
        )
        if teacher is not None and divergence >= JSD.value:
            partials = partials.view(-1)[: stretches * VALUES.value * tokens]
            values_kernel[(programs,)](
                *models, coefficient, stats, partials, **beta_arguments(beta), **common, **divided, **constants
            )
            factor = float(kd_weight * temperature**2)
            combine_values_kernel[combined](
                partials, coefficient, loss, stats, tokens, stretches, factor, BLOCK=COMBINED, num_warps=2
            )

    with torch.cuda.device_of(coefficient):
        _by_table(student, teacher, columns, divergence, run)
    return stats, label_scores


def gradient(
    student: Model,
    teacher: Model | None,
    columns: int,
    coefficient: Tensor,  # [T] float64
    labels: Tensor | None,  # [T] int64
    stats: Tensor,  # [T, 7]
    label_scores: Tensor | None,  # [T]
    offset: int,
    out: Tensor,  # [T, count]
    divergence: int,
    beta: float | Sequence[float],
    temperature: float,
    kd_weight: float,
    ce_weight: float,
) -> None:
    """Writes coefficient * d loss / d score of the columns from `offset` on, in the dtype of `out`."""
    tokens, count = out.shape
    models = _arguments(student), _arguments(teacher)

    def run(options: dict) -> None:
        programs, divided, constants = _work(student, teacher, count, options)
        gradient_kernel[(programs,)](
            *models,
            stats,
            coefficient,
            labels,
            label_scores,
            out,
            out.stride(0),
            tokens,
            columns,
            offset,
            count,
            **beta_arguments(beta),
            tau=float(temperature),
            kd_weight=float(kd_weight),
            ce_weight=float(ce_weight),
            DIVERGENCE=divergence,
            **divided,
            **constants,
        )

    with torch.cuda.device_of(out):
        _by_table(student, teacher, count, divergence, run)
