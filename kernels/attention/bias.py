"""The gradient of a bias: of tiles of a dense one, and along diagonals of T5's, which is one of distances."""

import triton
import triton.language as tl

from ..common import _beta_constants
from .tiles import STATS, along, both_scores, load_stats, log2_scale, model_of, tile_gradient


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
    scale, teacher_scale = log2_scale(student_scale, F), log2_scale(teacher_scale, F)
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
        row = load_stats(stats + (b * heads + a) * STATS * queries, query, queries)
        alive = row[0] != 0
        student = model_of(
            student_q, student_k, b, a, start, alive, scale, student_bias, GROUP_S, WIDTH_S, PADDED_S, BLOCK_M
        )
        teacher = model_of(
            teacher_q, teacher_k, b, a, start, alive, teacher_scale, teacher_bias, GROUP_T, WIDTH_T, PADDED_T, BLOCK_M
        )
        mask = None
        if key_mask is not None:
            mask = key_mask + b * keys
        s, t, valid = both_scores(
            student, teacher, mask, start, alive, key_start, keys, CAUSAL, WIDTH_S, WIDTH_T, BLOCK_N, F
        )
        total += tile_gradient(s, t, along(row, 1), b_constants, valid & alive[:, None], DIVERGENCE)
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
    row = load_stats(stats + head.to(tl.int64) * STATS * queries, query, queries)
    alive = row[0] != 0
    scale, teacher_scale = log2_scale(student_scale, F), log2_scale(teacher_scale, F)
    student = model_of(student_q, student_k, b, a, start, alive, scale, student_bias, GROUP_S, WIDTH_S, PADDED_S, BLOCK)
    teacher = model_of(
        teacher_q, teacher_k, b, a, start, alive, teacher_scale, teacher_bias, GROUP_T, WIDTH_T, PADDED_T, BLOCK
    )
    b_constants = _beta_constants(beta, weights, F)

    turned = i[:, None] + j[None, :]
    waiting = tl.zeros((BLOCK,), F)
    low, high = tl.zeros((), F), tl.zeros((), F)
    end = tl.minimum(keys, start + BLOCK) if CAUSAL else keys
    for key_start in range(0, end, BLOCK):
        s, t, valid = both_scores(
            student, teacher, key_mask, start, alive, key_start, keys, CAUSAL, WIDTH_S, WIDTH_T, BLOCK, F
        )
        gradient = tile_gradient(s, t, along(row, 1), b_constants, valid & alive[:, None], DIVERGENCE)
        gradient = tl.gather(gradient, turned % BLOCK, 1)
        waiting += tl.sum(tl.where(turned < BLOCK, 0, gradient), 0)
        ends = _put_diagonals(waiting, key_start - BLOCK - start, out, reach, BLOCK)
        low, high = low + ends[0], high + ends[1]
        waiting = tl.sum(tl.where(turned < BLOCK, gradient, 0), 0)
    last = tl.cdiv(end, BLOCK) * BLOCK - BLOCK - start
    ends = _put_diagonals(waiting, last, out, reach, BLOCK)
    tl.store(out, low + ends[0])
    tl.store(out + 2 * reach, high + ends[1])
