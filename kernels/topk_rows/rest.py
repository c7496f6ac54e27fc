"""The rest of a row, beside what is set aside: its sums, and its gradient."""

import triton
import triton.language as tl

from ..common import _double

# Scores of -inf, masked columns, are worked on as the first of these, and the maximum of none but such is the second:
# e^(their difference) is 0, where -inf - -inf would be NaN.
MASKED = tl.constexpr(-1e30)
NOTHING = tl.constexpr(-1e29)
# The logarithm of no mass: differences stay finite, and a divergence beyond what it allows is infinite.
NO_MASS = tl.constexpr(-1e100)
# The column of what is none.
NOWHERE = tl.constexpr(2**31 - 1)


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
def sums_of_rest(
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
def write_rest(
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
