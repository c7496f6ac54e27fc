"""The gradients of relations, whose queries are their keys, by tiles of scores that are computed once more.

A program sums up for a block of rows, its own, and goes through all others in tiles.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..common import Beta, choose, dot, double, load_valid
from .columns import near_exp2_minus1, tile_gradient
from .tiles import STATS, Head, Row, Side, along, beta_of, lift_of, load_head, load_row, mask_of, side_of, store_head

# How far from a reference exponentials serve, base 2: what is lost of a probability is below 2^(REACH - 126).
REACH = tl.constexpr(64.0)
# What a program's rows are beside others: queries, keys or both; on the diagonal of causal ones both, where they may.
QUERIES, KEYS, BOTH, DIAGONAL = (tl.constexpr(n) for n in range(4))


@triton.jit
def factors_kernel(given, tops, F: tl.constexpr, BLOCK: tl.constexpr):
    """What one exponential of each score makes G + G^T of, for forward_kl between relations: in place of statistics.

    With e = 2^(s - top) and f = 2^(t - top), `top` one for all of a head, a row's coefficient * (q - p) is a e - b f,
    and where e and f are near each other f (a (e / f - 1) + w) with w = a - b; G + G^T adds up those of both rows.
    Near convergence that loses digits which gradients of 16 bits do not have: e / f is farther from 1 than q / p.
    Stored are a, b and, for rows that count, as queries and as keys, and are within reach of `top`, w; for others NaN.
    `top` is the mean of rows' logarithms, of which some tokens' large activations count only as far as it reaches.
    """
    entry, head = tl.program_id(1), tl.program_id(0)
    rows = choose(entry, given.queries)
    stats = choose(entry, given.stats) + head.to(tl.int64) * STATS * rows
    key_mask = mask_of(given, entry, (head // given.heads).to(tl.int64))
    lowest, total, count, lift = tl.full((), float("inf"), F), tl.zeros((), F), tl.zeros((), F), lift_of(given, entry)
    for start in range(0, rows, BLOCK):
        row = load_row(stats, start + tl.arange(0, BLOCK), rows)
        log = tl.where(row.coefficient != 0, tl.minimum(row.log_s, row.log_t), float("inf"))
        lowest = tl.minimum(lowest, tl.min(log, 0))
    for start in range(0, rows, BLOCK):
        row = load_row(stats, start + tl.arange(0, BLOCK), rows)
        log = tl.minimum(row.log_s, lowest + REACH) + tl.minimum(row.log_t, lowest + REACH)
        total += tl.sum(tl.where(row.coefficient != 0, log, 0), 0)
        count += tl.sum((row.coefficient != 0).to(F), 0)
    top = 0.5 * total / tl.maximum(count, 1)
    tl.store(choose(entry, tops) + head, top)
    for start in range(0, rows, BLOCK):
        position = start + tl.arange(0, BLOCK)
        row = load_row(stats, position, rows, lift)
        near = load_valid(key_mask, position, rows) & (row.coefficient != 0)
        near &= tl.maximum(tl.abs(row.log_s - top), tl.abs(row.log_t - top)) < REACH
        b = row.coefficient * tl.exp2(top - row.log_t)
        x = row.log_t - row.log_s + row.rounded
        w = b * tl.where(tl.abs(x) < 0.5, near_exp2_minus1(x), tl.exp2(x) - 1)
        pointers, exists = stats + 4 * rows + position, position < rows
        tl.store(pointers, row.coefficient * tl.exp2(top - row.log_s), mask=exists)
        tl.store(pointers + rows, b, mask=exists)
        tl.store(pointers + 2 * rows, tl.where(near, w, float("nan")), mask=exists)


class Factors(NamedTuple):
    a: tl.tensor
    b: tl.tensor
    w: tl.tensor


class Own(NamedTuple):
    """A block of one head's rows, and what it needs to go through all of them."""

    student: Side
    teacher: Side
    start: tl.tensor
    valid: tl.tensor  # as keys
    row: Row  # as queries
    factors: Factors
    near: tl.tensor  # whether all are, see below
    top: tl.tensor
    stats: tl.tensor  # of the head
    rows: tl.tensor  # how many it has
    key_mask: tl.tensor | None
    lift: tl.tensor
    beta: Beta


@triton.jit
def _load_factors(stats, position, rows):
    pointers, exists = stats + 4 * rows + position, position < rows
    a, b = tl.load(pointers, mask=exists), tl.load(pointers + rows, mask=exists)
    return Factors(a, b, tl.load(pointers + 2 * rows, mask=exists, other=float("nan")))


@triton.jit
def _all_near(factors):
    """Whether all rows are within reach of their head's `top`."""
    return tl.min((factors.w == factors.w).to(tl.int32), 0) != 0


@triton.jit
def _near_gradient(s, t, own, factors):
    """A tile of G + G^T whose rows are all within reach of `top`, of scores less that."""
    a, b = own.factors.a[:, None] + factors.a[None, :], own.factors.b[:, None] + factors.b[None, :]
    w = own.factors.w[:, None] + factors.w[None, :]
    e, f, x = tl.exp2(s), tl.exp2(t), s - t
    return tl.where(tl.abs(x) < 0.5, f * (a * near_exp2_minus1(x) + w), a * e - b * f)


