"""The gradients of relations, whose queries are their keys, by tiles of scores that are computed once more.

`own` is the block that a program sums up for, `other` what it goes through in tiles.
"""

import triton
import triton.language as tl

from ..common import beta_constants, choose, dot, double, load_valid
from .tiles import (
    STATS,
    along,
    choose_head,
    exp2_minus1,
    head_pointers,
    load_head,
    load_stats,
    log2_scale,
    near_exp2_minus1,
    tile_gradient,
)  # fmt: skip

# How far from a reference exponentials serve, base 2: what is lost of a probability is below 2^(REACH - 126).
REACH = tl.constexpr(64.0)


@triton.jit
def factors_kernel(stats, tops, key_masks, lifts, lengths, heads, BLOCK: tl.constexpr, F: tl.constexpr):
    """What one exponential of each score makes G + G^T of, for forward_kl between relations: in place of statistics.

    With e = 2^(s - top) and f = 2^(t - top), `top` one for all of a head, a row's coefficient * (q - p) is a e - b f,
    and where e and f are near each other f (a (e / f - 1) + w) with w = a - b; G + G^T adds up those of both rows.
    Near convergence that loses digits which gradients of 16 bits do not have: e / f is farther from 1 than q / p.
    Stored are a, b and, for rows that count, as queries and as keys, and are within reach of `top`, w; for others NaN.
    """
    entry, head = tl.program_id(1), tl.program_id(0)
    rows = choose(entry, lengths)
    stats = choose(entry, stats) + head.to(tl.int64) * STATS * rows
    key_mask = None
    if key_masks is not None:
        key_mask = choose(entry, key_masks) + (head // heads).to(tl.int64) * rows
    lift = 1.0
    if lifts is not None:
        lift = tl.load(choose(entry, lifts))
    total, count = tl.zeros((), F), tl.zeros((), F)
    for start in range(0, rows, BLOCK):
        coefficient, log_s, log_t, _, _, _, _ = load_stats(stats, start + tl.arange(0, BLOCK), rows, 1.0)
        total += tl.sum(tl.where(coefficient != 0, log_s + log_t, 0), 0)
        count += tl.sum((coefficient != 0).to(F), 0)
    top = 0.5 * total / tl.maximum(count, 1)
    tl.store(choose(entry, tops) + head, top)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        coefficient, log_s, log_t, rounded, _, _, _ = load_stats(stats, row, rows, lift)
        near = load_valid(key_mask, row, rows) & (coefficient != 0)
        near &= tl.maximum(tl.abs(log_s - top), tl.abs(log_t - top)) < REACH
        b = coefficient * tl.exp2(top - log_t)
        w = b * exp2_minus1(log_t - log_s + rounded)
        tl.store(stats + 4 * rows + row, coefficient * tl.exp2(top - log_s), mask=row < rows)
        tl.store(stats + 5 * rows + row, b, mask=row < rows)
        tl.store(stats + 6 * rows + row, tl.where(near, w, float("nan")), mask=row < rows)


@triton.jit
def _load_factors(stats, position, rows):
    pointers, exists = stats + 4 * rows + position, position < rows
    a, b = tl.load(pointers, mask=exists), tl.load(pointers + rows, mask=exists)
    return a, b, tl.load(pointers + 2 * rows, mask=exists, other=float("nan"))


@triton.jit
def _all_near(factors):
    """Whether all rows are within reach of their head's `top`."""
    return tl.min((factors[2] == factors[2]).to(tl.int32), 0) != 0


@triton.jit
def _near_gradient(s, t, top, own_factors, other_factors):
    """A tile of G + G^T whose rows are all within reach of `top`."""
    a, b, w = own_factors
    other_a, other_b, other_w = other_factors
    a, b, w = a[:, None] + other_a[None, :], b[:, None] + other_b[None, :], w[:, None] + other_w[None, :]
    s, t = s - top, t - top
    e, f, x = tl.exp2(s), tl.exp2(t), s - t
    return tl.where(tl.abs(x) < 0.5, f * (a * near_exp2_minus1(x) + w), a * e - b * f)


@triton.jit
def _masked_gradient(
    s,
    t,
    own,
    other,
    key_mask,
    start,
    beta,
    lift,
    DIVERGENCE: tl.constexpr,
    CAUSAL: tl.constexpr,
    AS_QUERY: tl.constexpr,
    AS_KEY: tl.constexpr,
):
    """A tile of G, of G^T or of their sum."""
    _, _, own_start, own_valid, own_row, _, _, _ = own
    _, _, stats, rows = other
    i, position = own_start + tl.arange(0, s.shape[0])[:, None], start + tl.arange(0, s.shape[1])
    gradient = tl.zeros_like(s)
    if AS_QUERY:
        used = load_valid(key_mask, position, rows)[None, :] & (own_row[0] != 0)[:, None]
        if CAUSAL:
            used &= position[None, :] <= i
        gradient += tile_gradient(s, t, along(own_row, 1), beta, used, DIVERGENCE)
    if AS_KEY:
        row = load_stats(stats, position, rows, lift)
        used = own_valid[:, None] & (row[0] != 0)[None, :]
        if CAUSAL:
            used &= i <= position[None, :]
        gradient += tile_gradient(s, t, along(row, 0), beta, used, DIVERGENCE)
    return gradient


@triton.jit
def _accumulate(
    total,
    own,
    other,
    key_mask,  # not in `other`: in Triton 3.6 a tuple cannot hold None
    scales,
    beta,
    lift,
    first,
    last,
    DIVERGENCE: tl.constexpr,
    CAUSAL: tl.constexpr,
    AS_QUERY: tl.constexpr,
    AS_KEY: tl.constexpr,
    FACTORS: tl.constexpr,
    WIDTH_S: tl.constexpr,
    WIDTH_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    F: tl.constexpr,
):
    """Adds G x or G^T x or (G + G^T) x over tiles of x."""
    own_x, own_y, _, _, _, own_factors, own_near, top = own
    x, y, stats, rows = other
    for start in range(first, last, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        read = position < rows
        if key_mask is not None:  # as keys or as queries
            read = load_valid(key_mask, position, rows) | (tl.load(stats + position, mask=read, other=0) != 0)
        other_x = load_head(x, start, read, WIDTH_S, own_x.shape[1], BLOCK_N)
        other_y = load_head(y, start, read, WIDTH_T, own_y.shape[1], BLOCK_N)
        s, t = dot(own_x, tl.trans(other_x), F), dot(own_y, tl.trans(other_y), F)
        if FACTORS and AS_QUERY and AS_KEY and not CAUSAL:
            factors = _load_factors(stats, position, rows)
            if own_near & _all_near(factors):
                gradient = _near_gradient(s * scales[0], t * scales[1], top, own_factors, factors)
            else:
                gradient = _masked_gradient(
                    s * scales[0], t * scales[1], own, other, key_mask, start, beta, lift,
                    DIVERGENCE, CAUSAL, AS_QUERY, AS_KEY,
                )  # fmt: skip
        else:
            gradient = _masked_gradient(
                s * scales[0], t * scales[1], own, other, key_mask, start, beta, lift,
                DIVERGENCE, CAUSAL, AS_QUERY, AS_KEY,
            )  # fmt: skip
        total += dot(gradient.to(other_x.dtype), other_x, F)
    return total


@triton.jit
def gradient_kernel(
    student,  # tuples over entries
    teacher,
    stats,  # [B, A, STATS, L]
    tops,  # [B, A], or no tuple but None
    key_masks,  # [B, L], or no tuple but None
    lifts,  # 0-d, or no tuple but None
    gradients,  # [B, L, H]
    lengths,
    heads,
    blocks,  # of rows, in the longest entry
    student_scale: tl.float64,
    teacher_scale: tl.float64,
    weights,  # of a mix, or None
    beta: tl.float64,
    DIVERGENCE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDTH_S: tl.constexpr,
    WIDTH_T: tl.constexpr,
    PADDED_S: tl.constexpr,
    PADDED_T: tl.constexpr,
    GROUP_S: tl.constexpr,  # 1
    GROUP_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    F: tl.constexpr,
):
    """The gradient of a block of one head's rows."""
    entry, program = tl.program_id(1), tl.program_id(0)
    start, head = program % blocks * BLOCK_M, program // blocks
    b, a = (head // heads).to(tl.int64), head % heads
    rows = choose(entry, lengths)
    position = start + tl.arange(0, BLOCK_M)
    stats = choose(entry, stats) + head.to(tl.int64) * STATS * rows
    key_mask = None
    if key_masks is not None:
        key_mask = choose(entry, key_masks) + b * rows
    lift = 1.0
    if lifts is not None:
        lift = tl.load(choose(entry, lifts))

    row, valid = load_stats(stats, position, rows, lift), load_valid(key_mask, position, rows)
    read = valid | (row[0] != 0)
    x, y = choose_head(entry, student, b, a, WIDTH_S), choose_head(entry, teacher, b, a, WIDTH_T)
    factors, top = _load_factors(stats, position, rows), tl.zeros((), F)
    FACTORS: tl.constexpr = tops is not None
    if FACTORS:
        top = tl.load(choose(entry, tops) + head)
    own_x = load_head(x, start, read, WIDTH_S, PADDED_S, BLOCK_M)
    own_y = load_head(y, start, read, WIDTH_T, PADDED_T, BLOCK_M)
    own = own_x, own_y, start, valid, row, factors, _all_near(factors), top
    other = x, y, stats, rows
    scales = log2_scale(student_scale, F), log2_scale(teacher_scale, F)
    b_constants = beta_constants(beta, weights, F)

    last = tl.where(tl.max(read.to(tl.int32), 0) == 0, 0, rows)
    total = tl.zeros((BLOCK_M, PADDED_S), F)
    if not CAUSAL:
        total = _accumulate(
            total, own, other, key_mask, scales, b_constants, lift, 0, last,
            DIVERGENCE, False, True, True, FACTORS, WIDTH_S, WIDTH_T, BLOCK_N, F,
        )  # fmt: skip
    else:  # BLOCK_M is a multiple of BLOCK_N
        total = _accumulate(
            total, own, other, key_mask, scales, b_constants, lift, 0, tl.minimum(start, last),
            DIVERGENCE, False, True, False, FACTORS, WIDTH_S, WIDTH_T, BLOCK_N, F,
        )  # fmt: skip
        total = _accumulate(
            total, own, other, key_mask, scales, b_constants, lift, start, tl.minimum(start + BLOCK_M, last),
            DIVERGENCE, True, True, True, FACTORS, WIDTH_S, WIDTH_T, BLOCK_N, F,
        )  # fmt: skip
        total = _accumulate(
            total, own, other, key_mask, scales, b_constants, lift, start + BLOCK_M, last,
            DIVERGENCE, False, False, True, FACTORS, WIDTH_S, WIDTH_T, BLOCK_N, F,
        )  # fmt: skip
    hidden = heads * WIDTH_S
    gradient = choose(entry, gradients) + b * rows * hidden + a * WIDTH_S
    pointers, exists = head_pointers((gradient, hidden), start, WIDTH_S, PADDED_S, BLOCK_M)
    total *= double(student_scale).to(F) / lift
    tl.store(pointers, total.to(gradient.dtype.element_ty), mask=(position < rows)[:, None] & exists)
