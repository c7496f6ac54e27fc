"""cka_loss in Triton, for GPUs: all pairs of layers in one launch of each kernel, and nothing centred in memory.

With B the teacher's and A the student's hidden states less their means, the products that the loss and its gradient
are made of are tiles of one symmetric matrix, (B|A)^T (B|A): see fastkd/ops/cka_loss.py, which has the mathematics.
With fewer tokens than Ds + Dt its other form is cheaper, which fastkd/ops/drivers/cka_loss_gpu.py leaves to torch.

- `means_kernel` takes means from the first valid token on, so that an offset costs nothing.
- `covariance_kernel` owns a tile of the upper half of (B|A)^T (B|A) and goes through the tokens. Rows are centred
  between memory and the tensor cores. A tile of B^T B ends as one number, its sum of squares; one of (B|A)^T A is also
  stored, where a gradient is wanted.
- `loss_kernel` adds those numbers up, and turns what was stored into the factor of the gradient.
- `gradient_kernel` is the GEMM of centred rows with that factor.

No program adds to what another wrote, and sums are taken in one order: results do not depend on scheduling. How many
tokens are valid stays on the device.

Sums of squares are fp32 in a row of a tile and fp64 beyond: near convergence the loss is what two norms differ by.
Hidden states of 16 bits are centred in fp32 and rounded once for the tensor cores, the factor too. From that of hidden
states before they were 16 bits, the gradient is then at most 1.8 times as far as the one of fp32 arithmetic on the same
inputs, and with an offset of 50 standard deviations, which costs those most, as far.

The floor of a pair, with W = Ds + Dt: N W (W + 1) FLOPs forward and 2 N W Ds backward. Memory has to be read twice
(means, products) and once more for the gradient, 2 N W + N W + N Ds numbers in all: at W 1280 and 16 bits that is 320
FLOPs a byte forward, which the tensor cores bound. By tiles, a pair of n blocks of columns computes n (n + 1) / 2 of
n^2 tiles.

N tokens, Ds and Dt widths. Neither is a constant of the kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import _choose, _dot, _double, _load_valid, _rounded, for_products
from .tuning import launch

__all__ = ["cka_loss", "cka_loss_backward_"]

T = TypeVar("T")

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
def _choose_matrix(index, matrices, means, first):
    """matrices[index], whose means start at `first`."""
    pointer, stride, width = matrices[0]
    for n in tl.static_range(1, len(matrices)):
        pointer = tl.where(index == n, matrices[n][0], pointer)
        stride = tl.where(index == n, matrices[n][1], stride)
        width = tl.where(index == n, matrices[n][2], width)
    return pointer, stride, width, _choose(index, means) + first


@triton.jit
def _choose_pair(index, students, teachers, means):
    """(student, teacher) of a pair"""
    teacher = _choose_matrix(index, teachers, means, 0)
    return _choose_matrix(index, students, means, teacher[2]), teacher


@triton.jit
def _mask_of(index, masks):
    """masks[index], or None: which in Triton 3.6 no tuple can hold, not even on the right of an assignment."""
    mask = None
    if masks is not None:
        mask = _choose(index, masks)
    return mask


@triton.jit
def _block_of(block, student, teacher, BLOCK: tl.constexpr):
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
def _load_rows(matrix, start, valid, column_start, BLOCK: tl.constexpr):
    """[rows, BLOCK] of a matrix, zero in rows that are not valid: a NaN there is not read."""
    pointer, stride, width, _ = matrix
    row, column = tl.arange(0, valid.shape[0])[:, None], column_start + tl.arange(0, BLOCK)[None, :]
    pointers = pointer + tl.cast(start, tl.int64) * stride + (row * stride + column)
    return tl.load(pointers, mask=valid[:, None] & (column < width), other=0)


@triton.jit
def _load_mean(matrix, column_start, BLOCK: tl.constexpr):
    column = column_start + tl.arange(0, BLOCK)
    return tl.load(matrix[3] + column, mask=column < matrix[2], other=0)


@triton.jit
def _centred(x, valid, mean, F: tl.constexpr):
    """Rows less their mean, zero where they are not valid, as an operand of x's dtype. One fused multiply-add each.

    Of wide operands two, as the mean has more digits than they: rounded it would move all rows of a gradient alike.
    """
    exists = valid.to(F)[:, None]
    rounded = mean.to(F)
    centred = x.to(F) - exists * rounded[None, :]
    if x.dtype == F:
        centred -= exists * (mean - rounded).to(F)[None, :]
    return _rounded(centred, x.dtype)


@triton.jit
def _tile_of(pointer, row_start, column_start, rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pointers to a tile [BLOCK_R, BLOCK_C] of a matrix [rows, columns] without gaps, and which of them exist."""
    row, column = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_C)[None, :]
    pointers = pointer + (tl.cast(row_start, tl.int64) * columns + column_start) + (row * columns + column)
    return pointers, (row < rows - row_start) & (column < columns - column_start)


