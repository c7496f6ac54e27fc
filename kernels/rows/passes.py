"""One row in passes over its blocks of columns: statistics, values, loss and gradient."""

import triton
import triton.language as tl

from ..common import (
    FORWARD_KL,
    JSD,
    LOG2E,
    MIX,
    REVERSE_KL,
    beta_constants,
    coslope_of,
    double,
    member_weight,
    slope_of,
    unmasked,
    value_of,
    with_infinity,
)
from .column import (
    ELSEWHERE,
    FAR_APART,
    LOWEST,
    NEARLY_EQUAL,
    NOTHING,
    column_gradient,
    column_pair,
    mean_unit,
    row_constants,
    running_constants,
)

# A row of a matrix is (pointer, column stride, whether all rows begin at multiples of 16 bytes). The teacher's may be
# None, and so may the label: (column, whether there is such a column, the student's score in it).


@triton.jit
def label_of(student, label, columns):
    """A row's label; of one that is elsewhere column -1, in which no share of the sums and of the gradient is."""
    pointer, stride, _ = student
    valid = (label >= 0) & (label < columns)
    elsewhere = label == ELSEWHERE
    column = tl.where(valid, label, 0)
    score = tl.load(pointer + column * stride).to(tl.float64)
    return tl.where(elsewhere, -1, column).to(tl.int32), valid, tl.where(elsewhere, LOWEST, score)


@triton.jit
def _columns(row, start, BLOCK: tl.constexpr):
    """A block's [groups, columns of 16 bytes]. A thread has a group to itself, and sums it up without the others.

    A group lies side by side where a thread can read it at once, and else with its neighbours between.
    """
    WIDTH: tl.constexpr = 128 // row[0].dtype.element_ty.primitive_bitwidth
    GROUPS: tl.constexpr = BLOCK // WIDTH
    group, inside = tl.arange(0, GROUPS)[:, None], tl.arange(0, WIDTH)[None, :]
    return start + (group * WIDTH + inside if row[2] else inside * GROUPS + group)


