"""The gradient of attention_kl's scores, written out for some heads and queries, and its sums along diagonals."""

import triton
import triton.language as tl

from ..common import beta_constants, rounded_to
from .tiles import STATS, along, any_masked, both_scores, load_stats, log2_scale, model_of, tile_gradient


@triton.jit(do_not_specialize=["first_b", "first_a", "first_query"])
def scores_kernel(
    student_q,  # (pointer, batch stride, row stride)
    student_k,
    teacher_q,
    teacher_k,
    stats,  # [B, A, STATS, Lq]
    key_mask,  # [B, Lk], or None
    lift,  # 0-d, or None
    gradient,  # [some of B, some of A, some of Lq, columns], zero from column Lk on
    queries,
    keys,
    student_bias,
    teacher_bias,
    heads,
    first_b,  # of the sequences, heads and queries in `gradient`
    first_a,
    first_query,
    some_heads,
    some_queries,
    columns,
    blocks,  # of these queries
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
    """coefficient * dD/ds of a block of one head's queries, times the lift, in the dtype of what it will multiply."""
    program = tl.program_id(0)
    row, head = program % blocks * BLOCK_M + tl.arange(0, BLOCK_M), program // blocks
    b, a = tl.cast(first_b + head // some_heads, tl.int64), first_a + head % some_heads
    start = first_query + program % blocks * BLOCK_M
    exists = row < some_queries
    factor = 1.0
    if lift is not None:
        factor = tl.load(lift)
    row_stats = load_stats(stats + (b * heads + a) * STATS * queries, start + tl.arange(0, BLOCK_M), queries, factor)
    alive = exists & (row_stats[0] != 0)
    scale, teacher_scale = log2_scale(student_scale, F), log2_scale(teacher_scale, F)
    student = model_of(
        student_q, student_k, b, a, start, alive, scale, student_bias, GROUP_S, WIDTH_S, PADDED_S, BLOCK_M
    )
    teacher = model_of(
        teacher_q, teacher_k, b, a, start, alive, teacher_scale, teacher_bias, GROUP_T, WIDTH_T, PADDED_T, BLOCK_M
    )
    if key_mask is not None:
        key_mask += b * keys
    b_constants = beta_constants(beta, weights, F)

    some_dropped = tl.max((exists & (row_stats[0] == 0)).to(tl.int32), 0) != 0
    column = tl.arange(0, BLOCK_N)
    pointers = gradient + (tl.cast(head, tl.int64) * some_queries + row)[:, None] * columns + column[None, :]
    end = tl.minimum(keys, start + BLOCK_M) if CAUSAL else keys
    end = tl.where(tl.max(alive.to(tl.int32), 0) == 0, 0, end)
    for key_start in range(0, end, BLOCK_N):
        s, t, valid = both_scores(
            student, teacher, key_mask, start, alive, key_start, keys, CAUSAL, WIDTH_S, WIDTH_T, BLOCK_N, F
        )
        g = tile_gradient(s, t, along(row_stats, 1), b_constants, None, DIVERGENCE)
        if some_dropped or any_masked(key_mask, key_start, keys, start, CAUSAL, BLOCK_N):
            g = tl.where(valid & alive[:, None], g, 0)
        g = rounded_to(g, gradient.dtype.element_ty)
        tl.store(pointers + key_start, g, mask=exists[:, None] & (key_start + column < columns)[None, :])
    zero = tl.zeros((BLOCK_M, BLOCK_N), gradient.dtype.element_ty)
    for key_start in range(tl.cdiv(end, BLOCK_N) * BLOCK_N, columns, BLOCK_N):
        tl.store(pointers + key_start, zero, mask=exists[:, None] & (key_start + column < columns)[None, :])


@triton.jit
def diagonals_kernel(
    gradient,  # [sequences, some of A, some of Lq, columns]
    sums,  # [some of A, those of Lq + Lk - 1]: of diagonals, from that of the lower left corner on
    sequences,
    heads,
    queries,
    keys,
    columns,
    diagonals,  # of a row of sums
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds to the sums of BLOCK_N diagonals of one head what all sequences give. No other program adds to them."""
    place, a = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    first = tl.program_id(0) * BLOCK_N - (queries - 1)
    i, distance = tl.arange(0, BLOCK_M)[:, None], first + tl.arange(0, BLOCK_N)[None, :]
    pointers = gradient + (i * (columns + 1) + distance)
    begin, end = tl.maximum(0, 1 - first - BLOCK_N), tl.minimum(queries, keys - first)
    total = tl.zeros((BLOCK_M, BLOCK_N), sums.dtype.element_ty)
    for b in range(sequences):
        matrix = (tl.cast(b, tl.int64) * heads + a) * queries * columns
        for start in range(begin, end, BLOCK_M):
            matrix_pointers = pointers + (matrix + tl.cast(start, tl.int64) * (columns + 1))
            if (start + first >= 0) & (start + BLOCK_M + first + BLOCK_N <= keys) & (start + BLOCK_M <= end):
                total += tl.load(matrix_pointers).to(total.dtype)
            else:
                key = start + i + distance
                used = (start + i < end) & (key >= 0) & (key < keys)
                total += tl.load(matrix_pointers, mask=used, other=0).to(total.dtype)
    pointers = sums + (tl.cast(a, tl.int64) * diagonals + place)
    exists = place < queries + keys - 1
    tl.store(pointers, tl.load(pointers, mask=exists) + tl.sum(total, 0), mask=exists)