@triton.jit
def _store_tile(pointer, tile, row_start, column_start, rows, columns):
    pointers, exists = _tile_of(pointer, row_start, column_start, rows, columns, tile.shape[0], tile.shape[1])
    tl.store(pointers, tile, mask=exists)


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
    student, teacher = _choose_pair(pair, students, teachers, means)
    matrix, column_start, _ = _block_of(program, student, teacher, BLOCK_D)
    count = _choose(pair, tokens)
    mask = _mask_of(pair, masks)
    first = _first_valid(mask, count)
    exists = first + tl.arange(0, 1) < count
    shift = tl.sum(_load_rows(matrix, first, exists, column_start, BLOCK_D).to(F), 0)
    total, valid_tokens = tl.zeros((BLOCK_N, BLOCK_D), F), tl.zeros((BLOCK_N,), tl.int32)
    for start in tl.range(0, count, BLOCK_N, num_stages=4):
        valid = _load_valid(mask, start + tl.arange(0, BLOCK_N), count)
        x = _load_rows(matrix, start, valid, column_start, BLOCK_D)
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
def _upper_tile(program, blocks):
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
                _store_tile(factor, tl.trans(tile), column_start, row_start, width, width)
        _store_tile(factor, tile, row_start, column_start, rows, width)


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
    student, teacher = _choose_pair(pair, students, teachers, means)
    blocks = tl.cdiv(teacher[2], BLOCK) + tl.cdiv(student[2], BLOCK)
    i, j = _upper_tile(program, blocks)
    if (i > j) | (j >= blocks):
        return
    left, row_start, left_ours = _block_of(i, student, teacher, BLOCK)
    right, column_start, right_ours = _block_of(j, student, teacher, BLOCK)
    left_mean, right_mean = _load_mean(left, row_start, BLOCK), _load_mean(right, column_start, BLOCK)
    count = _choose(pair, tokens)
    mask = _mask_of(pair, masks)

    total = tl.zeros((BLOCK, BLOCK), F)
    for start in range(0, count, BLOCK_K):
        valid = _load_valid(mask, start + tl.arange(0, BLOCK_K), count)
        x = _centred(_load_rows(left, start, valid, row_start, BLOCK), valid, left_mean, F)
        y = _centred(_load_rows(right, start, valid, column_start, BLOCK), valid, right_mean, F)
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


# ---- gradients -------------------------------------------------------------------------------------------------------


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
    pointers, exists = _tile_of(factor, row_start, column_start, rows, columns, BLOCK_R, BLOCK_C)
    return tl.load(pointers, mask=exists, other=0) * lift


