"""One row in passes over its blocks of columns: statistics, values, loss and gradient."""

import triton
import triton.language as tl

from ..common import (
    FORWARD_KL,
    JSD,
    MIX,
    REVERSE_KL,
    _beta_constants,
    _coslope,
    _double,
    _excess,
    _slope,
    _unmasked,
    _value,
    _weight,
    _with_infinity,
)
from .column import (
    ELSEWHERE,
    FAR_APART,
    LOG2E,
    LOWEST,
    NEARLY_EQUAL,
    column_gradient,
    column_pair,
    mean_unit,
    row_constants,
    running_constants,
)

# A row of a matrix is (pointer, column stride). The teacher's may be None, and so may the label: (column, whether there
# is such a column, the student's score in it).


@triton.jit
def label_of(student, label, columns):
    """A row's label; of one that is elsewhere column -1, in which no share of the sums and of the gradient is."""
    pointer, stride = student
    valid = (label >= 0) & (label < columns)
    elsewhere = label == ELSEWHERE
    column = tl.where(valid, label, 0)
    score = tl.load(pointer + column * stride).to(tl.float64)
    return tl.where(elsewhere, -1, column), valid, tl.where(elsewhere, LOWEST, score)


@triton.jit
def _block_at(row, start, columns, BLOCK: tl.constexpr):
    """Pointers to a block of columns, and which of them exist. Offsets pass 2^31 in transposed matrices."""
    pointer, stride = row
    column = start + tl.arange(0, BLOCK)
    return pointer + column.to(tl.int64) * stride, column < columns


@triton.jit
def _read(row, start, columns, F: tl.constexpr, BLOCK: tl.constexpr):
    """A block of scores [BLOCK] in the working precision; -inf past the end of the row."""
    pointers, exists = _block_at(row, start, columns, BLOCK)
    return tl.load(pointers, mask=exists, other=LOWEST).to(F)


@triton.jit
def write_block(row, start, columns, x, BLOCK: tl.constexpr):
    pointers, exists = _block_at(row, start, columns, BLOCK)
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
def first_pass(
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
            row = running_constants(top_s, top_t, inv_tau, F)
            p, q, difference, log_ratio, _, _, _ = column_pair(s, _unmasked(t), row)
            student_sum, teacher_sum, gap = _sum(q), _sum(p), _sum(difference)
            nearly_equal = tl.abs(gap) < teacher_sum * 0.5
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
    row = row_constants(stats, tau, 1.0, F)
    residual = _double(0.0)
    for start in range(0, columns, BLOCK):
        s = _unmasked(_read(student, start, columns, F, BLOCK))
        t = _unmasked(_read(teacher, start, columns, F, BLOCK))
        residual += _sum(column_gradient(s, t, None, row, REVERSE_KL, False))
    return residual


@triton.jit
def value_sums(
    student, teacher, columns, stats, b, tau, DIVERGENCE: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr
):
    """Pass 2, for divergences without a closed form: (D, mean of u, mean of v)."""
    row = row_constants(stats, tau, 1.0, F)
    value, mean, comean = _double(0.0), _double(0.0), _double(0.0)
    for start in range(0, columns, BLOCK):
        s = _unmasked(_read(student, start, columns, F, BLOCK))
        t = _unmasked(_read(teacher, start, columns, F, BLOCK))
        pair = column_pair(s, t, row)
        value += _sum(_value(pair, b, DIVERGENCE))
        mean += _sum(_slope(pair, b, DIVERGENCE))
        comean += _sum(_coslope(pair, b, DIVERGENCE))
    return value, mean, comean


@triton.jit
def refined(divergence, student, teacher, columns, stats, tau, F: tl.constexpr, BLOCK: tl.constexpr):
    """A reverse KL, with the digits that a large one lost."""
    max_s, sum_s, max_t, sum_t, _, saturated, sum_1 = stats
    if (divergence > FAR_APART) & (divergence < 1e20):
        stats = (max_s, sum_s, max_t, sum_t, divergence, saturated, sum_1)
        divergence += _mean_residual(student, teacher, columns, stats, tau, F, BLOCK)
    return divergence


@triton.jit
def loss_of_row(
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
    divergence, stats, own = first_pass(student, teacher, label, columns, tau, FIRST, SEPARATE, METRICS, F, BLOCK)
    max_s, sum_s, max_t, sum_t, mean, careful, sum_1 = stats
    entropy_s, entropy_t, position_s, position_t = own
    loss, kd, cross_entropy = _double(0.0), _double(0.0), _double(0.0)
    if teacher is not None:
        # A row of nothing but -inf has no distribution: it counts as masked, with loss and gradient 0.
        empty = (sum_s == 0) | (sum_t == 0)
        if FIRST == REVERSE_KL:
            divergence = refined(divergence, student, teacher, columns, stats, tau, F, BLOCK)
            mean = _with_infinity(divergence)
        elif FIRST == FORWARD_KL:
            careful = (divergence < NEARLY_EQUAL).to(tl.float64)
        if DIVERGENCE >= JSD:
            b = _beta_constants(beta, weights, F)
            value, slope, coslope = value_sums(student, teacher, columns, stats, b, tau, SECOND, F, BLOCK)
            careful = (coslope < slope).to(tl.float64)
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
        (max_s, sum_s, max_t, sum_t, mean, careful, sum_1),
        (kd, cross_entropy, entropy_s, entropy_t, position_s, position_t),
    )


@triton.jit
def write_gradient(
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
    CAREFUL: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pass 3: coefficient * d loss / d s, written to `gradient`, which may be `student`."""
    max_s, sum_s, max_t, sum_t, mean, careful, sum_1 = stats
    if teacher is not None:
        empty = (sum_s == 0) | (sum_t == 0)
        sum_s, sum_t = tl.where(empty, 1.0, sum_s), tl.where(empty, 1.0, sum_t)
        unit = mean_unit(weights, DIVERGENCE)
        row = row_constants((max_s, sum_s, max_t, sum_t, mean, careful, sum_1), tau, unit, F)
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
        s = _read(student, start, columns, F, BLOCK)
        g = tl.zeros_like(s)
        if teacher is not None:
            t = _read(teacher, start, columns, F, BLOCK)
            g = kd_scale * column_gradient(s, t, b, row, DIVERGENCE, CAREFUL)
        if label is not None:
            column = start + tl.arange(0, BLOCK)
            g += tl.where(column == label_column, at_label, ce_scale * tl.exp2((s - top_s) * LOG2E))
        write_block(gradient, start, columns, g, BLOCK)