@triton.jit
def _masked_gradient(s, t, own, start, DIVERGENCE: tl.constexpr, AS: tl.constexpr):
    """A tile of G, of G^T or of their sum."""
    own_position, position = own.start + tl.arange(0, s.shape[0])[:, None], start + tl.arange(0, s.shape[1])
    s, t = s * own.student.scale, t * own.teacher.scale
    gradient = tl.zeros_like(s)
    if AS != KEYS:
        used = load_valid(own.key_mask, position, own.rows)[None, :] & (own.row.coefficient != 0)[:, None]
        if AS == DIAGONAL:
            used &= position[None, :] <= own_position
        gradient += tile_gradient(s, t, along(own.row, 1), own.beta, used, DIVERGENCE)
    if AS != QUERIES:
        row = load_row(own.stats, position, own.rows, own.lift)
        used = own.valid[:, None] & (row.coefficient != 0)[None, :]
        if AS == DIAGONAL:
            used &= own_position <= position[None, :]
        gradient += tile_gradient(s, t, along(row, 0), own.beta, used, DIVERGENCE)
    return gradient


@triton.jit
def _accumulate(
    total, own, first, last, C: tl.constexpr, AS: tl.constexpr, FACTORS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Adds G x or G^T x or (G + G^T) x over tiles of x."""
    F: tl.constexpr = total.dtype
    for start in range(first, last, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        read = position < own.rows
        if own.key_mask is not None:  # as keys or as queries
            valid = load_valid(own.key_mask, position, own.rows)
            read = valid | (tl.load(own.stats + position, mask=read, other=0) != 0)
        x = load_head(own.student.k, start, read, own.student.q.shape[1])
        y = load_head(own.teacher.k, start, read, own.teacher.q.shape[1])
        s, t = dot(own.student.q, tl.trans(x), F), dot(own.teacher.q, tl.trans(y), F)
        if FACTORS:
            factors = _load_factors(own.stats, position, own.rows)
            # Before the branch: Triton 3.6 compiles no products that only branches use. As one instruction: the other
            # branch's scaled scores would be shared with it, and make it two.
            near_s, near_t = tl.fma(s, own.student.scale, -own.top), tl.fma(t, own.teacher.scale, -own.top)
            if own.near & _all_near(factors):
                gradient = _near_gradient(near_s, near_t, own, factors)
            else:
                gradient = _masked_gradient(s, t, own, start, C.DIVERGENCE, AS)
        else:
            gradient = _masked_gradient(s, t, own, start, C.DIVERGENCE, AS)
        total += dot(gradient.to(x.dtype), x, F)
    return total


@triton.jit
def gradient_kernel(
    call,
    tops,  # [B, A] of each entry, or None
    gradients,  # [B, L, H]
    blocks,  # of rows, in the longest entry
    student_scale: tl.float64,
    teacher_scale: tl.float64,
    beta: tl.float64,
    C: tl.constexpr,  # Constants
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of a block of one head's rows."""
    entry, program = tl.program_id(1), tl.program_id(0)
    start, head = program % blocks * BLOCK_M, program // blocks
    b, a = (head // call.rows.heads).to(tl.int64), head % call.rows.heads
    rows, lift = choose(entry, call.rows.queries), lift_of(call.rows, entry)
    key_mask = mask_of(call.rows, entry, b)  # by itself: in Triton 3.6 no tuple holds None, but a named one
    stats, position = choose(entry, call.rows.stats) + head.to(tl.int64) * STATS * rows, start + tl.arange(0, BLOCK_M)
    row, valid = load_row(stats, position, rows, lift), load_valid(key_mask, position, rows)
    read, factors, top = valid | (row.coefficient != 0), _load_factors(stats, position, rows), tl.zeros((), C.F)
    FACTORS: tl.constexpr = tops is not None
    if FACTORS:
        top = tl.load(choose(entry, tops) + head)
    own = Own(
        side_of(call.student, student_scale, C.WIDTH_S, C.GROUP_S, entry, b, a, start, read, C.F),
        side_of(call.teacher, teacher_scale, C.WIDTH_T, C.GROUP_T, entry, b, a, start, read, C.F),
        start, valid, row, factors, _all_near(factors), top, stats, rows, key_mask, lift, beta_of(call, beta, C.F),
    )  # fmt: skip

    last = tl.where(tl.max(read.to(tl.int32), 0) == 0, 0, rows)
    total = tl.zeros(own.student.q.shape, C.F)
    if C.CAUSAL:  # BLOCK_M is a multiple of BLOCK_N
        end = start + BLOCK_M
        total = _accumulate(total, own, 0, tl.minimum(start, last), C, QUERIES, False, BLOCK_N)
        total = _accumulate(total, own, start, tl.minimum(end, last), C, DIAGONAL, False, BLOCK_N)
        total = _accumulate(total, own, end, last, C, KEYS, False, BLOCK_N)
    else:
        total = _accumulate(total, own, 0, last, C, BOTH, FACTORS, BLOCK_N)
    total *= double(student_scale).to(C.F) / lift
    hidden = call.rows.heads * C.WIDTH_S
    head = Head(choose(entry, gradients) + b * rows * hidden + a * C.WIDTH_S, hidden, C.WIDTH_S)
    store_head(head, start, position < rows, total)
