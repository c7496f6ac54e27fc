"""The forward pass of cka_loss: means, norms of covariances, losses, and the factor of the gradient."""

import triton
import triton.language as tl

from ..common import _choose, _dot, _double, _load_valid
from .tiles import (
    CROSS,
    FEW_BLOCKS,
    GROUP,
    NORMS,
    STUDENT,
    TEACHER,
    block_of,
    centred,
    choose_pair,
    load_mean,
    load_rows,
    mask_of,
    store_tile,
)

# ---- means -----------------------------------------------------------------------------------------------------------


@triton.jit
def _first_valid(mask, tokens):
    """The first valid token, or `tokens`."""
    first = tokens * 0
    if mask is not None:
        first = tokens
        start = 0
        while (start < tokens) & (first == tokens):
            token = start + tl.arange(0, 1024)
            first = tl.min(tl.where(_load_valid(mask, token, tokens), token, tokens), 0)
            start += 1024
    return first


@triton.jit(do_not_specialize=["tokens"])
def means_kernel(
    students,
    teachers,
    masks,  # [N], or no tuple but None
    means,  # [Dt + Ds]
    tokens,
    counts,  # [pairs]
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    F: tl.constexpr,
):
    """The means of a block of columns, and how many tokens are valid."""
    pair, program = tl.program_id(1), tl.program_id(0)
    student, teacher = choose_pair(pair, students, teachers, means)
    matrix, column_start, _ = block_of(program, student, teacher, BLOCK_D)
    count = _choose(pair, tokens)
    mask = mask_of(pair, masks)
    first = _first_valid(mask, count)
    exists = first + tl.arange(0, 1) < count
    shift = tl.sum(load_rows(matrix, first, exists, column_start, BLOCK_D).to(F), 0)
    total, valid_tokens = tl.zeros((BLOCK_N, BLOCK_D), F), tl.zeros((BLOCK_N,), tl.int32)
    for start in tl.range(0, count, BLOCK_N, num_stages=4):
        valid = _load_valid(mask, start + tl.arange(0, BLOCK_N), count)
        x = load_rows(matrix, start, valid, column_start, BLOCK_D)
        total += tl.where(valid[:, None], x.to(F) - shift[None, :], 0)
        valid_tokens += valid.to(tl.int32)
    valid_count = tl.sum(valid_tokens, 0).to(tl.float64)
    mean = shift + tl.sum(total.to(tl.float64), 0) / tl.maximum(valid_count, 1)
    column = column_start + tl.arange(0, BLOCK_D)
    tl.store(matrix[3] + column, mean, mask=column < matrix[2])
    if program == 0:
        tl.store(counts + pair, valid_count)


# ---- products --------------------------------------------------------------------------------------------------------