@triton.jit
def _add_product(
    total, matrix, row_start, valid, factor, column_start, columns, lift, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """Adds centred rows of a matrix times its rows of the factor."""
    for start in range(0, matrix[2], BLOCK_K):
        mean = _load_mean(matrix, start, BLOCK_K)
        x = _centred(_load_rows(matrix, row_start, valid, start, BLOCK_K), valid, mean, F)
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
    _store_tile(gradient, total, row_start, column_start, rows, columns)


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
    student, teacher = _choose_pair(pair, students, teachers, means)
    width, count = student[2], _choose(pair, tokens)
    rows, columns = tl.cdiv(count, BLOCK_M), tl.cdiv(width, BLOCK_N)
    if program >= rows * columns:
        return
    i, j = _grouped_tile(program, rows, columns)
    row_start, column_start = i * BLOCK_M, j * BLOCK_N
    valid = _load_valid(_mask_of(pair, masks), row_start + tl.arange(0, BLOCK_M), count)
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


# ---- launch ----------------------------------------------------------------------------------------------------------
MEAN_TILE = {"BLOCK_N": 128, "BLOCK_D": 32}
LOSS_BLOCK = 2048
# Pairs that one launch takes: the hidden states of encoder and decoder, say.
ENTRIES = 16


@dataclass(frozen=True)
class _Setting:
    """What all kernels of a launch have in common."""

    dtype: torch.dtype  # of operands
    exact: torch.dtype  # of sums and factors: fp64 or fp32
    masked: bool

    def launch(self, kernel: str, case: tuple, run: Callable[[dict], T]) -> T:
        return launch(kernel, self.dtype.itemsize, 0, (self, case), run)

    @property
    def kind(self) -> tl.dtype:
        return tl.float64 if self.exact == torch.float64 else tl.float32


def _setting(student: Tensor, teacher: Tensor, mask: Tensor | None) -> _Setting:
    exact = torch.float64 if student.dtype == torch.float64 else torch.float32
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    return _Setting(dtype if dtype.itemsize < exact.itemsize else exact, exact, mask is not None)


def _matrices(xs: list[Tensor], setting: _Setting) -> tuple:
    """(matrix, row stride, width) of each: where models have different dtypes, in the wider one."""
    xs = [x.to(setting.dtype) for x in xs]
    xs = [x if x.stride(1) == 1 else x.contiguous() for x in xs]
    return tuple((x, x.stride(0), x.shape[1]) for x in xs)


def _masks(masks: list[Tensor | None], student: Tensor) -> tuple | None:
    return None if masks[0] is None else tuple(for_products(x, student).contiguous() for x in masks if x is not None)


def _launches(settings: list[tuple]) -> list[list[int]]:
    """Which pairs go together: equal settings, and no more than a launch takes."""
    together: dict[tuple, list[int]] = {}
    for n, setting in enumerate(settings):
        together.setdefault(setting, []).append(n)
    return [members[i : i + ENTRIES] for members in together.values() for i in range(0, len(members), ENTRIES)]


def _programs_of_upper_half(blocks: int) -> int:
    """As many as _upper_tile numbers."""
    columns = GROUP.value if blocks > FEW_BLOCKS.value else 1
    bands = triton.cdiv(blocks, columns)
    return columns**2 * bands * (bands + 1) // 2


def _launch_forward(
    setting: _Setting,
    student: list[Tensor],
    teacher: list[Tensor],
    mask: list[Tensor | None],
    mean: list[Tensor],
    factor: list[Tensor] | None,
    eps: float,
    squared: bool,
) -> Tensor:
    """The losses of the pairs of a launch; fills means and factors."""
    tokens, widths = (
        tuple(x.shape[0] for x in student),
        tuple((x.shape[1], t.shape[1]) for x, t in zip(student, teacher, strict=True)),
    )
    common = _matrices(student, setting), _matrices(teacher, setting), _masks(mask, student[0]), tuple(mean), tokens
    counts = mean[0].new_empty(len(student), dtype=torch.float64)
    columns = max(sum(triton.cdiv(width, MEAN_TILE["BLOCK_D"]) for width in pair) for pair in widths)
    means_kernel[(columns, len(student))](
        *common, counts, **MEAN_TILE, F=setting.kind, num_warps=8, enable_fp_fusion=True
    )

    factors = None if factor is None else tuple(factor)

    def run(options: dict) -> Tensor:
        """[pairs, NORMS, programs]"""
        programs = [_programs_of_upper_half(sum(triton.cdiv(n, options["BLOCK"]) for n in pair)) for pair in widths]
        sums = counts.new_zeros(len(student), NORMS.value, max(1, *programs))
        covariance_kernel[(sums.shape[2], len(student))](*common, factors, sums, F=setting.kind, **options)
        return sums

    case = tokens, widths, factor is None
    sums = setting.launch("covariance", case, run)
    programs = sums.shape[2]
    sizes = tuple(0 if factor is None else factor[n].numel() for n in range(len(student)))
    teacher_sizes = tuple(ours * theirs for ours, theirs in widths)
    losses = torch.empty_like(counts)
    loss_kernel[(max(1, triton.cdiv(max(sizes), LOSS_BLOCK)), len(student))](
        factors,
        sizes,
        teacher_sizes,
        sums,
        programs,
        counts,
        losses,
        eps,
        SQUARED=squared,
        BLOCK=LOSS_BLOCK,
        enable_fp_fusion=True,
    )
    return losses


def _lifts(factor: list[Tensor]) -> Tensor:
    """Powers of two that bring factors into the range of fp16: the larger the more tokens, the smaller they are."""
    _, exponent = torch.frexp(torch.stack(torch._foreach_norm(factor, float("inf"))))
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), (12 - exponent).clamp(-100, 100))


