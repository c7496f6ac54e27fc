"""The gradient of cka_loss: centred rows times the factor."""

import triton
import triton.language as tl

from ..common import _choose, _dot, _load_valid, _rounded
from .tiles import GROUP, centred, choose_pair, load_mean, load_rows, mask_of, store_tile, tile_of


@triton.jit
def _grouped_tile(program, rows, columns):
    """(row, column) of a tile, in groups of rows that go through all columns together, column by column."""
    group = program // (GROUP * columns)
    height = tl.minimum(rows - group * GROUP, GROUP)
    program -= group * GROUP * columns
    return group * GROUP + program % height, program // height


@triton.jit
def _load_factor(factor, row_start, column_start, rows, columns, lift, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tile of a factor [rows, columns], times a power of two."""
    pointers, exists = tile_of(factor, row_start, column_start, rows, columns, BLOCK_R, BLOCK_C)
    return tl.load(pointers, mask=exists, other=0) * lift


@triton.jit
def _add_product(
    total, matrix, row_start, valid, factor, column_start, columns, lift, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """Adds centred rows of a matrix times its rows of the factor."""
    for start in range(0, matrix[2], BLOCK_K):
        mean = load_mean(matrix, start, BLOCK_K)
        x = centred(load_rows(matrix, row_start, valid, start, BLOCK_K), valid, mean, F)
        y = _load_factor(factor, start, column_start, matrix[2], columns, lift, BLOCK_K, BLOCK_N)
        total += _dot(x, _rounded(y, x.dtype), F)
    return total


@triton.jit
def _lift_of(pair, lifts, F: tl.constexpr):
    lift = tl.full((), 1, F)
    if lifts is not None:
        lift = tl.load(lifts + pair)
    return lift


@triton.jit
def _store_gradient(gradient, total, scale, valid, row_start, column_start, rows, columns):
    """A tile of a gradient [rows, columns], exactly zero where a token is not valid."""
    total = _rounded(tl.where(valid[:, None], total * scale, 0), gradient.dtype.element_ty)
    store_tile(gradient, total, row_start, column_start, rows, columns)


@triton.jit(do_not_specialize=["tokens"])
def gradient_kernel(
    students,
    teachers,
    masks,  # [N], or no tuple but None
    means,  # [Dt + Ds]
    tokens,
    factors,  # [Dt + Ds, Ds]
    gradients,  # [N, Ds]
    scales,  # [pairs], the gradient of each loss
    lifts,  # [pairs], or None
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    F: tl.constexpr,
):
    """A tile of (B|A) factor."""
    pair, program = tl.program_id(1), tl.program_id(0)
    student, teacher = choose_pair(pair, students, teachers, means)
    width, count = student[2], _choose(pair, tokens)
    rows, columns = tl.cdiv(count, BLOCK_M), tl.cdiv(width, BLOCK_N)
    if program >= rows * columns:
        return
    i, j = _grouped_tile(program, rows, columns)
    row_start, column_start = i * BLOCK_M, j * BLOCK_N
    valid = _load_valid(mask_of(pair, masks), row_start + tl.arange(0, BLOCK_M), count)
    lift = _lift_of(pair, lifts, F)
    factor = _choose(pair, factors)
    total = tl.zeros((BLOCK_M, BLOCK_N), F)
    total = _add_product(
        total, teacher, row_start, valid, factor, column_start, width, lift, BLOCK_N, BLOCK_K, F
    )  # fmt: skip
    factor += tl.cast(teacher[2], tl.int64) * width
    total = _add_product(
        total, student, row_start, valid, factor, column_start, width, lift, BLOCK_N, BLOCK_K, F
    )  # fmt: skip
    scale = (tl.load(scales + pair) / lift.to(tl.float64)).to(F)
    _store_gradient(_choose(pair, gradients), total, scale, valid, row_start, column_start, count, width)
