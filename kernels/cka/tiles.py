"""What the kernels of cka_loss have in common: pairs of matrices in memory, centred rows, tiles of results."""

import triton
import triton.language as tl

from ..common import _choose, _choose_matrix, _rounded

# Blocks of columns that a launch goes through together, for what they read to be in the second-level cache: up to so
# many that is all of them.
FEW_BLOCKS = tl.constexpr(16)
GROUP = tl.constexpr(8)
# What a pair's tiles are summed up in: |B^T A|^2, |A^T A|^2, |B^T B|^2.
CROSS = tl.constexpr(0)
STUDENT = tl.constexpr(1)
TEACHER = tl.constexpr(2)
NORMS = tl.constexpr(3)

# ---- memory ----------------------------------------------------------------------------------------------------------
# Every argument that is a tuple has an element for each pair of the launch. A matrix is (pointer, row stride, width),
# with the means of its columns behind it where it is to be centred.


@triton.jit
def choose_pair(index, students, teachers, means):
    """(student, teacher) of a pair"""
    student, teacher, mean = _choose_matrix(index, students), _choose_matrix(index, teachers), _choose(index, means)
    return (student[0], student[1], student[2], mean + teacher[2]), (teacher[0], teacher[1], teacher[2], mean)


@triton.jit
def mask_of(index, masks):
    """masks[index], or None: which in Triton 3.6 no tuple can hold, not even on the right of an assignment."""
    mask = None
    if masks is not None:
        mask = _choose(index, masks)
    return mask


@triton.jit
def block_of(block, student, teacher, BLOCK: tl.constexpr):
    """(matrix, first column, whether it is the student's) of a block of (B|A), in which no block has columns of both"""
    teachers = tl.cdiv(teacher[2], BLOCK)
    ours = block >= teachers
    matrix = (
        tl.where(ours, student[0], teacher[0]),
        tl.where(ours, student[1], teacher[1]),
        tl.where(ours, student[2], teacher[2]),
        tl.where(ours, student[3], teacher[3]),
    )
    return matrix, tl.where(ours, block - teachers, block) * BLOCK, ours


@triton.jit
def load_rows(matrix, start, valid, column_start, BLOCK: tl.constexpr):
    """[rows, BLOCK] of a matrix, zero in rows that are not valid: a NaN there is not read."""
    pointer, stride, width, _ = matrix
    row, column = tl.arange(0, valid.shape[0])[:, None], column_start + tl.arange(0, BLOCK)[None, :]
    pointers = pointer + tl.cast(start, tl.int64) * stride + (row * stride + column)
    return tl.load(pointers, mask=valid[:, None] & (column < width), other=0)


@triton.jit
def load_mean(matrix, column_start, BLOCK: tl.constexpr):
    column = column_start + tl.arange(0, BLOCK)
    return tl.load(matrix[3] + column, mask=column < matrix[2], other=0)


@triton.jit
def centred(x, valid, mean, F: tl.constexpr):
    """Rows less their mean, zero where they are not valid, as an operand of x's dtype. One fused multiply-add each.

    Of wide operands two, as the mean has more digits than they: rounded it would move all rows of a gradient alike.
    """
    exists = valid.to(F)[:, None]
    rounded = mean.to(F)
    moved = x.to(F) - exists * rounded[None, :]
    if x.dtype == F:
        moved -= exists * (mean - rounded).to(F)[None, :]
    return _rounded(moved, x.dtype)


@triton.jit
def tile_of(pointer, row_start, column_start, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pointers to a tile [BLOCK_R, BLOCK_C] of a matrix [rows, columns] without gaps, and which of them exist."""
    row, column = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_C)[None, :]
    pointers = pointer + (tl.cast(row_start, tl.int64) * columns + column_start) + (row * columns + column)
    return pointers, (row < rows - row_start) & (column < columns - column_start)


@triton.jit
def store_tile(pointer, tile, row_start, column_start, rows, columns):
    pointers, exists = tile_of(pointer, row_start, column_start, rows, columns, tile.shape[0], tile.shape[1])
    tl.store(pointers, tile, mask=exists)