@triton.jit
def upper_tile(program, blocks):
    """(row, column) of a tile in the upper half, or below it, where there is nothing to do.

    Tiles come in bands of columns, row by row, so that those in flight at a time share what they read.
    """
    columns = tl.where(blocks > FEW_BLOCKS, GROUP, 1)
    squares = program // (columns * columns)  # band b has b + 1 of them
    band = ((tl.sqrt(8.0 * squares.to(tl.float32) + 1) - 1) / 2).to(tl.int32)
    band = tl.where(band * (band + 1) // 2 > squares, band - 1, band)
    band = tl.where((band + 1) * (band + 2) // 2 <= squares, band + 1, band)
    program -= columns * columns * (band * (band + 1) // 2)
    return program // columns, band * columns + program % columns


@triton.jit
def _square_sum(x):
    """In fp32 along a row, in fp64 beyond: a tile in fp64 would not fit into registers."""
    return tl.sum(tl.sum(x * x, 1).to(tl.float64), 0)


@triton.jit
def _store_covariance(factor, tile, where, left_ours, right_ours):
    """A tile of (B|A)^T A and, of A^T A, its mirror image."""
    row_start, column_start, rows, width, teacher_width = where
    if right_ours:
        if left_ours:
            factor += tl.cast(teacher_width, tl.int64) * width
            if row_start != column_start:
                store_tile(factor, tl.trans(tile), column_start, row_start, width, width)
        store_tile(factor, tile, row_start, column_start, rows, width)


@triton.jit(do_not_specialize=["tokens"])
def covariance_kernel(
    students,
    teachers,
    masks,  # [N], or no tuple but None
    means,  # [Dt + Ds]
    tokens,
    factors,  # [Dt + Ds, Ds], or no tuple but None
    sums,  # [pairs, NORMS, programs]
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    F: tl.constexpr,
):
    """A tile of the upper half of (B|A)^T (B|A)."""
    pair, program = tl.program_id(1), tl.program_id(0)
    student, teacher = choose_pair(pair, students, teachers, means)
    blocks = tl.cdiv(teacher[2], BLOCK) + tl.cdiv(student[2], BLOCK)
    i, j = upper_tile(program, blocks)
    if (i > j) | (j >= blocks):
        return
    left, row_start, left_ours = block_of(i, student, teacher, BLOCK)
    right, column_start, right_ours = block_of(j, student, teacher, BLOCK)
    left_mean, right_mean = load_mean(left, row_start, BLOCK), load_mean(right, column_start, BLOCK)
    count = _choose(pair, tokens)
    mask = mask_of(pair, masks)

    total = tl.zeros((BLOCK, BLOCK), F)
    for start in range(0, count, BLOCK_K):
        valid = _load_valid(mask, start + tl.arange(0, BLOCK_K), count)
        x = centred(load_rows(left, start, valid, row_start, BLOCK), valid, left_mean, F)
        y = centred(load_rows(right, start, valid, column_start, BLOCK), valid, right_mean, F)
        total += _dot(tl.trans(x), y, F)

    symmetric = left_ours == right_ours
    kind = tl.where(symmetric, tl.where(left_ours, STUDENT, TEACHER), CROSS)
    twice = tl.where(symmetric & (i != j), 2, 1)
    tl.store(sums + (pair * NORMS + kind) * tl.num_programs(0) + program, twice * _square_sum(total))
    if factors is not None:
        where = row_start, column_start, left[2], student[2], teacher[2]
        _store_covariance(_choose(pair, factors), total, where, left_ours, right_ours)


# ---- loss ------------------------------------------------------------------------------------------------------------


@triton.jit
def _norm(sums, programs):
    """The square root of a sum of squares, taken in one order."""
    total = tl.zeros((256,), tl.float64)
    for start in range(0, programs, 256):
        index = start + tl.arange(0, 256)
        total += tl.load(sums + index, mask=index < programs, other=0)
    total = tl.sum(total, 0)
    return tl.sqrt(total)


@triton.jit(do_not_specialize=["sizes", "teacher_sizes", "programs"])
def loss_kernel(
    factors,  # of covariance_kernel, in place; or no tuple but None
    sizes,  # of factors
    teacher_sizes,  # how many of them are of B^T A, and come first
    sums,  # [pairs, NORMS, programs]
    programs,
    counts,  # [pairs]
    losses,  # [pairs]
    eps: tl.float64,
    SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss, and a block of the factor of its gradient."""
    pair, program = tl.program_id(1), tl.program_id(0)
    eps = _double(eps)
    sums += pair * NORMS * programs
    c = _norm(sums + CROSS * programs, programs)
    s = _norm(sums + STUDENT * programs, programs)
    t = _norm(sums + TEACHER * programs, programs)
    cka, power = c / tl.sqrt((s + eps) * (t + eps)), 1
    if SQUARED:
        cka, power = cka * cka, 2
    alpha = tl.where(c == 0, 0, power * cka / tl.where(c == 0, 1, c * c))
    beta = tl.where(s == 0, 0, power * cka / tl.where(s == 0, 1, s * (s + eps)))
    if program == 0:
        tl.store(losses + pair, tl.where(tl.load(counts + pair) < 2, 0, 1 - cka))
    if factors is not None:
        index = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        exists = index < _choose(pair, sizes)
        pointers = _choose(pair, factors) + index
        found = tl.load(pointers, mask=exists, other=0)
        scaled = found.to(tl.float64) * tl.where(index < _choose(pair, teacher_sizes), -alpha, beta)
        tl.store(pointers, scaled.to(found.dtype), mask=exists)
