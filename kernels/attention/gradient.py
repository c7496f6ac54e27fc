"""The gradients of queries and keys, by tiles of scores that are computed once more.

`own` is the block that a program sums up for, `other` what it goes through in tiles.
"""

import triton
import triton.language as tl

from ..common import _beta_constants, _choose, _dot, _double, _load_valid
from .tiles import (
    STATS,
    along,
    bias_of_head,
    choose_head,
    head_pointers,
    load_head,
    load_stats,
    log2_scale,
    tile_gradient,
    tile_scores,
)  # fmt: skip


@triton.jit
def _accumulate(
    total,
    own,
    other,
    key_mask,  # not in `other`: in Triton 3.6 a tuple cannot hold None
    scales,
    biases,
    beta,
    lift,
    first,
    last,
    DIVERGENCE: tl.constexpr,
    CAUSAL: tl.constexpr,
    AS_QUERY: tl.constexpr,
    AS_KEY: tl.constexpr,
    WIDTH_S: tl.constexpr,
    WIDTH_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    F: tl.constexpr,
):
    """Adds G x or G^T x or, in relation_kl, (G + G^T) x over tiles of x."""
    own_x, own_y, own_start, own_valid, own_row = own
    x, y, stats, others = other
    i, j = tl.arange(0, own_x.shape[0])[:, None], tl.arange(0, BLOCK_N)[None, :]
    for start in range(first, last, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        if AS_QUERY:
            valid = _load_valid(key_mask, position, others)
            as_query = valid[None, :] & (own_row[0] != 0)[:, None]
            read = valid
            if CAUSAL:
                as_query &= start + j <= own_start + i
        if AS_KEY:
            row = load_stats(stats, position, others)
            alive = row[0] != 0
            as_key = own_valid[:, None] & alive[None, :]
            read = valid | alive if AS_QUERY else alive
            if CAUSAL:
                as_key &= own_start + i <= start + j

        other_x = load_head(x, start, read, WIDTH_S, own_x.shape[1], BLOCK_N)
        other_y = load_head(y, start, read, WIDTH_T, own_y.shape[1], BLOCK_N)
        where = (own_start, start, i, j, as_query) if AS_QUERY else (start, own_start, j, i, as_key)
        s = tile_scores(own_x, other_x, scales[0], biases[0], *where, F)
        t = tile_scores(own_y, other_y, scales[1], biases[1], *where, F)
        if AS_QUERY:
            gradient = tile_gradient(s, t, along(own_row, 1), beta, as_query, DIVERGENCE)
            if AS_KEY:
                gradient += tile_gradient(s, t, along(row, 0), beta, as_key, DIVERGENCE)
        else:
            gradient = tile_gradient(s, t, along(row, 0), beta, as_key, DIVERGENCE)
        total += _dot((gradient * lift).to(other_x.dtype), other_x, F)
    return total


@triton.jit
def gradient_kernel(
    student_own,  # tuples over entries
    student_other,
    teacher_own,
    teacher_other,
    stats,  # [B, A, STATS, Lq]
    key_masks,  # [B, Lk], or no tuple but None
    lifts,  # 0-d, or no tuple but None
    gradients,  # [B, L, H], as wide as queries also for keys
    lengths_own,
    lengths_other,
    student_bias,
    teacher_bias,
    heads,
    blocks,  # of own rows, in the longest entry
    student_scale: tl.float64,
    teacher_scale: tl.float64,
    weights,  # of a mix, or None
    beta: tl.float64,
    DIVERGENCE: tl.constexpr,
    CAUSAL: tl.constexpr,
    AS_QUERY: tl.constexpr,
    AS_KEY: tl.constexpr,
    WIDTH_S: tl.constexpr,
    WIDTH_T: tl.constexpr,
    PADDED_S: tl.constexpr,
    PADDED_T: tl.constexpr,
    GROUP_S: tl.constexpr,
    GROUP_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    F: tl.constexpr,
):
    """The gradient of a block of one head's queries (AS_QUERY), keys (AS_KEY), or what is both.

    Of keys that heads share it is the part that one head of queries gives.
    """
    entry, program = tl.program_id(1), tl.program_id(0)
    start, head = program % blocks * BLOCK_M, program // blocks
    b, a = (head // heads).to(tl.int64), head % heads
    own_count, other_count = _choose(entry, lengths_own), _choose(entry, lengths_other)
    queries = own_count if AS_QUERY else other_count
    keys = other_count if AS_QUERY else own_count
    position = start + tl.arange(0, BLOCK_M)
    head_stats = _choose(entry, stats) + head.to(tl.int64) * STATS * queries
    key_mask = None
    if key_masks is not None:
        key_mask = _choose(entry, key_masks) + b * keys
    lift = 1.0
    if lifts is not None:
        lift = tl.load(_choose(entry, lifts))

    row, valid = None, None
    if AS_QUERY:
        row = load_stats(head_stats, position, queries)
        read = row[0] != 0
    if AS_KEY:
        valid = _load_valid(key_mask, position, keys)
        read = read | valid if AS_QUERY else valid
    own_s, other_s = (a, a // GROUP_S) if AS_QUERY else (a // GROUP_S, a)
    own_t, other_t = (a, a // GROUP_T) if AS_QUERY else (a // GROUP_T, a)
    x = load_head(choose_head(entry, student_own, b, own_s, WIDTH_S), start, read, WIDTH_S, PADDED_S, BLOCK_M)
    y = load_head(choose_head(entry, teacher_own, b, own_t, WIDTH_T), start, read, WIDTH_T, PADDED_T, BLOCK_M)
    own = x, y, start, valid, row
    x = choose_head(entry, student_other, b, other_s, WIDTH_S)
    y = choose_head(entry, teacher_other, b, other_t, WIDTH_T)
    other = x, y, head_stats, other_count
    scales = log2_scale(student_scale, F), log2_scale(teacher_scale, F)
    biases = bias_of_head(student_bias, b, a), bias_of_head(teacher_bias, b, a)
    b_constants = _beta_constants(beta, weights, F)

    last = tl.where(tl.max(read.to(tl.int32), 0) == 0, 0, other_count)
    total = tl.zeros((BLOCK_M, PADDED_S), F)
    if not CAUSAL:
        total = _accumulate(
            total, own, other, key_mask, scales, biases, b_constants, lift, 0, last,
            DIVERGENCE, False, AS_QUERY, AS_KEY, WIDTH_S, WIDTH_T, BLOCK_N, F,
        )  # fmt: skip
    else:  # BLOCK_M is a multiple of BLOCK_N
        diagonal = tl.minimum(start + BLOCK_M, last)
        if AS_QUERY:
            total = _accumulate(
                total, own, other, key_mask, scales, biases, b_constants, lift, 0, tl.minimum(start, last),
                DIVERGENCE, False, True, False, WIDTH_S, WIDTH_T, BLOCK_N, F,
            )  # fmt: skip
        total = _accumulate(
            total, own, other, key_mask, scales, biases, b_constants, lift, start, diagonal,
            DIVERGENCE, True, AS_QUERY, AS_KEY, WIDTH_S, WIDTH_T, BLOCK_N, F,
        )  # fmt: skip
        if AS_KEY:
            total = _accumulate(
                total, own, other, key_mask, scales, biases, b_constants, lift, start + BLOCK_M, last,
                DIVERGENCE, False, False, True, WIDTH_S, WIDTH_T, BLOCK_N, F,
            )  # fmt: skip
    hidden = heads * WIDTH_S
    gradient = _choose(entry, gradients) + b * own_count * hidden + a * WIDTH_S
    pointers, exists = head_pointers((gradient, hidden), start, WIDTH_S, PADDED_S, BLOCK_M)
    total *= _double(student_scale).to(F) / lift
    tl.store(pointers, total.to(gradient.dtype.element_ty), mask=(position < own_count)[:, None] & exists)
