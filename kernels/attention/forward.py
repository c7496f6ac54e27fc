"""The forward pass of attention_kl and relation_kl: losses, and what its gradient needs of a row."""

import triton
import triton.language as tl

from ..common import FORWARD_KL, JSD, LN2, LOG2E, REVERSE_KL, TVD, choose, log_1p, mixes, with_infinity
from .columns import tile_columns
from .tiles import MASKED, STATS, Block, Row, Side, along, any_masked, beta_of, both_scores, last_key, mask_of, side_of


@triton.jit
def _unsigned(side):
    """Its queries carry the sign of the scale, for maxima of what is yet to be scaled."""
    q = tl.where(side.scale < 0, -side.q, side.q)
    return Side(q, side.k, tl.maximum(tl.abs(side.scale), 1e-25), side.bias)


@triton.jit
def _scale_left(side):
    """What is left to multiply scores with: nothing, where a bias has been added."""
    return 1.0 if len(side.bias) > 0 else side.scale


# Sums of a row that lanes add up by themselves, and together at the end: so many neighbouring columns are in four
# lanes, and the next ones in the same.
LANES = tl.constexpr(8)


@triton.jit
def _partial(x):
    """Sums of every eighth column [rows, LANES]."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // LANES, LANES)), 1)


@triton.jit
def _first_look(
    block, end, coefficient, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, FIRST: tl.constexpr, REVERSE: tl.constexpr
):
    """(whether rows count, D if it is `FIRST`, what rows are kept as, for reverse KL or others)."""
    # where there is no bias, scaling and subtracting the maximum is one instruction
    F: tl.constexpr = block.student.scale.dtype
    scale_s, scale_t = _scale_left(block.student), _scale_left(block.teacher)
    max_s = tl.full(coefficient.shape, MASKED, F)
    max_t = max_s
    sum_s = tl.zeros((coefficient.shape[0], LANES), F)
    sum_t, moment = tl.zeros_like(sum_s), tl.zeros_like(sum_s)
    for start in range(0, end, BLOCK_N):
        s, t, valid = both_scores(block, start, CAUSAL, BLOCK_N, False)
        if any_masked(block, start, CAUSAL, BLOCK_N):
            s, t = tl.where(valid, s, MASKED), tl.where(valid, t, MASKED)
        top_s, top_t = tl.maximum(max_s, tl.max(s, 1)), tl.maximum(max_t, tl.max(t, 1))
        moved_s, moved_t = ((max_s - top_s) * scale_s)[:, None], ((max_t - top_t) * scale_t)[:, None]
        factor_s, factor_t = tl.exp2(moved_s), tl.exp2(moved_t)
        s, t = s * scale_s - (top_s * scale_s)[:, None], t * scale_t - (top_t * scale_t)[:, None]
        q, p = tl.exp2(s), tl.exp2(t)
        # log(p / q) is relative to both maxima, so its moment follows when either moves
        if FIRST == FORWARD_KL:
            moment = factor_t * (moment + sum_t * (moved_t - moved_s)) + _partial(p * (t - s))
        elif FIRST == REVERSE_KL:
            moment = factor_s * (moment + sum_s * (moved_s - moved_t)) + _partial(q * (s - t))
        sum_s = sum_s * factor_s + _partial(q)
        sum_t = sum_t * factor_t + _partial(p)
        max_s, max_t = top_s, top_t
    found = (max_s > MASKED / 2) & (max_t > MASKED / 2)  # below are also the -1e30 of a bias of -inf, of fp32 or fp64
    max_s, sum_s, max_t, sum_t = max_s * scale_s, tl.sum(sum_s, 1), max_t * scale_t, tl.sum(sum_t, 1)
    # A row of nothing but -inf has no distribution: it counts as masked. One with NaN does not.
    alive = block.alive & (found | (sum_s + sum_t != sum_s + sum_t))
    sum_s, sum_t = tl.where(alive, sum_s, 1), tl.where(alive, sum_t, 1)
    factor = tl.where(alive, coefficient, 0)
    shift = log_1p((sum_t - sum_s) / sum_s)
    divergence, zero = tl.sum(moment, 1), tl.zeros_like(shift)
    mean = zero
    if FIRST == FORWARD_KL:
        divergence = divergence * LN2 / sum_t - shift
    elif FIRST == REVERSE_KL:
        divergence = divergence * LN2 / sum_s + shift
    if REVERSE:
        mean, factor = with_infinity(divergence) * LOG2E, factor * LN2  # of log(p / q), base 2
    log_s, log_t = max_s + tl.log2(sum_s), max_t + tl.log2(sum_t)
    rounded = shift * LOG2E + ((max_t - log_t) - (max_s - log_s))
    return alive, divergence, Row(factor.to(F), log_s, log_t, rounded, mean, zero, zero)


@triton.jit
def _second_look(block, end, row, beta, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, DIVERGENCE: tl.constexpr):
    """A second look at the row, for divergences without a closed form: (D, and of its statistics the last three)."""
    value = tl.zeros_like(row.mean)
    mean, comean, sign = tl.zeros_like(value), tl.zeros_like(value), tl.zeros_like(value)
    row = along(row, 1)
    for start in range(0, end, BLOCK_N):
        s, t, valid = both_scores(block, start, CAUSAL, BLOCK_N)
        s, t = tl.where(valid, s, MASKED), tl.where(valid, t, MASKED)
        columns = tile_columns(s, t, row, beta, DIVERGENCE)
        value += tl.sum(columns[0], 1)
        mean += tl.sum(columns[1], 1)
        comean += tl.sum(columns[2], 1)
        if DIVERGENCE == TVD or mixes(DIVERGENCE, TVD):
            sign += tl.sum(columns[3], 1)
    if DIVERGENCE == JSD:
        mean, comean = -beta.rest * mean, beta.rest * comean
    saturated = comean < mean
    return value, tl.where(saturated, -comean, mean), saturated.to(value.dtype), sign


@triton.jit
def forward_kernel(
    call,
    coefficients,  # [B, A, Lq] of each entry
    losses,  # [B, A, Lq]
    blocks,  # of queries, in the longest entry
    student_scale: tl.float64,
    teacher_scale: tl.float64,
    beta: tl.float64,
    C: tl.constexpr,  # Constants
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Losses and statistics of a block of one head's rows."""
    entry, program = tl.program_id(1), tl.program_id(0)
    start, head = program % blocks * BLOCK_M, program // blocks
    b, a = (head // call.rows.heads).to(tl.int64), head % call.rows.heads
    queries, query = choose(entry, call.rows.queries), start + tl.arange(0, BLOCK_M)
    exists, index = query < queries, head.to(tl.int64) * queries + query
    coefficient = tl.load(choose(entry, coefficients) + index, mask=exists, other=0)
    block = Block(
        _unsigned(side_of(call.student, student_scale, C.WIDTH_S, C.GROUP_S, entry, b, a, start, exists, C.F)),
        _unsigned(side_of(call.teacher, teacher_scale, C.WIDTH_T, C.GROUP_T, entry, b, a, start, exists, C.F)),
        start, coefficient != 0, mask_of(call.rows, entry, b), choose(entry, call.rows.keys),
    )  # fmt: skip
    end = last_key(block, C.CAUSAL)

    # a mix's reverse KL comes of the first look
    MIXED: tl.constexpr = mixes(C.DIVERGENCE, REVERSE_KL)
    FIRST: tl.constexpr = REVERSE_KL if MIXED else C.DIVERGENCE
    SECOND: tl.constexpr = C.DIVERGENCE - 2 if MIXED else C.DIVERGENCE
    alive, divergence, row = _first_look(block, end, coefficient, C.CAUSAL, BLOCK_N, FIRST, C.DIVERGENCE == REVERSE_KL)
    if C.DIVERGENCE >= JSD:
        of_beta = beta_of(call, beta, C.F)
        value, mean, saturated, sign = _second_look(block, end, row, of_beta, C.CAUSAL, BLOCK_N, SECOND)
        if MIXED:
            mean += of_beta.weights[REVERSE_KL] * with_infinity(divergence)
        divergence = of_beta.weights[REVERSE_KL] * divergence + value if MIXED else value
        row = Row(row.coefficient, row.log_s, row.log_t, row.rounded, mean, saturated, sign)
    loss = tl.where(alive, coefficient * with_infinity(divergence).to(tl.float64), 0)
    tl.store(choose(entry, losses) + index, loss, mask=exists)
    if len(call.rows.stats) > 0:
        pointers = choose(entry, call.rows.stats) + head.to(tl.int64) * STATS * queries + query
        for n in tl.static_range(STATS):
            tl.store(pointers + n * queries, row[n], mask=exists)
