"""The forward pass of attention_kl and relation_kl: losses, and seven numbers a row that its gradient needs."""

import triton
import triton.language as tl

from ..common import (
    FORWARD_KL,
    JSD,
    MIX,
    REVERSE_KL,
    _beta_constants,
    _choose,
    _coslope,
    _log_1p,
    _slope,
    _value,
    _with_infinity,
)  # fmt: skip
from .tiles import (
    LN2,
    LOG2E,
    MASKED,
    STATS,
    along,
    bias_of_head,
    both_scores,
    choose_head,
    load_head,
    log2_scale,
    tile_pair,
)  # fmt: skip


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
    """Both models' row maxima and sums of exponentials, and D where those and a moment give it."""
    max_s, max_t = tl.full((BLOCK_M,), MASKED, F), tl.full((BLOCK_M,), MASKED, F)
    sum_s, sum_t, moment = tl.zeros((BLOCK_M,), F), tl.zeros((BLOCK_M,), F), tl.zeros((BLOCK_M,), F)
    for start in range(0, end, BLOCK_N):
        s, t, valid = both_scores(
            student, teacher, key_mask, query_start, alive, start, keys, CAUSAL, WIDTH_S, WIDTH_T, BLOCK_N, F
        )
        s, t = tl.where(valid, s, MASKED), tl.where(valid, t, MASKED)
        top_s, top_t = tl.maximum(max_s, tl.max(s, 1)), tl.maximum(max_t, tl.max(t, 1))
        moved_s, moved_t = max_s - top_s, max_t - top_t
        factor_s, factor_t = tl.exp2(moved_s), tl.exp2(moved_t)
        s, t = s - top_s[:, None], t - top_t[:, None]
        q, p = tl.exp2(s), tl.exp2(t)
        # log(p / q) is relative to both maxima, so its moment follows when either moves
        if DIVERGENCE == FORWARD_KL:
            moment = factor_t * (moment + sum_t * (moved_t - moved_s)) + tl.sum(p * (t - s), 1)
        elif DIVERGENCE == REVERSE_KL:
            moment = factor_s * (moment + sum_s * (moved_s - moved_t)) + tl.sum(q * (s - t), 1)
        sum_s = sum_s * factor_s + tl.sum(q, 1)
        sum_t = sum_t * factor_t + tl.sum(p, 1)
        max_s, max_t = top_s, top_t
    return max_s, sum_s, max_t, sum_t, moment


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
    value, mean = tl.zeros((BLOCK_M,), F), tl.zeros((BLOCK_M,), F)
    comean, sign = tl.zeros((BLOCK_M,), F), tl.zeros((BLOCK_M,), F)
    for start in range(0, end, BLOCK_N):
        s, t, valid = both_scores(
            student, teacher, key_mask, query_start, alive, start, keys, CAUSAL, WIDTH_S, WIDTH_T, BLOCK_N, F
        )
        s, t = tl.where(valid, s, MASKED), tl.where(valid, t, MASKED)
        pair = tile_pair(s, t, row)
        value += tl.sum(_value(pair, beta, DIVERGENCE), 1)
        mean += tl.sum(_slope(pair, beta, DIVERGENCE), 1)
        comean += tl.sum(_coslope(pair, beta, DIVERGENCE), 1)
        _, q, difference, _, _, _, _ = pair
        sign += tl.sum(tl.where(q > 0.5, (difference > 0).to(F) - (difference < 0).to(F), 0), 1)
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
    queries, keys = _choose(entry, lengths_q), _choose(entry, lengths_k)
    query = start + tl.arange(0, BLOCK_M)
    exists = query < queries
    index = head.to(tl.int64) * queries + query
    coefficient = tl.load(_choose(entry, coefficients) + index, mask=exists, other=0)
    alive = coefficient != 0
    end = tl.minimum(keys, start + BLOCK_M) if CAUSAL else keys
    end = tl.where(tl.max(alive.to(tl.int32), 0) == 0, 0, end)
    key_mask = None
    if key_masks is not None:
        key_mask = _choose(entry, key_masks) + b * keys

    q = load_head(choose_head(entry, student_q, b, a, WIDTH_S), start, exists, WIDTH_S, PADDED_S, BLOCK_M)
    k = choose_head(entry, student_k, b, a // GROUP_S, WIDTH_S)
    student = q, k, log2_scale(student_scale, F), bias_of_head(student_bias, b, a)
    q = load_head(choose_head(entry, teacher_q, b, a, WIDTH_T), start, exists, WIDTH_T, PADDED_T, BLOCK_M)
    k = choose_head(entry, teacher_k, b, a // GROUP_T, WIDTH_T)
    teacher = q, k, log2_scale(teacher_scale, F), bias_of_head(teacher_bias, b, a)

    # a mix's reverse KL comes of the first look
    MIXED_REVERSE: tl.constexpr = DIVERGENCE >= MIX and DIVERGENCE // 2 % 2 == 1
    FIRST: tl.constexpr = REVERSE_KL if MIXED_REVERSE else DIVERGENCE
    SECOND: tl.constexpr = DIVERGENCE - 2 if MIXED_REVERSE else DIVERGENCE
    max_s, sum_s, max_t, sum_t, moment = _first_look(
        student, teacher, key_mask, start, alive, end, keys, FIRST, CAUSAL, WIDTH_S, WIDTH_T, BLOCK_M, BLOCK_N, F
    )  # fmt: skip
    # A row of nothing but -inf has no distribution: it counts as masked. One with NaN does not.
    alive &= ((max_s > MASKED) & (max_t > MASKED)) | (sum_s + sum_t != sum_s + sum_t)
    sum_s, sum_t = tl.where(alive, sum_s, 1), tl.where(alive, sum_t, 1)
    coefficient = tl.where(alive, coefficient, 0)
    shift = _log_1p((sum_t - sum_s) / sum_s)
    mean, saturated, sign = tl.zeros_like(shift), tl.zeros_like(shift), tl.zeros_like(shift)
    factor = coefficient
    if DIVERGENCE == FORWARD_KL:
        divergence = moment * LN2 / sum_t - shift
    elif FIRST == REVERSE_KL:
        divergence = moment * LN2 / sum_s + shift
    if DIVERGENCE == REVERSE_KL:
        mean, factor = _with_infinity(divergence) * LOG2E, coefficient * LN2  # of log(p / q), base 2
    log_s, log_t = max_s + tl.log2(sum_s), max_t + tl.log2(sum_t)
    rounded = shift * LOG2E + ((max_t - log_t) - (max_s - log_s))
    row = factor.to(F), log_s, log_t, rounded, mean, saturated, sign
    if DIVERGENCE >= JSD:
        b = _beta_constants(beta, weights, F)
        value, mean, saturated, sign = _second_look(
            student, teacher, row, b, key_mask, start, alive, end, keys,
            SECOND, CAUSAL, WIDTH_S, WIDTH_T, BLOCK_M, BLOCK_N, F,
        )  # fmt: skip
        if MIXED_REVERSE:
            mean += b[4][1] * _with_infinity(divergence)
            divergence = b[4][1] * divergence + value
        else:
            divergence = value
        row = factor.to(F), log_s, log_t, rounded, mean, saturated, sign
    loss = tl.where(alive, coefficient * _with_infinity(divergence).to(tl.float64), 0)
    tl.store(_choose(entry, losses) + index, loss, mask=exists)
    if stats is not None:
        pointers = _choose(entry, stats) + head.to(tl.int64) * STATS * queries + query
        for n in tl.static_range(STATS):
            tl.store(pointers + n * queries, row[n], mask=exists)
