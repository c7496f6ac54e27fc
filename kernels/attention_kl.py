"""attention_kl and relation_kl in Triton, for GPUs: no [Lq, Lk] tensor in device memory.

One program takes a block of one head's queries and goes through the keys in tiles (Dao et al., FlashAttention, 2022),
with the running softmax statistics of both models side by side. That is the forward pass; it leaves seven numbers a
row. The others recompute a tile of scores from them and have its gradient G = coefficient * dD/ds at once:

- `gradient_kernel` owns a block of queries and sums G k, or owns a block of keys and sums G^T q. In relation_kl the
  queries are the keys and S is symmetric, so one pass over S_ij yields both G_ij and G_ji for the block's (G + G^T) x.
- `bias_kernel` owns a tile of the bias and sums G over what the bias is broadcast along.
- `diagonals_kernel` sums G along diagonals, for T5's bias of the distance between key and query.

No program adds to what another wrote: results do not depend on scheduling. relation_kl takes the relations of a layer
(Q, K, V) as entries of one launch.

The mathematics is that of csrc/divergence.h. Unlike there, scores are no inputs but results of fp32 arithmetic, whose
rounding outweighs what compensated sums would save. What remains of the care is that q - p is computed from
log(p / q), and that log(p / q) gets back what rounding took from the logarithms of the sums.

B batch, A heads, Lq queries, Lk keys, H = A d hidden. What varies from batch to batch is a run-time argument. Keys may
have fewer heads, each for a GROUP of neighbouring heads of queries: programs go by the queries' heads, and what each
gives to the gradient of a key waits in a buffer to be summed up.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.dtypes import fp16_lift, gradient_dtype, score_dtype
from .common import (
    FORWARD_KL,
    JSD,
    MIX,
    REVERSE_KL,
    TVD,
    _beta_constants,
    _choose,
    _coslope,
    _dot,
    _double,
    _load_valid,
    _log_1p,
    _pair_of,
    _slope,
    _unmasked,
    _value,
    _with_infinity,
    beta_arguments,
)
from .tuning import launch

__all__ = ["attention_kl", "relation_kl"]

T = TypeVar("T")

# The score of a masked key: low enough for a probability of exactly zero, and finite, so that differences are too.
MASKED = tl.constexpr(-1e30)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# What a row is kept as: coefficient, the logarithms log_s and log_t of both models' sums of exponentials, what rounding
# took from log_t - log_s, mean of u, saturated, and for TVD the sign of q - p at the key with most of q (or 0).
STATS = tl.constexpr(7)

# ---- memory ----------------------------------------------------------------------------------------------------------
# A matrix is (pointer, batch stride, row stride), and (pointer, row stride) once batch and head are known.


@triton.jit
def _choose_head(index, matrices, b, a, WIDTH: tl.constexpr):
    """Head `a` of sequence `b` of matrices[index]."""
    pointer, batch_stride, row_stride = matrices[0]
    for n in tl.static_range(1, len(matrices)):
        pointer = tl.where(index == n, matrices[n][0], pointer)
        batch_stride = tl.where(index == n, matrices[n][1], batch_stride)
        row_stride = tl.where(index == n, matrices[n][2], row_stride)
    return pointer + b * batch_stride + a * WIDTH, row_stride


@triton.jit
def _head(matrix, b, a, WIDTH: tl.constexpr):
    pointer, batch_stride, row_stride = matrix
    return pointer + b * batch_stride + a * WIDTH, row_stride


@triton.jit
def _pointers(matrix, start, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to rows [BLOCK, PADDED] of one head, and which columns exist. Offsets inside a block stay below 2^31."""
    pointer, stride = matrix
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, PADDED)[None, :]
    return pointer + tl.cast(start, tl.int64) * stride + (row * stride + column), column < WIDTH


