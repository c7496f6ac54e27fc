"""The forward pass of attention_kl and relation_kl: losses, and seven numbers a row that its gradient needs."""

import triton
import triton.language as tl

from ..common import (
    FORWARD_KL,
    JSD,
    LOG2E,
    MIX,
    REVERSE_KL,
    TVD,
    beta_constants,
    choose,
    coslope_of,
    log_1p,
    slope_of,
    value_of,
    with_infinity,
)  # fmt: skip
from .tiles import (
    FAR,
    LN2,
    MASKED,
    STATS,
    along,
    any_masked,
    bias_of_head,
    both_scores,
    choose_head,
    exp2_tail,
    far_log_1p,
    load_head,
    log2_scale,
    log_1p_tail,
    log_ratio_of,
    tile_pair,
)  # fmt: skip


@triton.jit
def _model(
    entry,
    q,
    k,
    b,
    a,
    start,
    exists,
    scale,
    bias,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    """Its queries carry the sign of the scale, for maxima of what is yet to be scaled."""
    scale = log2_scale(scale, F)
    tile = load_head(choose_head(entry, q, b, a, WIDTH), start, exists, WIDTH, PADDED, BLOCK)
    tile = tl.where(scale < 0, -tile, tile)
    return tile, choose_head(entry, k, b, a // GROUP, WIDTH), tl.maximum(tl.abs(scale), 1e-25), bias_of_head(bias, b, a)


@triton.jit
def _scale_left(model):
    """What is left to multiply scores with: nothing, where a bias has been added."""
    _, _, scale, bias = model
    if len(bias) > 0:
        scale = 1.0
    return scale


# Sums of a row that lanes add up by themselves, and together at the end: so many neighbouring columns are in four
# lanes, and the next ones in the same.
LANES = tl.constexpr(8)


@triton.jit
def _partial(x):
    """Sums of every eighth column [rows, LANES]."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // LANES, LANES)), 1)


@triton.jit
def _first_look(
    student,
    teacher,
    key_mask,
    query_start,
    alive,
    end,
    keys,
    DIVERGENCE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDTH_S: tl.constexpr,
    WIDTH_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    F: tl.constexpr,
):
    """Both models' row maxima and sums of exponentials, the moment that gives D, and whether there is any key."""
    # where there is no bias, scaling and subtracting the maximum is one instruction
    scale_s, scale_t = _scale_left(student), _scale_left(teacher)
    max_s, max_t = tl.full((BLOCK_M,), MASKED, F), tl.full((BLOCK_M,), MASKED, F)
    sum_s = tl.zeros((BLOCK_M, LANES), F)
    sum_t, moment = tl.zeros_like(sum_s), tl.zeros_like(sum_s)
    for start in range(0, end, BLOCK_N):
        s, t, valid = both_scores(
            student, teacher, key_mask, query_start, alive, start, keys, CAUSAL, WIDTH_S, WIDTH_T, BLOCK_N, F, False
        )
        if any_masked(key_mask, start, keys, query_start, CAUSAL, BLOCK_N):
            s, t = tl.where(valid, s, MASKED), tl.where(valid, t, MASKED)
        top_s, top_t = tl.maximum(max_s, tl.max(s, 1)), tl.maximum(max_t, tl.max(t, 1))
        moved_s, moved_t = ((max_s - top_s) * scale_s)[:, None], ((max_t - top_t) * scale_t)[:, None]
        factor_s, factor_t = tl.exp2(moved_s), tl.exp2(moved_t)
        s, t = s * scale_s - (top_s * scale_s)[:, None], t * scale_t - (top_t * scale_t)[:, None]
        q, p = tl.exp2(s), tl.exp2(t)
        # log(p / q) is relative to both maxima, so its moment follows when either moves
        if DIVERGENCE == FORWARD_KL:
            moment = factor_t * (moment + sum_t * (moved_t - moved_s)) + _partial(p * (t - s))
        elif DIVERGENCE == REVERSE_KL:
            moment = factor_s * (moment + sum_s * (moved_s - moved_t)) + _partial(q * (s - t))
        sum_s = sum_s * factor_s + _partial(q)
        sum_t = sum_t * factor_t + _partial(p)
        max_s, max_t = top_s, top_t
    found = (max_s > MASKED / 2) & (max_t > MASKED / 2)  # below are also the -1e30 of a bias of -inf, of fp32 or fp64
    return max_s * scale_s, tl.sum(sum_s, 1), max_t * scale_t, tl.sum(sum_t, 1), tl.sum(moment, 1), found


@triton.jit
def _statistics(look, coefficient, FIRST: tl.constexpr, REVERSE: tl.constexpr, F: tl.constexpr):
    """(whether rows count, D of the first look, what rows are kept as) of rows whose coefficients count."""
    max_s, sum_s, max_t, sum_t, moment, found = look
    # A row of nothing but -inf has no distribution: it counts as masked. One with NaN does not.
    alive = (coefficient != 0) & (found | (sum_s + sum_t != sum_s + sum_t))
    sum_s, sum_t = tl.where(alive, sum_s, 1), tl.where(alive, sum_t, 1)
    factor = tl.where(alive, coefficient, 0)
    shift = log_1p((sum_t - sum_s) / sum_s)
    divergence, zero = moment, tl.zeros_like(shift)
    mean = zero
    if FIRST == FORWARD_KL:
        divergence = moment * LN2 / sum_t - shift
    elif FIRST == REVERSE_KL:
        divergence = moment * LN2 / sum_s + shift
    if REVERSE:
        mean, factor = with_infinity(divergence) * LOG2E, factor * LN2  # of log(p / q), base 2
    log_s, log_t = max_s + tl.log2(sum_s), max_t + tl.log2(sum_t)
    rounded = shift * LOG2E + ((max_t - log_t) - (max_s - log_s))
    return alive, divergence, (factor.to(F), log_s, log_t, rounded, mean, zero, zero)


@triton.jit
def _jsd_columns(s, t, row, beta):
    """What value_of, slope_of and coslope_of tell, of one logarithm: that of m over one of p and q, 1 + z.

    It is the one that weighs more in m, or the larger where they are far apart. Where p is so far below q that this may
    make a row saturated, 1 + z is m / (rest q), as in the gradient of such a row.
    """
    _, log_s, log_t, _, _, _, _ = row
    beta, rest, log_rest = beta.beta, beta.rest, beta.log_rest
    x = log_ratio_of(s, t, row)
    q, p = tl.exp2(s - log_s), tl.exp2(t - log_t)
    limit = tl.log2(tl.sqrt(rest) / (1 + tl.sqrt(rest)))
    low, over_p = x < limit, x > tl.where(beta > 0.5, tl.maximum(limit, -3), 3)
    y = tl.where(over_p, -x, x)
    near = tl.abs(y) < 0.5
    ratio, tail = tl.exp2(y), exp2_tail(y)
    minus1 = tl.where(near, y * (LN2 + tail), ratio - 1)
    weight = tl.where(over_p, rest, beta)  # of the other
    z = tl.where(low, beta / rest * ratio, weight * minus1)
    log_tail = z * log_1p_tail(z)
    log_z = tl.where(tl.abs(z) < FAR, z - log_tail, far_log_1p(z))
    log_m = log_z + tl.where(low, log_rest, 0)
    log_m_over_q = log_m + tl.where(over_p, x * LN2, 0)
    coslope = q * tl.where(low, log_z, log_m_over_q - log_rest)
    # p log(p / m) and q log(q / m), or e^y y - (e^y - 1) and (1 + z) log(1 + z) - z, which are both of second order
    far_value = weight * LN2 * y * tl.where(over_p, q, p) - (beta * p + rest * q) * log_m
    of_other, of_m = y * (LN2 * minus1 - tail), z * z - (1 + z) * log_tail
    value = tl.where(near, tl.where(over_p, p, q) * (weight * of_other - of_m), far_value)
    return value, q * log_m_over_q, coslope


@triton.jit
def _second_look(
    student,
    teacher,
    row,
    beta,
    key_mask,
    query_start,
    alive,
    end,
    keys,
    DIVERGENCE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDTH_S: tl.constexpr,
    WIDTH_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    F: tl.constexpr,
):
    """A second look at the row, for divergences without a closed form: (D, and of its statistics the last three)."""
    row = along(row, 1)
    value = tl.zeros((BLOCK_M,), F)
    mean, comean, sign = tl.zeros_like(value), tl.zeros_like(value), tl.zeros_like(value)
    for start in range(0, end, BLOCK_N):
        s, t, valid = both_scores(
            student, teacher, key_mask, query_start, alive, start, keys, CAUSAL, WIDTH_S, WIDTH_T, BLOCK_N, F
        )
        s, t = tl.where(valid, s, MASKED), tl.where(valid, t, MASKED)
        if DIVERGENCE == JSD:
            columns = _jsd_columns(s, t, row, beta)
        else:
            pair = tile_pair(s, t, row)
            columns = (
                value_of(pair, beta, DIVERGENCE), slope_of(pair, beta, DIVERGENCE), coslope_of(pair, beta, DIVERGENCE)
            )  # fmt: skip
            if DIVERGENCE == TVD or DIVERGENCE >= MIX + 32:
                q, difference = pair.q, pair.difference
                sign += tl.sum(tl.where(q > 0.5, (difference > 0).to(F) - (difference < 0).to(F), 0), 1)
        value += tl.sum(columns[0], 1)
        mean += tl.sum(columns[1], 1)
        comean += tl.sum(columns[2], 1)
    if DIVERGENCE == JSD:
        mean, comean = -beta.rest * mean, beta.rest * comean
    saturated = comean < mean
    return value, tl.where(saturated, -comean, mean), saturated.to(F), sign


@triton.jit
def forward_kernel(
    student_q,  # tuples over entries
    student_k,
    teacher_q,
    teacher_k,
    coefficients,  # [B, A, Lq]
    key_masks,  # [B, Lk], or no tuple but None
    losses,  # [B, A, Lq]
    stats,  # [B, A, STATS, Lq], or None
    lengths_q,
    lengths_k,
    student_bias,
    teacher_bias,
    heads,
    blocks,  # of queries, in the longest entry
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
    GROUP_S: tl.constexpr,
    GROUP_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    F: tl.constexpr,
):
    """Losses and statistics of a block of one head's rows."""
    entry, program = tl.program_id(1), tl.program_id(0)
    start, head = program % blocks * BLOCK_M, program // blocks
    b, a = (head // heads).to(tl.int64), head % heads
    queries, keys = choose(entry, lengths_q), choose(entry, lengths_k)
    query = start + tl.arange(0, BLOCK_M)
    exists = query < queries
    index = head.to(tl.int64) * queries + query
    coefficient = tl.load(choose(entry, coefficients) + index, mask=exists, other=0)
    alive = coefficient != 0
    end = tl.minimum(keys, start + BLOCK_M) if CAUSAL else keys
    end = tl.where(tl.max(alive.to(tl.int32), 0) == 0, 0, end)
    key_mask = None
    if key_masks is not None:
        key_mask = choose(entry, key_masks) + b * keys
    student = _model(
        entry, student_q, student_k, b, a, start, exists, student_scale, student_bias,
        GROUP_S, WIDTH_S, PADDED_S, BLOCK_M, F,
    )  # fmt: skip
    teacher = _model(
        entry, teacher_q, teacher_k, b, a, start, exists, teacher_scale, teacher_bias,
        GROUP_T, WIDTH_T, PADDED_T, BLOCK_M, F,
    )  # fmt: skip

    # a mix's reverse KL comes of the first look
    MIXED_REVERSE: tl.constexpr = DIVERGENCE >= MIX and DIVERGENCE // 2 % 2 == 1
    FIRST: tl.constexpr = REVERSE_KL if MIXED_REVERSE else DIVERGENCE
    SECOND: tl.constexpr = DIVERGENCE - 2 if MIXED_REVERSE else DIVERGENCE
    look = _first_look(
        student, teacher, key_mask, start, alive, end, keys, FIRST, CAUSAL, WIDTH_S, WIDTH_T, BLOCK_M, BLOCK_N, F
    )  # fmt: skip
    alive, divergence, row = _statistics(look, coefficient, FIRST, DIVERGENCE == REVERSE_KL, F)
    if DIVERGENCE >= JSD:
        b = beta_constants(beta, weights, F)
        factor, log_s, log_t, rounded, _, _, _ = row
        value, mean, saturated, sign = _second_look(
            student, teacher, row, b, key_mask, start, alive, end, keys,
            SECOND, CAUSAL, WIDTH_S, WIDTH_T, BLOCK_M, BLOCK_N, F,
        )  # fmt: skip
        if MIXED_REVERSE:
            mean += b.weights[REVERSE_KL] * with_infinity(divergence)
        divergence = b.weights[REVERSE_KL] * divergence + value if MIXED_REVERSE else value
        row = factor, log_s, log_t, rounded, mean, saturated, sign
    loss = tl.where(alive, coefficient * with_infinity(divergence).to(tl.float64), 0)
    tl.store(choose(entry, losses) + index, loss, mask=exists)
    if stats is not None:
        pointers = choose(entry, stats) + head.to(tl.int64) * STATS * queries + query
        for n in tl.static_range(STATS):
            tl.store(pointers + n * queries, row[n], mask=exists)
