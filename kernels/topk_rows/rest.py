"""One row in passes over its blocks of columns: the sums of the rest, beside what is set aside, and the gradient."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..common import LN2, LOG2E, NOTHING, double, unmasked

# What masked columns' scores are worked on as: see `unmasked`.
MASKED = tl.constexpr(-1e30)
# The column of what is none.
NOWHERE = tl.constexpr(2**31 - 1)


class Setting(NamedTuple):
    """What is constant in a launch."""

    F: tl.constexpr  # the working precision
    GROUPS: tl.constexpr  # of a block
    WIDTH: tl.constexpr  # columns of a group, which a thread moves at once
    LANES: tl.constexpr  # more than a row has ids
    SEPARATE: tl.constexpr  # whether the cross-entropy needs exponentials of its own
    CONDITIONAL: tl.constexpr  # whether there is no tail


class Rows(NamedTuple):
    """A matrix, or one row of it."""

    pointer: tl.tensor
    row_stride: tl.tensor
    stride: tl.tensor
    columns: tl.tensor


class Rest(NamedTuple):
    """Of the columns that are not set aside: sums, and in a gradient what their exponentials are multiplied with."""

    top: tl.tensor  # the maximum
    of_tail: tl.tensor  # of e^((s - top) / tau)
    of_all: tl.tensor  # of e^(s - top)


@triton.jit
def row_of(rows, index):
    return Rows(rows.pointer + index * rows.row_stride, rows.row_stride, rows.stride, rows.columns)


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
            power += power * (x * ((scale - rounded.to(tl.float64)) * LN2).to(F))
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
def _block_at(row, start, S):
    """Columns of a block, and pointers to them."""
    column = start + tl.arange(0, S.GROUPS)[:, None] * S.WIDTH + tl.arange(0, S.WIDTH)[None, :]
    return column, row.pointer + column.to(tl.int64) * row.stride


@triton.jit
def _next_aside(aside, start):
    """The first column, from `start` on, that is set aside."""
    return tl.min(tl.where(aside >= start, aside, NOWHERE), 0)


@triton.jit
def sums_of_rest(student, aside, tau, S):
    """Pass 1, beside the columns aside [LANES]: the rest, in fp64."""
    BLOCK: tl.constexpr = S.GROUPS * S.WIDTH
    one, top = double(1.0), tl.full((S.GROUPS,), NOTHING, S.F)
    high, low = tl.zeros_like(top), tl.zeros_like(top)
    high_1, low_1 = high, low
    first, columns = _next_aside(aside, 0), student.columns
    whole = columns - columns % BLOCK
    for PART in tl.static_range(2):  # whole blocks, and the end of the row
        for start in range(PART * whole, columns if PART else whole, BLOCK):
            column, pointers = _block_at(student, start, S)
            s = (tl.load(pointers, mask=column < columns, other=MASKED) if PART else tl.load(pointers)).to(S.F)
            s = unmasked(s)
            if first < start + BLOCK:
                here = (aside >= start) & (aside < start + BLOCK)
                count = tl.histogram(tl.where(here, aside - start, 0), BLOCK, mask=here)
                s = tl.where(tl.reshape(count, (S.GROUPS, S.WIDTH)) > 0, MASKED, s)
                first = _next_aside(aside, start + BLOCK)
            before, top = top, tl.maximum(top, tl.max(s, 1))
            high, low = _grown(top, high, low, before - top, s, tau, S.F)
            if S.SEPARATE:
                high_1, low_1 = _grown(top, high_1, low_1, before - top, s, one, S.F)
    highest = tl.max(top, 0).to(tl.float64)
    total = _total(top, highest, high, low, tau)
    return Rest(highest, total, _total(top, highest, high_1, low_1, one) if S.SEPARATE else total)


@triton.jit
def write_rest(student, gradient, rest, tau, READ: tl.constexpr, S):
    """The rest's gradient in every column; without READ 0."""
    top, of_tail, of_all, one = rest.top.to(S.F), rest.of_tail.to(S.F), rest.of_all.to(S.F), double(1.0)
    columns = student.columns
    whole = columns - columns % (S.GROUPS * S.WIDTH)
    for PART in tl.static_range(2):
        for start in range(PART * whole, columns if PART else whole, S.GROUPS * S.WIDTH):
            column, pointers = _block_at(student, start, S)
            mask = column < columns if PART else None
            g = tl.zeros((S.GROUPS, S.WIDTH), S.F)
            if READ:
                s = tl.load(pointers, mask=mask).to(S.F) - top
                if S.SEPARATE:
                    g = of_tail * _exp_of(s, tau, False, S.F) + of_all * _exp_of(s, one, False, S.F)
                else:
                    g = (of_tail + of_all) * _exp_of(s, tau, False, S.F)
            _, pointers = _block_at(gradient, start, S)
            tl.store(pointers, g.to(gradient.pointer.dtype.element_ty), mask=mask)


@triton.jit
def write_gradient(student, gradient, aside, slopes, rest, tau, READ: tl.constexpr, S):
    """Pass 2: the rest's columns, and after them slopes [LANES] in those that are set aside."""
    tl.debug_barrier()  # every thread has read the scores before one overwrites them with their gradients
    write_rest(student, gradient, rest, tau, READ, S)
    tl.debug_barrier()  # what the rest has written in columns set aside is overwritten
    pointers, slopes = gradient.pointer + aside.to(tl.int64) * gradient.stride, slopes.to(S.F)
    tl.store(pointers, slopes.to(gradient.pointer.dtype.element_ty), mask=aside != NOWHERE)