def _launch_backward(
    setting: _Setting,
    student: list[Tensor],
    teacher: list[Tensor],
    mask: list[Tensor | None],
    mean: list[Tensor],
    factor: list[Tensor],
    gradients: list[Tensor],
    scales: Tensor,
) -> None:
    """Fills the gradients of the pairs of a launch."""

    def run(options: dict) -> None:
        rows, columns = options["BLOCK_M"], options["BLOCK_N"]
        programs = max(triton.cdiv(x.shape[0], rows) * triton.cdiv(x.shape[1], columns) for x in student)
        gradient_kernel[(programs, len(student))](
            *matrices,
            _masks(mask, student[0]),
            tuple(mean),
            tuple(x.shape[0] for x in student),
            tuple(factor),
            tuple(gradients),
            scales,
            lifts,
            F=setting.kind,
            **options,
        )

    matrices = _matrices(student, setting), _matrices(teacher, setting)
    lifts = _lifts(factor) if setting.dtype == torch.float16 else None
    case = tuple((*x.shape, t.shape[1]) for x, t in zip(student, teacher, strict=True))
    setting.launch("cka_gradient", case, run)


def cka_loss(
    student: list[Tensor],  # [N, Ds] each
    teacher: list[Tensor],  # [N, Dt] each
    mask: list[Tensor | None],  # [N] bool each
    mean: list[Tensor],  # [Dt + Ds] float64 each, of (B|A), to be written
    factor: list[Tensor],  # [Dt + Ds, Ds] each, likewise; empty where it is not wanted
    eps: float,
    squared: bool,
) -> list[Tensor]:
    """The losses, 0-d float64."""
    settings = [
        (_setting(x, t, valid), wanted.numel() > 0)
        for x, t, valid, wanted in zip(student, teacher, mask, factor, strict=True)
    ]
    losses: dict[int, Tensor] = {}
    with torch.cuda.device_of(student[0]):
        for members in _launches(settings):
            setting, wanted = settings[members[0]]
            lists = [[xs[n] for n in members] for xs in (student, teacher, mask, mean, factor)]
            found = _launch_forward(setting, *lists[:4], lists[4] if wanted else None, eps, squared)
            losses.update(zip(members, found.unbind(), strict=True))
    return [losses[n] for n in range(len(student))]


def cka_loss_backward_(
    student: list[Tensor],  # [N, Ds] each
    teacher: list[Tensor],  # [N, Dt] each
    mask: list[Tensor | None],  # [N] bool each
    mean: list[Tensor],  # [Dt + Ds] each
    factor: list[Tensor],  # [Dt + Ds, Ds] each
    grad_loss: list[Tensor],  # 0-d float64
    results: list[Tensor],  # [N, Ds] each
) -> None:
    """Writes the gradients of the students."""
    settings = [(_setting(*pair),) for pair in zip(student, teacher, mask, strict=True)]
    with torch.cuda.device_of(student[0]):
        for members in _launches(settings):
            lists = [[xs[n] for n in members] for xs in (student, teacher, mask, mean, factor, results)]
            _launch_backward(settings[members[0]][0], *lists, torch.stack([grad_loss[n] for n in members]))
