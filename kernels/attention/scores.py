"""The gradient of attention_kl's scores, written out for some heads and queries, and its sums along diagonals."""

import triton
import triton.language as tl

from ..common import rounded_to
from .columns import tile_gradient
from .tiles import STATS, Block, along, any_masked, beta_of, both_scores, last_key, lift_of, load_row, mask_of, side_of


@triton.jit(do_not_specialize=["first_b", "first_a", "first_query"])
def scores_kernel(
    call,  # of one entry
    gradient,  # [some of B, some of A, some of Lq, columns], zero from column Lk on
    first_b,  # of the sequences, heads and queries in `gradient`
    first_a,
    first_query,
    some_heads,
    some_queries,
    columns,
    blocks,  # of these queries
    student_scale: tl.float64,
    teacher_scale: tl.float64,
    beta: tl.float64,
    C: tl.constexpr,  # Constants
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """coefficient * dD/ds of a block of one head's queries, times the lift, in the dtype of what it will multiply."""
    program, queries = tl.program_id(0), call.rows.queries[0]
    row, head = program % blocks * BLOCK_M + tl.arange(0, BLOCK_M), program // blocks
    b, a = tl.cast(first_b + head // some_heads, tl.int64), first_a + head % some_heads
    start, exists = first_query + program % blocks * BLOCK_M, row < some_queries
    stats = call.rows.stats[0] + (b * call.rows.heads + a) * STATS * queries
    of_row = load_row(stats, start + tl.arange(0, BLOCK_M), queries, lift_of(call.rows, 0))
    alive, of_beta = exists & (of_row.coefficient != 0), beta_of(call, beta, C.F)
    block = Block(
        side_of(call.student, student_scale, C.WIDTH_S, C.GROUP_S, 0, b, a, start, alive, C.F),
        side_of(call.teacher, teacher_scale, C.WIDTH_T, C.GROUP_T, 0, b, a, start, alive, C.F),
        start, alive, mask_of(call.rows, 0, b), call.rows.keys[0],
    )  # fmt: skip
    end = last_key(block, C.CAUSAL)

    some_dropped = tl.max((exists & (of_row.coefficient == 0)).to(tl.int32), 0) != 0
    column = tl.arange(0, BLOCK_N)
    pointers = gradient + (tl.cast(head, tl.int64) * some_queries + row)[:, None] * columns + column[None, :]
    for key in range(0, end, BLOCK_N):
        s, t, valid = both_scores(block, key, C.CAUSAL, BLOCK_N)
        g = tile_gradient(s, t, along(of_row, 1), of_beta, None, C.DIVERGENCE)
        if some_dropped or any_masked(block, key, C.CAUSAL, BLOCK_N):
            g = tl.where(valid & alive[:, None], g, 0)
        g = rounded_to(g, gradient.dtype.element_ty)
        tl.store(pointers + key, g, mask=exists[:, None] & (key + column < columns)[None, :])
    zero = tl.zeros((BLOCK_M, BLOCK_N), gradient.dtype.element_ty)
    for key in range(tl.cdiv(end, BLOCK_N) * BLOCK_N, columns, BLOCK_N):
        tl.store(pointers + key, zero, mask=exists[:, None] & (key + column < columns)[None, :])


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