@triton.jit
def _zeros(row, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """One for each group."""
    return tl.zeros((BLOCK * row[0].dtype.element_ty.primitive_bitwidth // 128,), DTYPE)


@triton.jit
def _read(row, column, columns, MASK: tl.constexpr, F: tl.constexpr):
    """Scores in the working precision; -inf past the end of the row. Without MASK all columns are before it.

    Offsets pass 2^31 in transposed matrices.
    """
    pointers = row[0] + column.to(tl.int64) * row[1]
    x = tl.load(pointers, mask=column < columns, other=LOWEST) if MASK else tl.load(pointers)
    return x.to(F)


@triton.jit
def write_block(row, column, columns, x, MASK: tl.constexpr):
    pointers, x = row[0] + column.to(tl.int64) * row[1], x.to(row[0].dtype.element_ty)
    if MASK:
        tl.store(pointers, x, mask=column < columns)
    else:
        tl.store(pointers, x)


@triton.jit
def _sum(x):
    """Of each group."""
    return tl.sum(x, 1).to(tl.float64)


@triton.jit
def _total(x, factor):
    return tl.sum(x.to(tl.float64) * factor.to(tl.float64), 0)


@triton.jit
def _position(row, tops, blocks, top, columns, F: tl.constexpr, BLOCK: tl.constexpr):
    """The column, from 1, of the first score that is the maximum, from each group's and the blocks that they are in."""
    column = tl.min(tl.where(tops == top, blocks, columns), 0) + tl.arange(0, BLOCK)
    x = _read(row, column, columns, True, F)
    return (tl.min(tl.where(x == top, column, columns), 0) + 1).to(tl.float64)


@triton.jit
def _entropy(own, exponentials):
    """In nats, from the sum e log e of exponentials e and their sum; 0 where there are none."""
    exponentials = tl.where(exponentials == 0, 1.0, exponentials)
    entropy = tl.log(exponentials) - own / exponentials
    return tl.where(entropy < 0, 0.0, entropy)


@triton.jit
def _grown(
    sums, student, teacher, label, start, columns, scale, BY_STUDENT: tl.constexpr, SEPARATE: tl.constexpr,
    METRICS: tl.constexpr, MASK: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each group's running maxima, and sums relative to them, by a block more."""
    max_s, max_t, sum_s, sum_t, moment, sum_1, own_s, own_t, block_s, block_t = sums
    column = _columns(student, start, BLOCK)
    x = unmasked(_read(student, column, columns, MASK, F))
    before, max_s = max_s, tl.maximum(max_s, tl.max(x, 1))
    down_s, x = before - max_s, x - max_s[:, None]
    s_factor, q = tl.exp2(down_s * scale), tl.exp2(x * scale)
    if label is not None:
        factor, e = (tl.exp2(down_s * LOG2E), tl.exp2(x * LOG2E)) if SEPARATE else (s_factor, q)
        sum_1 = sum_1 * factor + tl.sum(tl.where(column == label[0], 0, e), 1)
    if teacher is not None:
        y = unmasked(_read(teacher, column, columns, MASK, F))
        before, max_t = max_t, tl.maximum(max_t, tl.max(y, 1))
        down_t, y = before - max_t, y - max_t[:, None]
        t_factor, p = tl.exp2(down_t * scale), tl.exp2(y * scale)
        # log(p / q) is relative to both maxima, so its moment follows when either moves
        if BY_STUDENT:
            moment = s_factor * (moment + sum_s * (down_s - down_t)) + tl.sum(q * (x - y), 1)
        else:
            moment = t_factor * (moment + sum_t * (down_t - down_s)) + tl.sum(p * (y - x), 1)
        if METRICS:  # logarithms are lower by what the maximum is higher
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
def _careful_sums(
    student, teacher, columns, max_s, max_t, inv_tau, BY_STUDENT: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr
):
    """(sum_s, sum_t, D) of a row whose models nearly agree, where both are small differences of what is summed up."""
    row = running_constants(max_s, max_t, inv_tau, F)
    sum_t = _zeros(student, tl.float64, BLOCK)
    gap, excess = sum_t, sum_t
    for start in range(0, columns, BLOCK):
        column = _columns(student, start, BLOCK)
        s, t = unmasked(_read(student, column, columns, True, F)), unmasked(_read(teacher, column, columns, True, F))
        pair = column_pair(s, t, row)
        sum_t += _sum(pair.p)
        gap += _sum(pair.difference)
        excess += _sum(value_of(pair, (), REVERSE_KL if BY_STUDENT else FORWARD_KL))
    sum_t, gap, excess = tl.sum(sum_t, 0), tl.sum(gap, 0), tl.sum(excess, 0)
    sum_s = sum_t + gap
    moment = excess + gap if BY_STUDENT else excess - gap
    return sum_s, sum_t, _divergence(moment, sum_s, sum_t, BY_STUDENT)


@triton.jit
def first_pass(
    student, teacher, label, columns, tau, DIVERGENCE: tl.constexpr,
    SEPARATE: tl.constexpr,  # whether the cross-entropy needs exponentials of its own
    METRICS: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass 1: the row's statistics, and D where they give it: (D, stats, entropies and highest columns)."""
    BY_STUDENT: tl.constexpr = DIVERGENCE == REVERSE_KL
    zero, scale = double(0.0), (1 / tau * LOG2E).to(F)
    none, block = _zeros(student, F, BLOCK), _zeros(student, tl.int32, BLOCK)
    sums = (none + NOTHING, none + NOTHING, none, none, none, none, none, none, block, block)
    whole = columns - columns % BLOCK
    for start in range(0, whole, BLOCK):
        sums = _grown(
            sums, student, teacher, label, start, columns, scale, BY_STUDENT, SEPARATE, METRICS, False, F, BLOCK
        )
    if whole < columns:
        sums = _grown(
            sums, student, teacher, label, whole, columns, scale, BY_STUDENT, SEPARATE, METRICS, True, F, BLOCK
        )
    tops_s, tops_t, sum_s, sum_t, moment, sum_1, own_s, own_t, block_s, block_t = sums
    max_s, max_t = tl.max(tops_s, 0), tl.max(tops_t, 0)
    down_s, down_t = tops_s - max_s, tops_t - max_t
    s_factor, t_factor = tl.exp2(down_s * scale), tl.exp2(down_t * scale)
    unit = scale.to(tl.float64) / LOG2E  # 1 / tau as the exponents have it, rounded
    if BY_STUDENT:
        moment = unit * _total(moment + sum_s * (down_s - down_t), s_factor)
    else:
        moment = unit * _total(moment + sum_t * (down_t - down_s), t_factor)
    if METRICS:
        own_s, own_t = _total(own_s + sum_s * down_s, s_factor), _total(own_t + sum_t * down_t, t_factor)
    sum_s, sum_t = _total(sum_s, s_factor), _total(sum_t, t_factor)
    entropy_s, entropy_t, position_s, position_t = zero, zero, zero, zero
    if METRICS and teacher is not None:
        # of each model by itself: in a shard one may have a distribution where the other has none
        entropy_s, entropy_t = _entropy(unit * own_s, sum_s), _entropy(unit * own_t, sum_t)
        position_s = _position(student, tops_s, block_s, max_s, columns, F, BLOCK)
        position_t = _position(teacher, tops_t, block_t, max_t, columns, F, BLOCK)
    # of a row of nothing but -inf it must not make -inf - -inf
    max_s = tl.where(max_s == NOTHING, 0.0, max_s).to(tl.float64)
    max_t = tl.where(max_t == NOTHING, 0.0, max_t).to(tl.float64)
    # The label's own exponential comes last and in fp64: beside it the others of a confident student would vanish.
    sum_1 = zero if label is None else _total(sum_1, tl.exp2(down_s * LOG2E)) + tl.exp(label[2] - max_s)
    divergence, careful = zero, zero
    if teacher is not None:
        divergence, full = _divergence(moment, sum_s, sum_t, BY_STUDENT), (sum_s != 0) & (sum_t != 0)
        careful = (full & (divergence < NEARLY_EQUAL)).to(tl.float64)
        if careful != 0:
            sum_s, sum_t, divergence = _careful_sums(
                student, teacher, columns, max_s, max_t, 1 / tau, BY_STUDENT, F, BLOCK
            )
    mean = divergence if BY_STUDENT else zero
    stats = (max_s, sum_s, max_t, sum_t, mean, careful, sum_1)
    return divergence, stats, (entropy_s, entropy_t, position_s, position_t)


@triton.jit
def _mean_residual(student, teacher, columns, stats, tau, F: tl.constexpr, BLOCK: tl.constexpr):
    """What sum q (log(q / p) - mean) falls short of its true value, zero: the digits that a large mean lost."""
    row = row_constants(stats, tau, 1.0, F)
    residual = _zeros(student, tl.float64, BLOCK)
    for start in range(0, columns, BLOCK):
        column = _columns(student, start, BLOCK)
        s, t = _read(student, column, columns, True, F), _read(teacher, column, columns, True, F)
        residual += _sum(column_gradient(s, t, None, row, REVERSE_KL, False))
    return tl.sum(residual, 0)


@triton.jit
def value_sums(
    student, teacher, columns, stats, b, tau, DIVERGENCE: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr
):
    """Pass 2, for divergences without a closed form: (D, mean of u, mean of v)."""
    row = row_constants(stats, tau, 1.0, F)
    value = _zeros(student, tl.float64, BLOCK)
    mean, comean = value, value
    for start in range(0, columns, BLOCK):
        column = _columns(student, start, BLOCK)
        s, t = unmasked(_read(student, column, columns, True, F)), unmasked(_read(teacher, column, columns, True, F))
        pair = column_pair(s, t, row)
        value += _sum(value_of(pair, b, DIVERGENCE))
        mean += _sum(slope_of(pair, b, DIVERGENCE))
        comean += _sum(coslope_of(pair, b, DIVERGENCE))
    return tl.sum(value, 0), tl.sum(mean, 0), tl.sum(comean, 0)


@triton.jit
def refined(divergence, student, teacher, columns, stats, tau, F: tl.constexpr, BLOCK: tl.constexpr):
    """A reverse KL, with the digits that a large one lost."""
    max_s, sum_s, max_t, sum_t, _, careful, sum_1 = stats
    if (divergence > FAR_APART) & (divergence < 1e20):
        stats = (max_s, sum_s, max_t, sum_t, divergence, careful, sum_1)
        divergence += _mean_residual(student, teacher, columns, stats, tau, F, BLOCK)
    return divergence


@triton.jit
def loss_of_row(
    student, teacher, label, columns, beta, weights, tau, kd_weight, ce_weight, DIVERGENCE: tl.constexpr,
    SEPARATE: tl.constexpr, METRICS: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Passes 1 and 2: (the row's loss before its coefficient, its stats, its metrics)."""
    # a mix's reverse KL comes of the first pass
    MIXED_REVERSE: tl.constexpr = DIVERGENCE >= MIX and DIVERGENCE // 2 % 2 == 1
    FIRST: tl.constexpr = REVERSE_KL if MIXED_REVERSE else DIVERGENCE
    SECOND: tl.constexpr = DIVERGENCE - 2 if MIXED_REVERSE else DIVERGENCE
    divergence, stats, own = first_pass(student, teacher, label, columns, tau, FIRST, SEPARATE, METRICS, F, BLOCK)
    max_s, sum_s, max_t, sum_t, mean, careful, sum_1 = stats
    entropy_s, entropy_t, position_s, position_t = own
    loss, kd, cross_entropy = double(0.0), double(0.0), double(0.0)
    if teacher is not None:
        # A row of nothing but -inf has no distribution: it counts as masked, with loss and gradient 0.
        empty = (sum_s == 0) | (sum_t == 0)
        if FIRST == REVERSE_KL:
            divergence = refined(divergence, student, teacher, columns, stats, tau, F, BLOCK)
            mean = with_infinity(divergence)
        if DIVERGENCE >= JSD:
            b = beta_constants(beta, weights, F)
            value, slope, coslope = value_sums(student, teacher, columns, stats, b, tau, SECOND, F, BLOCK)
            careful = (coslope < slope).to(tl.float64)
            second_mean = tl.where(coslope < slope, -coslope, slope)
            if MIXED_REVERSE:
                unit = member_weight(weights, REVERSE_KL)
                divergence, mean = unit * divergence + value, unit * mean + second_mean
            else:
                divergence, mean = value, second_mean
        mean = tl.where(empty, 0.0, mean)
        kd = tl.where(empty, 0.0, tau * tau * with_infinity(divergence))
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
        (max_s, sum_s, max_t, sum_t, mean, careful, sum_1),
        (kd, cross_entropy, entropy_s, entropy_t, position_s, position_t),
    )


@triton.jit
def _write_gradient_block(
    student, teacher, gradient, start, columns, kd, ce, DIVERGENCE: tl.constexpr, CAREFUL: tl.constexpr,
    MASK: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = _columns(student, start, BLOCK)
    s = _read(student, column, columns, MASK, F)
    g = tl.zeros_like(s)
    if kd is not None:
        kd_scale, b, row = kd
        t = _read(teacher, column, columns, MASK, F)
        g = kd_scale * column_gradient(s, t, b, row, DIVERGENCE, CAREFUL)
    if ce is not None:
        label, at_label, ce_scale, top_s = ce
        g += tl.where(column == label, at_label, ce_scale * tl.exp2((s - top_s) * LOG2E))
    write_block(gradient, column, columns, g, MASK)


@triton.jit
def write_gradient(
    student, teacher, label, gradient, columns, stats, coefficient, beta, weights, tau, kd_weight, ce_weight,
    DIVERGENCE: tl.constexpr, CAREFUL: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pass 3: coefficient * d loss / d s, written to `gradient`, which may be `student`."""
    max_s, sum_s, max_t, sum_t, mean, careful, sum_1 = stats
    kd, ce = None, None
    if teacher is not None:
        empty = (sum_s == 0) | (sum_t == 0)
        sum_s, sum_t = tl.where(empty, 1.0, sum_s), tl.where(empty, 1.0, sum_t)
        unit = mean_unit(weights, DIVERGENCE)
        row = row_constants((max_s, sum_s, max_t, sum_t, mean, careful, sum_1), tau, unit, F)
        kd = (tl.where(empty, 0.0, coefficient * kd_weight * tau).to(F), beta_constants(beta, weights, F), row)
    if label is not None:
        # The label's own column is done apart and in fp64: softmax - 1 would lose every digit of a confident student.
        label_column, valid, score = label
        ce_scale = tl.where(sum_1 == 0, 0.0, coefficient * ce_weight / tl.where(sum_1 == 0, 1.0, sum_1))
        at_label = tl.where(valid, ce_scale * (tl.exp(score - max_s) - sum_1), float("nan"))
        at_label = tl.where(sum_1 == 0, 0.0, at_label).to(F)
        ce = (label_column, at_label, ce_scale.to(F), max_s.to(F))
    whole = columns - columns % BLOCK
    for start in range(0, whole, BLOCK):
        _write_gradient_block(student, teacher, gradient, start, columns, kd, ce, DIVERGENCE, CAREFUL, False, F, BLOCK)
    if whole < columns:
        _write_gradient_block(student, teacher, gradient, whole, columns, kd, ce, DIVERGENCE, CAREFUL, True, F, BLOCK)
