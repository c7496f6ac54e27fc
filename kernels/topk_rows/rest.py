"""One row in passes over its blocks of columns: the sums of the rest, beside what is set aside, and the gradient."""

import triton
import triton.language as tl

from ..common import LOG2E, double

# Scores of -inf, masked columns, are worked on as the first of these, and the maximum of none but such is the second:
# e^(their difference) is 0, where -inf - -inf would be NaN.
MASKED = tl.constexpr(-1e30)
NOTHING = tl.constexpr(-1e29)
# The column of what is none.
NOWHERE = tl.constexpr(2**31 - 1)

# A row of a matrix is (pointer, column stride). `aside` [LANES] are the columns that are set aside.


@triton.jit
def _exp_of(x, tau, EXACT: tl.constexpr, F: tl.constexpr):
    """e^(x / tau); EXACT, for a finite x, puts back what rounding takes from log2(e) / tau, which would bias a sum."""
    if tl.float64 == F:
        power = tl.exp(x / tau)
    else:
        scale = LOG2E / tau
        rounded = scale.to(F)
        power = tl.exp2(x * rounded)
        if EXACT:
            power += power * (x * ((scale - rounded.to(tl.float64)) * 0.6931471805599453).to(F))
    return power


@triton.jit
def _grown(top, high, low, moved, s, tau, F: tl.constexpr):
    """Sums of e^((s - top) / tau), of which those so far were relative to what `top` has `moved` from.

    A sum is carried as two numbers: what rounding takes from the first is in the second.
    """
    factor, x = _exp_of(moved, tau, True, F), tl.sum(_exp_of(s - top[:, None], tau, True, F), 1)
    high, low = high * factor, low * factor
    total = high + x
    back = total - high
    return total, low + ((high - (total - back)) + (x - back))


@triton.jit
def _total(top, highest, high, low, tau):
    """The threads' sums in one, relative to the highest of their maxima."""
    return tl.sum((high.to(tl.float64) + low.to(tl.float64)) * tl.exp((top.to(tl.float64) - highest) / tau), 0)


@triton.jit
def _block_at(row, start, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns of a block, and pointers to them. A thread moves a group at once."""
    column = start + tl.arange(0, GROUPS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    return column, row[0] + column.to(tl.int64) * row[1]


@triton.jit
def _next_aside(aside, start):
    """The first column, from `start` on, that is set aside."""
    return tl.min(tl.where(aside >= start, aside, NOWHERE), 0)


@triton.jit
def _set_aside(aside, start, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Which columns of a block are set aside."""
    here = (aside >= start) & (aside < start + GROUPS * WIDTH)
    count = tl.histogram(tl.where(here, aside - start, 0), GROUPS * WIDTH, mask=here)
    return tl.reshape(count, (GROUPS, WIDTH)) > 0


@triton.jit
def sums_of_rest(
    student, aside, columns, tau,
    SEPARATE: tl.constexpr, F: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Pass 1: (maximum, sum of e^((s - maximum) / tau), sum of e^(s - maximum)) over the rest, in fp64."""
    BLOCK: tl.constexpr = GROUPS * WIDTH
    one, top = double(1.0), tl.full((GROUPS,), NOTHING, F)
    high, low = tl.zeros((GROUPS,), F), tl.zeros((GROUPS,), F)
    high_1, low_1 = high, low
    first, whole = _next_aside(aside, 0), columns - columns % BLOCK
    for PART in tl.static_range(2):  # whole blocks, and the end of the row
        for start in range(PART * whole, columns if PART else whole, BLOCK):
            column, pointers = _block_at(student, start, GROUPS, WIDTH)
            s = (tl.load(pointers, mask=column < columns, other=MASKED) if PART else tl.load(pointers)).to(F)
            s = tl.maximum(s, MASKED, propagate_nan=tl.PropagateNan.ALL)
            if first < start + BLOCK:
                s = tl.where(_set_aside(aside, start, GROUPS, WIDTH), MASKED, s)
                first = _next_aside(aside, start + BLOCK)
            before, top = top, tl.maximum(top, tl.max(s, 1))
            high, low = _grown(top, high, low, before - top, s, tau, F)
            if SEPARATE:
                high_1, low_1 = _grown(top, high_1, low_1, before - top, s, one, F)
    highest = tl.max(top, 0).to(tl.float64)
    total = _total(top, highest, high, low, tau)
    return highest, total, _total(top, highest, high_1, low_1, one) if SEPARATE else total


@triton.jit
def write_rest(
    student, gradient, columns, top, tau, of_tail, of_all,
    READ: tl.constexpr, SEPARATE: tl.constexpr, F: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """of_tail e^((s - top) / tau) + of_all e^(s - top), in every column; without READ 0."""
    top, of_tail, of_all, one = top.to(F), of_tail.to(F), of_all.to(F), double(1.0)
    whole = columns - columns % (GROUPS * WIDTH)
    for PART in tl.static_range(2):
        for start in range(PART * whole, columns if PART else whole, GROUPS * WIDTH):
            column, pointers = _block_at(student, start, GROUPS, WIDTH)
            mask = column < columns if PART else None
            g = tl.zeros((GROUPS, WIDTH), F)
            if READ:
                s = tl.load(pointers, mask=mask).to(F) - top
                if SEPARATE:
                    g = of_tail * _exp_of(s, tau, False, F) + of_all * _exp_of(s, one, False, F)
                else:
                    g = (of_tail + of_all) * _exp_of(s, tau, False, F)
            _, pointers = _block_at(gradient, start, GROUPS, WIDTH)
            tl.store(pointers, g.to(gradient[0].dtype.element_ty), mask=mask)


@triton.jit
def write_gradient(
    student, gradient, aside, slopes, columns, top, tau, of_tail, of_all,
    READ: tl.constexpr, SEPARATE: tl.constexpr, F: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Pass 2: the rest's columns, and after them slopes [LANES] in those that are set aside."""
    tl.debug_barrier()  # every thread has read the scores before one overwrites them with their gradients
    write_rest(student, gradient, columns, top, tau, of_tail, of_all, READ, SEPARATE, F, GROUPS, WIDTH)
    tl.debug_barrier()  # what the rest has written in columns set aside is overwritten
    pointers, slopes = gradient[0] + aside.to(tl.int64) * gradient[1], slopes.to(F)
    tl.store(pointers, slopes.to(gradient[0].dtype.element_ty), mask=aside != NOWHERE)