@triton.jit
def _load(matrix, start, used, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [BLOCK, PADDED] of one head, zero where they are not used: a masked NaN times zero would still be NaN."""
    pointers, exists = _pointers(matrix, start, WIDTH, PADDED, BLOCK)
    return tl.load(pointers, mask=used[:, None] & exists, other=0)


@triton.jit
def _load_stats(stats, position, queries):
    """The statistics of a block of rows. Rows that do not exist have a coefficient of zero."""
    pointers, exists = stats + position, position < queries
    return (
        tl.load(pointers, mask=exists, other=0),
        tl.load(pointers + queries, mask=exists),
        tl.load(pointers + 2 * queries, mask=exists),
        tl.load(pointers + 3 * queries, mask=exists),
        tl.load(pointers + 4 * queries, mask=exists),
        tl.load(pointers + 5 * queries, mask=exists),
        tl.load(pointers + 6 * queries, mask=exists),
    )


# ---- scores ----------------------------------------------------------------------------------------------------------
# They and all logarithms are base 2, the GPU's own: scales carry log2(e), and an exponential is one instruction.
# A bias of one sequence and head is (pointer, query stride, key stride) or, by distance, (pointer, reach), or () where
# there is none.


@triton.jit
def _log2_scale(scale, F: tl.constexpr):
    return (_double(scale) * LOG2E).to(F)


@triton.jit
def _bias_of(bias, b, a):
    if bias is None:
        head = ()
    elif len(bias) == 2:
        head = bias[0] + a * (2 * bias[1] + 1), bias[1]
    else:
        head = bias[0] + b * bias[1] + a * bias[2], bias[3], bias[4]
    return head


@triton.jit
def _load_bias(bias, query_start, key_start, query, key, used, F: tl.constexpr):
    """The bias of a tile: of query_start + query and key_start + key."""
    if len(bias) == 2:
        pointer, reach = bias
        distance = (key_start - query_start) + (key - query)
        pointers = pointer + reach + tl.minimum(tl.maximum(distance, -reach), reach)
    else:
        pointer, query_stride, key_stride = bias
        pointer += tl.cast(query_start, tl.int64) * query_stride + tl.cast(key_start, tl.int64) * key_stride
        pointers = pointer + (query * query_stride + key * key_stride)
    return tl.load(pointers, mask=used, other=0).to(F)


@triton.jit
def _scores(own, other, scale, bias, query_start, key_start, query, key, used, F: tl.constexpr):
    """[own, other] scores; `used` says which of them matter."""
    s = scale * _dot(own, tl.trans(other), F)
    if len(bias) > 0:
        s = _unmasked(s + _load_bias(bias, query_start, key_start, query, key, used, F) * LOG2E)
    return s


@triton.jit
def _log_probabilities(s, t, row):
    """log q, log p and log(p / q). The statistics of their rows have been broadcast along keys."""
    _, log_s, log_t, rounded, _, _, _ = row
    log_q, log_p = s - log_s, t - log_t
    return log_q, log_p, log_p - log_q - rounded


@triton.jit
def _pair(s, t, row):
    log_q, log_p, log_ratio = _log_probabilities(s, t, row)
    return _pair_of(tl.exp2(tl.maximum(log_q, log_p)), log_ratio * LN2)


@triton.jit
def _exp2_minus1(x):
    """2^x - 1 for |x| < 1/2, accurate near 0."""
    if x.dtype == tl.float64:
        x *= LN2
        poly = x * 0 + 1
        for k in tl.static_range(14, 1, -1):
            poly = 1 + x * poly / k
    else:  # relative error 1e-8
        poly = 1.540351223e-4 * x + 1.339073526e-3
        poly = poly * x + 9.618237615e-3
        poly = poly * x + 5.550357327e-2
        poly = poly * x + 2.402264923e-1
        poly = poly * x + 6.931471825e-1
    return x * poly


@triton.jit
def _difference(s, t, row):
    """q - p, to full relative accuracy."""
    log_q, log_p, log_ratio = _log_probabilities(s, t, row)
    q, p = tl.exp2(log_q), tl.exp2(log_p)
    return tl.where(tl.abs(log_ratio) < 0.5, p * _exp2_minus1(-log_ratio), q - p)


@triton.jit
def _along(row, AXIS: tl.constexpr):
    """The statistics of a block of rows, broadcast along axis `AXIS` of a tile."""
    coefficient, log_s, log_t, rounded, mean, saturated, sign = row
    return (
        tl.expand_dims(coefficient, AXIS),
        tl.expand_dims(log_s, AXIS),
        tl.expand_dims(log_t, AXIS),
        tl.expand_dims(rounded, AXIS),
        tl.expand_dims(mean, AXIS),
        tl.expand_dims(saturated, AXIS),
        tl.expand_dims(sign, AXIS),
    )


@triton.jit
def _gradient_of(s, t, row, beta, used, DIVERGENCE: tl.constexpr):
    """coefficient * dD/ds for a tile, zero where it is not used, whatever the scores are there."""
    coefficient, _, _, _, mean, saturated, sign = row
    if DIVERGENCE == FORWARD_KL:
        gradient = _difference(s, t, row)
    elif DIVERGENCE == REVERSE_KL:
        log_q, _, log_ratio = _log_probabilities(s, t, row)
        gradient = -tl.exp2(log_q) * (log_ratio + mean)
    else:
        pair = _pair(s, t, row)
        # of a mix tvd, and forward and reverse KL, stay apart
        OTHERS: tl.constexpr = MIX + DIVERGENCE % 32 // 4 * 4 if DIVERGENCE >= MIX else DIVERGENCE
        slope, coslope = _slope(pair, beta, OTHERS), _coslope(pair, beta, OTHERS)
        if DIVERGENCE == TVD or DIVERGENCE >= MIX + 32:
            # It jumps at p = q, and every kernel rounds scores in its own way. Where nearly all of q is at one key,
            # the mean is u there: taken with the other sign here, it would not cancel.
            q = pair[1]
            of_tvd = tl.where(q > 0.5, 0.5 * sign * q, _slope(pair, beta, TVD))
            counter = tl.where(q > 0.5, 0.5 * (q - sign * q), _coslope(pair, beta, TVD))
            if DIVERGENCE == TVD:
                slope, coslope = of_tvd, counter
            else:
                slope, coslope = slope + beta[4][5] * of_tvd, coslope + beta[4][5] * counter
        slope = tl.where(saturated != 0, -coslope, slope)
        if DIVERGENCE >= MIX and DIVERGENCE // 2 % 2 == 1:  # centred before it is rounded
            gradient = slope - pair[1] * beta[4][1] * (pair[3] + mean / beta[4][1])
        else:
            gradient = slope - pair[1] * mean
        if DIVERGENCE >= MIX and DIVERGENCE % 2 == 1:
            gradient += beta[4][0] * pair[2]
    return tl.where(used, coefficient * gradient, 0)


# ---- forward ---------------------------------------------------------------------------------------------------------
# Here and in the bias kernels a model is (its block of queries, all of the head's keys, scale, bias).


@triton.jit
def _both_scores(
    student,
    teacher,
    key_mask,
    query_start,
    alive,
    start,
    keys,
    CAUSAL: tl.constexpr,
    WIDTH_S: tl.constexpr,
    WIDTH_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    F: tl.constexpr,
):
    """Both models' scores for a tile of keys, and which of them are not masked."""
    q, k, scale, bias = student
    tq, tk, teacher_scale, teacher_bias = teacher
    i, j = tl.arange(0, q.shape[0])[:, None], tl.arange(0, BLOCK_N)[None, :]
    key = start + tl.arange(0, BLOCK_N)
    valid = _load_valid(key_mask, key, keys)[None, :]
    if CAUSAL:
        valid = valid & (start + j <= query_start + i)
    used = valid
    if len(bias) > 0 or len(teacher_bias) > 0:
        used = valid & alive[:, None]
    key_rows = _load(k, start, key < keys, WIDTH_S, q.shape[1], BLOCK_N)
    s = _scores(q, key_rows, scale, bias, query_start, start, i, j, used, F)
    key_rows = _load(tk, start, key < keys, WIDTH_T, tq.shape[1], BLOCK_N)
    t = _scores(tq, key_rows, teacher_scale, teacher_bias, query_start, start, i, j, used, F)
    return s, t, valid


@triton.jit
def _statistics(
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
        s, t, valid = _both_scores(
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
def _mean_value(
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
    row = _along(row, 1)
    value, mean = tl.zeros((BLOCK_M,), F), tl.zeros((BLOCK_M,), F)
    comean, sign = tl.zeros((BLOCK_M,), F), tl.zeros((BLOCK_M,), F)
    for start in range(0, end, BLOCK_N):
        s, t, valid = _both_scores(
            student, teacher, key_mask, query_start, alive, start, keys, CAUSAL, WIDTH_S, WIDTH_T, BLOCK_N, F
        )
        s, t = tl.where(valid, s, MASKED), tl.where(valid, t, MASKED)
        pair = _pair(s, t, row)
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

    q = _load(_choose_head(entry, student_q, b, a, WIDTH_S), start, exists, WIDTH_S, PADDED_S, BLOCK_M)
    k = _choose_head(entry, student_k, b, a // GROUP_S, WIDTH_S)
    student = q, k, _log2_scale(student_scale, F), _bias_of(student_bias, b, a)
    q = _load(_choose_head(entry, teacher_q, b, a, WIDTH_T), start, exists, WIDTH_T, PADDED_T, BLOCK_M)
    k = _choose_head(entry, teacher_k, b, a // GROUP_T, WIDTH_T)
    teacher = q, k, _log2_scale(teacher_scale, F), _bias_of(teacher_bias, b, a)

    # a mix's reverse KL comes of the first look
    MIXED_REVERSE: tl.constexpr = DIVERGENCE >= MIX and DIVERGENCE // 2 % 2 == 1
    FIRST: tl.constexpr = REVERSE_KL if MIXED_REVERSE else DIVERGENCE
    SECOND: tl.constexpr = DIVERGENCE - 2 if MIXED_REVERSE else DIVERGENCE
    max_s, sum_s, max_t, sum_t, moment = _statistics(
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
        value, mean, saturated, sign = _mean_value(
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


# ---- gradients of queries and keys -----------------------------------------------------------------------------------
# `own` is the block that a program sums up for, `other` what it goes through in tiles.


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
            row = _load_stats(stats, position, others)
            alive = row[0] != 0
            as_key = own_valid[:, None] & alive[None, :]
            read = valid | alive if AS_QUERY else alive
            if CAUSAL:
                as_key &= own_start + i <= start + j

        other_x = _load(x, start, read, WIDTH_S, own_x.shape[1], BLOCK_N)
        other_y = _load(y, start, read, WIDTH_T, own_y.shape[1], BLOCK_N)
        where = (own_start, start, i, j, as_query) if AS_QUERY else (start, own_start, j, i, as_key)
        s = _scores(own_x, other_x, scales[0], biases[0], *where, F)
        t = _scores(own_y, other_y, scales[1], biases[1], *where, F)
        if AS_QUERY:
            gradient = _gradient_of(s, t, _along(own_row, 1), beta, as_query, DIVERGENCE)
            if AS_KEY:
                gradient += _gradient_of(s, t, _along(row, 0), beta, as_key, DIVERGENCE)
        else:
            gradient = _gradient_of(s, t, _along(row, 0), beta, as_key, DIVERGENCE)
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
        row = _load_stats(head_stats, position, queries)
        read = row[0] != 0
    if AS_KEY:
        valid = _load_valid(key_mask, position, keys)
        read = read | valid if AS_QUERY else valid
    own_s, other_s = (a, a // GROUP_S) if AS_QUERY else (a // GROUP_S, a)
    own_t, other_t = (a, a // GROUP_T) if AS_QUERY else (a // GROUP_T, a)
    x = _load(_choose_head(entry, student_own, b, own_s, WIDTH_S), start, read, WIDTH_S, PADDED_S, BLOCK_M)
    y = _load(_choose_head(entry, teacher_own, b, own_t, WIDTH_T), start, read, WIDTH_T, PADDED_T, BLOCK_M)
    own = x, y, start, valid, row
    x = _choose_head(entry, student_other, b, other_s, WIDTH_S)
    y = _choose_head(entry, teacher_other, b, other_t, WIDTH_T)
    other = x, y, head_stats, other_count
    scales = _log2_scale(student_scale, F), _log2_scale(teacher_scale, F)
    biases = _bias_of(student_bias, b, a), _bias_of(teacher_bias, b, a)
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
    pointers, exists = _pointers((gradient, hidden), start, WIDTH_S, PADDED_S, BLOCK_M)
    total *= _double(student_scale).to(F) / lift
    tl.store(pointers, total.to(gradient.dtype.element_ty), mask=(position < own_count)[:, None] & exists)


# ---- gradient of the bias --------------------------------------------------------------------------------------------


@triton.jit
def _model(
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
):
    tile = _load(_head(q, b, a, WIDTH), start, exists, WIDTH, PADDED, BLOCK)
    return tile, _head(k, b, a // GROUP, WIDTH), scale, _bias_of(bias, b, a)


@triton.jit
def bias_kernel(
    student_q,
    student_k,
    teacher_q,
    teacher_k,
    stats,  # [B, A, STATS, Lq]
    key_mask,  # [B, Lk], or None
    gradient,  # [B or 1, A or 1, Lq or 1, Lk]
    queries,
    keys,
    student_bias,
    teacher_bias,
    heads,
    key_blocks,
    query_blocks,
    bias_heads,
    batches_summed,  # how many sequences, heads and blocks of queries share the bias
    heads_summed,
    blocks_summed,
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
    SUM_QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    F: tl.constexpr,
):
    """The gradient of a tile of the bias, or of a stretch of keys where all queries share it."""
    program = tl.program_id(0)
    key_start, program = program % key_blocks * BLOCK_N, program // key_blocks
    query_block, program = program % query_blocks, program // query_blocks
    first_a, first_b = program % bias_heads, program // bias_heads
    key = key_start + tl.arange(0, BLOCK_N)
    scale, teacher_scale = _log2_scale(student_scale, F), _log2_scale(teacher_scale, F)
    b_constants = _beta_constants(beta, weights, F)
    total = tl.zeros((BLOCK_M, BLOCK_N), F)
    first_block = query_block
    if CAUSAL:  # blocks of queries that are before all of the keys
        first_block = tl.maximum(query_block, key_start // BLOCK_M)
        blocks_summed = tl.maximum(blocks_summed - (first_block - query_block), 0)
    for step in range(batches_summed * heads_summed * blocks_summed):
        start = (first_block + step % blocks_summed) * BLOCK_M
        a = first_a + step // blocks_summed % heads_summed
        b = tl.cast(first_b + step // blocks_summed // heads_summed, tl.int64)
        query = start + tl.arange(0, BLOCK_M)
        row = _load_stats(stats + (b * heads + a) * STATS * queries, query, queries)
        alive = row[0] != 0
        student = _model(
            student_q, student_k, b, a, start, alive, scale, student_bias, GROUP_S, WIDTH_S, PADDED_S, BLOCK_M
        )
        teacher = _model(
            teacher_q, teacher_k, b, a, start, alive, teacher_scale, teacher_bias, GROUP_T, WIDTH_T, PADDED_T, BLOCK_M
        )
        mask = None
        if key_mask is not None:
            mask = key_mask + b * keys
        s, t, valid = _both_scores(
            student, teacher, mask, start, alive, key_start, keys, CAUSAL, WIDTH_S, WIDTH_T, BLOCK_N, F
        )
        total += _gradient_of(s, t, _along(row, 1), b_constants, valid & alive[:, None], DIVERGENCE)
    exists = key < keys
    gradient += tl.cast(program, tl.int64) * (1 if SUM_QUERIES else queries) * keys
    if SUM_QUERIES:
        tl.store(gradient + key, tl.sum(total, 0).to(gradient.dtype.element_ty), mask=exists)
    else:
        query = query_block * BLOCK_M + tl.arange(0, BLOCK_M)
        pointers = gradient + query.to(tl.int64)[:, None] * keys + key[None, :]
        exists = (query < queries)[:, None] & exists[None, :]
        tl.store(pointers, total.to(gradient.dtype.element_ty), mask=exists)


@triton.jit
def _put_diagonals(sums, first, out, reach, BLOCK: tl.constexpr):
    """Stores the sums of diagonals first, first + 1, ...; returns those of the two ends, which others add to."""
    distance = first + tl.arange(0, BLOCK)
    tl.store(out + reach + distance, sums, mask=(distance > -reach) & (distance < reach))
    low, high = tl.where(distance <= -reach, sums, 0), tl.where(distance >= reach, sums, 0)
    return tl.sum(low, 0), tl.sum(high, 0)


@triton.jit
def diagonals_kernel(
    student_q,
    student_k,
    teacher_q,
    teacher_k,
    stats,  # [B, A, STATS, Lq]
    key_mask,  # [B, Lk], or None
    partial,  # [B, A, blocks, 2 reach + 1], zeroed
    queries,
    keys,
    student_bias,
    teacher_bias,
    heads,
    blocks,
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
    BLOCK: tl.constexpr,
    F: tl.constexpr,
):
    """Sums of a block of queries along diagonals: what the gradient of a bias by distance is made of.

    Row i of a tile is turned left by i, so that diagonals become columns. What falls out on the left comes back on the
    right: those are the diagonals of the tile before, where its own sums wait for them.
    """
    program = tl.program_id(0)
    start, head = program % blocks * BLOCK, program // blocks
    b, a = (head // heads).to(tl.int64), head % heads
    reach = student_bias[1]
    out = partial + program.to(tl.int64) * (2 * reach + 1)
    if key_mask is not None:
        key_mask += b * keys
    i, j = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    query = start + i
    row = _load_stats(stats + head.to(tl.int64) * STATS * queries, query, queries)
    alive = row[0] != 0
    scale, teacher_scale = _log2_scale(student_scale, F), _log2_scale(teacher_scale, F)
    student = _model(student_q, student_k, b, a, start, alive, scale, student_bias, GROUP_S, WIDTH_S, PADDED_S, BLOCK)
    teacher = _model(
        teacher_q, teacher_k, b, a, start, alive, teacher_scale, teacher_bias, GROUP_T, WIDTH_T, PADDED_T, BLOCK
    )
    b_constants = _beta_constants(beta, weights, F)

    turned = i[:, None] + j[None, :]
    waiting = tl.zeros((BLOCK,), F)
    low, high = tl.zeros((), F), tl.zeros((), F)
    end = tl.minimum(keys, start + BLOCK) if CAUSAL else keys
    for key_start in range(0, end, BLOCK):
        s, t, valid = _both_scores(
            student, teacher, key_mask, start, alive, key_start, keys, CAUSAL, WIDTH_S, WIDTH_T, BLOCK, F
        )
        gradient = _gradient_of(s, t, _along(row, 1), b_constants, valid & alive[:, None], DIVERGENCE)
        gradient = tl.gather(gradient, turned % BLOCK, 1)
        waiting += tl.sum(tl.where(turned < BLOCK, 0, gradient), 0)
        ends = _put_diagonals(waiting, key_start - BLOCK - start, out, reach, BLOCK)
        low, high = low + ends[0], high + ends[1]
        waiting = tl.sum(tl.where(turned < BLOCK, gradient, 0), 0)
    last = tl.cdiv(end, BLOCK) * BLOCK - BLOCK - start
    ends = _put_diagonals(waiting, last, out, reach, BLOCK)
    tl.store(out, low + ends[0])
    tl.store(out + 2 * reach, high + ends[1])


# ---- launch ----------------------------------------------------------------------------------------------------------
# Relations that one launch takes: queries, keys and values of a layer.
ENTRIES = 3

Bias = tuple | None


@dataclass(frozen=True)
class _Setting:
    """What all kernels of a call, or of a group of relations, have in common."""

    num_heads: int
    width_s: int  # of a head
    width_t: int
    group_s: int  # heads of queries that share one of keys
    group_t: int
    student_scale: float
    teacher_scale: float
    causal: bool
    divergence: int
    beta: float | tuple[float, ...]
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype

    def launch(self, kernel: str, case: tuple, run: Callable[[dict], T]) -> T:
        size = max(self.student_dtype.itemsize, min(self.teacher_dtype.itemsize, 4))
        width = max(16, triton.next_power_of_2(max(self.width_s, self.width_t)))
        return launch(kernel, size, width, (self, case), run)

    def constants(self) -> dict:
        return {
            "student_scale": self.student_scale,
            "teacher_scale": self.teacher_scale,
            **beta_arguments(self.beta),
            "DIVERGENCE": self.divergence,
            "WIDTH_S": self.width_s,
            "WIDTH_T": self.width_t,
            "PADDED_S": max(16, triton.next_power_of_2(self.width_s)),
            "PADDED_T": max(16, triton.next_power_of_2(self.width_t)),
            "GROUP_S": self.group_s,
            "GROUP_T": self.group_t,
            "F": tl.float64 if self.student_dtype == torch.float64 else tl.float32,
        }


def _group(q: Tensor, k: Tensor) -> int:
    """How many heads of queries share one of keys."""
    return max(1, q.shape[2] // max(1, k.shape[2]))


def _hashable(beta: float | Sequence[float]) -> float | tuple[float, ...]:
    return float(beta) if isinstance(beta, (int, float)) else tuple(beta)


@dataclass
class _Entry:
    """One relation of relation_kl, or the one call of attention_kl."""

    student_q: Tensor  # [B, Lq, Hs]
    student_k: Tensor  # [B, Lk, Hs]
    teacher_q: Tensor  # [B, Lq, Ht]
    teacher_k: Tensor  # [B, Lk, Ht]
    coefficient: Tensor  # [B, A, Lq]
    key_mask: Tensor | None  # [B, Lk]
    loss: Tensor  # [B, A, Lq]
    stats: Tensor | None  # [B, A, STATS, Lq]
    lift: Tensor | None  # 0-d


def _entry(
    student_q, student_k, teacher_q, teacher_k, coefficient, key_mask, divergence: int, beta, grad: bool
) -> _Entry:
    batch, heads, queries = coefficient.shape
    double = student_q.dtype == torch.float64
    stats = coefficient.new_empty(
        (batch, heads, STATS.value, queries), dtype=torch.float64 if double else torch.float32
    )
    lifted = grad and student_q.dtype == torch.float16
    lift = fp16_lift(coefficient.abs().amax(), divergence, beta).float() if lifted else None
    matrices = [x if x.stride(-1) == 1 else x.contiguous() for x in (student_q, student_k, teacher_q, teacher_k)]
    return _Entry(
        *matrices,
        coefficient.contiguous(),
        None if key_mask is None else key_mask.contiguous(),
        torch.empty_like(coefficient, memory_format=torch.contiguous_format),
        stats if grad else None,
        lift,
    )


def _matrices(xs: list[Tensor]) -> tuple:
    return tuple((x, x.stride(0), x.stride(1)) for x in xs)


def _bias(bias: Tensor | None, coefficient: Tensor, keys: int) -> Bias:
    """As the kernels take it: by distance (diagonals, reach), or (tensor, its four strides)."""
    if bias is None:
        return None
    if bias.dim() == 2:
        return bias.contiguous(), bias.shape[1] // 2
    return bias, *bias.expand(*coefficient.shape, keys).stride()


def _kind(bias: Bias) -> int | None:
    """Dense, by distance, or none."""
    return None if bias is None else len(bias)


def _forward(entries: list[_Entry], setting: _Setting, student_bias: Bias, teacher_bias: Bias) -> None:
    lengths = tuple(e.coefficient.shape[2] for e in entries)
    key_lengths = tuple(e.student_k.shape[1] for e in entries)
    batch = entries[0].coefficient.shape[0]
    key_masks = None if entries[0].key_mask is None else tuple(e.key_mask for e in entries)
    stats = None if entries[0].stats is None else tuple(e.stats for e in entries)

    def run(options: dict) -> None:
        blocks = triton.cdiv(max(lengths), options["BLOCK_M"])
        forward_kernel[(blocks * batch * setting.num_heads, len(entries))](
            _matrices([e.student_q for e in entries]),
            _matrices([e.student_k for e in entries]),
            _matrices([e.teacher_q for e in entries]),
            _matrices([e.teacher_k for e in entries]),
            tuple(e.coefficient for e in entries),
            key_masks,
            tuple(e.loss for e in entries),
            stats,
            lengths,
            key_lengths,
            student_bias,
            teacher_bias,
            setting.num_heads,
            blocks,
            CAUSAL=setting.causal,
            **setting.constants(),
            **options,
        )

    biases = _kind(student_bias), _kind(teacher_bias)
    kernel = "mix_forward" if setting.divergence >= MIX.value else "forward"
    setting.launch(kernel, (batch, lengths, key_lengths, key_masks is None, stats is None, *biases), run)


def _gradient(
    entries: list[_Entry], setting: _Setting, student_bias: Bias, teacher_bias: Bias, as_query: bool, as_key: bool
) -> list[Tensor]:
    """The gradients of the entries' queries, keys, or what is both."""
    student = [e.student_q for e in entries], [e.student_k for e in entries]
    teacher = [e.teacher_q for e in entries], [e.teacher_k for e in entries]
    own, other = (0, 1) if as_query else (1, 0)
    gradients = [_empty_gradient(x) for x in student[own]]
    lengths, other_lengths = (tuple(x.shape[1] for x in student[side]) for side in (own, other))
    batch = student[own][0].shape[0]
    shared = not as_query and setting.group_s > 1
    if shared:
        gradients = [
            x.new_empty(*x.shape[:2], setting.group_s * x.shape[2], dtype=score_dtype(x)) for x in student[own]
        ]
    key_masks = None if entries[0].key_mask is None else tuple(e.key_mask for e in entries)

    def run(options: dict) -> None:
        blocks = triton.cdiv(max(lengths), options["BLOCK_M"])
        gradient_kernel[(blocks * batch * setting.num_heads, len(entries))](
            _matrices(student[own]),
            _matrices(student[other]),
            _matrices(teacher[own]),
            _matrices(teacher[other]),
            tuple(e.stats for e in entries),
            key_masks,
            None if entries[0].lift is None else tuple(e.lift for e in entries),
            tuple(gradients),
            lengths,
            other_lengths,
            student_bias,
            teacher_bias,
            setting.num_heads,
            blocks,
            CAUSAL=setting.causal,
            AS_QUERY=as_query,
            AS_KEY=as_key,
            **setting.constants(),
            **options,
        )

    kernel = "mixture_gradient" if setting.divergence >= JSD.value else "gradient"
    kernel = "mix_gradient" if setting.divergence >= MIX.value else kernel
    biases = _kind(student_bias), _kind(teacher_bias)
    setting.launch(kernel, (batch, lengths, other_lengths, key_masks is None, as_query, as_key, *biases), run)
    if shared:
        parts = [g.unflatten(2, (-1, setting.group_s, setting.width_s)) for g in gradients]
        gradients = [g.sum(3).flatten(2).to(gradient_dtype(x)) for g, x in zip(parts, student[own], strict=True)]
    return gradients


def _bias_gradient(
    entry: _Entry, setting: _Setting, student_bias: Bias, teacher_bias: Bias, shape: torch.Size, out: torch.dtype
) -> Tensor:
    batch, heads, queries = entry.coefficient.shape
    keys = entry.student_k.shape[1]
    matrices = [
        (x, x.stride(0), x.stride(1)) for x in (entry.student_q, entry.student_k, entry.teacher_q, entry.teacher_k)
    ]
    case = batch, queries, keys, entry.key_mask is None, tuple(shape), _kind(student_bias), _kind(teacher_bias)

    def run_diagonals(options: dict) -> Tensor:
        blocks = triton.cdiv(queries, options["BLOCK"])
        partial = entry.stats.new_zeros(batch, heads, blocks, shape[1])
        diagonals_kernel[(batch * heads * blocks,)](
            *matrices,
            entry.stats,
            entry.key_mask,
            partial,
            queries,
            keys,
            student_bias,
            teacher_bias,
            heads,
            blocks,
            CAUSAL=setting.causal,
            **setting.constants(),
            **options,
        )
        return partial.sum((0, 2), dtype=torch.float64).to(out)

    if len(shape) == 2:
        return setting.launch("diagonals", case, run_diagonals)
    gradient = torch.empty(shape, dtype=out, device=entry.student_q.device)
    if shape[3] != keys:  # a row's gradients add up to zero
        return gradient.zero_()
    sum_queries = shape[2] != queries

    def run(options: dict) -> None:
        blocks, key_blocks = triton.cdiv(queries, options["BLOCK_M"]), triton.cdiv(keys, options["BLOCK_N"])
        query_blocks, blocks_summed = (1, blocks) if sum_queries else (blocks, 1)
        bias_kernel[(key_blocks * query_blocks * shape[0] * shape[1],)](
            *matrices,
            entry.stats,
            entry.key_mask,
            gradient,
            queries,
            keys,
            student_bias,
            teacher_bias,
            heads,
            key_blocks,
            query_blocks,
            shape[1],
            batch // shape[0],
            heads // shape[1],
            blocks_summed,
            CAUSAL=setting.causal,
            SUM_QUERIES=sum_queries,
            **setting.constants(),
            **options,
        )

    setting.launch("bias", case, run)
    return gradient


def _empty_gradient(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=gradient_dtype(x), device=x.device)


def _no_gradient(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=gradient_dtype(x), device=x.device)


def attention_kl(
    student_q: Tensor,  # [B, Lq, Hs]
    student_k: Tensor,  # [B, Lk, Hs], or narrower
    teacher_q: Tensor,  # [B, Lq, Ht]
    teacher_k: Tensor,  # [B, Lk, Ht]
    student_bias: Tensor | None,  # [B, A, Lq, Lk], any of them 1, or diagonals [A, 2 reach + 1]
    teacher_bias: Tensor | None,
    coefficient: Tensor,  # [B, A, Lq]
    key_mask: Tensor | None,  # [B, Lk]
    causal: bool,
    num_heads: int,
    student_scale: float,
    teacher_scale: float,
    gradients: list[bool],  # of student_q, student_k, student_bias
    divergence: int,
    beta: float | Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(coefficient * D of every row, its gradients; those not wanted are empty)"""
    entry = _entry(student_q, student_k, teacher_q, teacher_k, coefficient, key_mask, divergence, beta, any(gradients))
    setting = _Setting(
        num_heads,
        student_q.shape[2] // num_heads,
        teacher_q.shape[2] // num_heads,
        _group(student_q, student_k),
        _group(teacher_q, teacher_k),
        float(student_scale),
        float(teacher_scale),
        causal,
        divergence,
        _hashable(beta),
        student_q.dtype,
        teacher_q.dtype,
    )
    biases = _bias(student_bias, coefficient, student_k.shape[1]), _bias(teacher_bias, coefficient, student_k.shape[1])
    grad_q, grad_k, grad_bias = (_no_gradient(student_q) for _ in range(3))  # outputs of an op may not alias
    with torch.cuda.device_of(student_q):
        _forward([entry], setting, *biases)
        if gradients[0]:
            (grad_q,) = _gradient([entry], setting, *biases, as_query=True, as_key=False)
        if gradients[1]:
            (grad_k,) = _gradient([entry], setting, *biases, as_query=False, as_key=True)
        if gradients[2]:
            assert student_bias is not None
            grad_bias = _bias_gradient(
                entry, setting, *biases, shape=student_bias.shape, out=gradient_dtype(student_bias)
            )
    return entry.loss, grad_q, grad_k, grad_bias


def relation_kl(
    student: list[Tensor],  # [B, L, Hs] each; lengths and widths may differ
    teacher: list[Tensor],  # [B, L, Ht]
    coefficient: list[Tensor],  # [B, A, L]
    key_mask: list[Tensor | None],  # [B, L]
    causal: list[bool],
    num_heads: int,
    gradients: list[bool],
    divergence: int,
    beta: float | Sequence[float],
) -> tuple[list[Tensor], list[Tensor]]:
    """(coefficient * D of every row, its gradients; those not wanted are empty) for every relation."""
    entries = [
        _entry(s, s, t, t, c, mask, divergence, beta, grad)
        for s, t, c, mask, grad in zip(student, teacher, coefficient, key_mask, gradients, strict=True)
    ]
    found = [_no_gradient(x) for x in student]
    together: dict[tuple, list[int]] = {}
    for n, (entry, is_causal) in enumerate(zip(entries, causal, strict=True)):
        width_s, width_t = student[n].shape[2] // num_heads, teacher[n].shape[2] // num_heads
        scales = width_s**-0.5, width_t**-0.5
        dtypes = student[n].dtype, teacher[n].dtype
        setting = _Setting(num_heads, width_s, width_t, 1, 1, *scales, is_causal, divergence, _hashable(beta), *dtypes)
        # what a launch must have in common
        key = setting, len(coefficient[n]), entry.key_mask is None, entry.stats is None
        together.setdefault(key, []).append(n)
    for (setting, *_), members in together.items():
        for i in range(0, len(members), ENTRIES):
            group = members[i : i + ENTRIES]
            with torch.cuda.device_of(student[group[0]]):
                _forward([entries[n] for n in group], setting, None, None)
                if gradients[group[0]]:
                    launched = _gradient([entries[n] for n in group], setting, None, None, as_query=True, as_key=True)
                    for n, gradient in zip(group, launched, strict=True):
                        found[n] = gradient
    return [entry.loss for entry in entries], found
