"""What the kernels of attention_kl and relation_kl have in common: arguments, heads in memory, scores of a tile."""

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

from ..common import INTERPRETED, LOG2E, beta_constants, choose, choose_matrix, dot, double, load_valid, unmasked

# The score of a masked key: low enough for a probability of exactly zero, and finite, so that differences are too. It
# is below what a bias of -inf makes of a score, and a power of two, whose product with a scale is exact.
MASKED = tl.constexpr(-(2.0**100))
# Tables by distance are padded by twice as much, so that no tile, which is at most as large, reads beyond.
SPAN = tl.constexpr(128)

# ---- arguments -------------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    q: tuple  # of each entry (pointer, batch stride, row stride)
    k: tuple  # the same, or () where keys are the queries
    bias: tuple  # (pointer, its four strides) or, by distance, (log2(e) diagonals, padded; their number), or ()


class Rows(NamedTuple):
    """Of each entry; empty of what there is not, as in Triton 3.6 no tuple that is given holds None."""

    stats: tuple  # [B, A, STATS, Lq]
    key_masks: tuple  # [B, Lk]
    lifts: tuple  # 0-d
    queries: tuple  # how many
    keys: tuple
    heads: int  # of a sequence


class Call(NamedTuple):
    """The one call of attention_kl, or relations that are alike: its entries."""

    student: Model
    teacher: Model
    rows: Rows
    weights: tuple  # of a mix


@dataclass(frozen=True)
class Constants:
    """One constant for kernels: of seven in a tuple each would take the host a microsecond a launch."""

    DIVERGENCE: int
    CAUSAL: bool
    WIDTH_S: int  # of a head
    WIDTH_T: int
    GROUP_S: int  # heads of queries that share one of keys
    GROUP_T: int
    F: tl.dtype  # of scores


@triton.jit
def beta_of(call, beta, F: tl.constexpr):
    return beta_constants(beta, call.weights if len(call.weights) > 0 else None, F)


@triton.jit
def lift_of(rows, entry):
    return tl.load(choose(entry, rows.lifts)) if len(rows.lifts) > 0 else 1.0


@triton.jit
def mask_of(rows, entry, b):
    """That of a sequence's keys, or None."""
    mask = None
    if len(rows.key_masks) > 0:
        mask = choose(entry, rows.key_masks) + b * choose(entry, rows.keys)
    return mask


# ---- rows ------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """What the forward pass leaves of a row, in this order. Logarithms are base 2."""

    coefficient: tl.tensor
    log_s: tl.tensor  # of both models' sums of exponentials
    log_t: tl.tensor
    rounded: tl.tensor  # what rounding took from log_t - log_s
    mean: tl.tensor  # of u
    saturated: tl.tensor
    sign: tl.tensor  # of TVD that of q - p at the key with most of q, or 0


STATS = tl.constexpr(len(Row._fields))


@triton.jit
def load_row(stats, position, queries, lift=1.0):
    """Those of a block. Rows that do not exist have a coefficient of zero."""
    pointers, exists = stats + position, position < queries
    coefficient = tl.load(pointers, mask=exists, other=0) * lift
    return Row(coefficient, *[tl.load(pointers + n * queries, mask=exists) for n in (1, 2, 3, 4, 5, 6)])


@triton.jit
def along(row, AXIS: tl.constexpr):
    """Those of a block, broadcast along axis `AXIS` of a tile."""
    return Row(*[tl.expand_dims(x, AXIS) for x in row])


# ---- heads -----------------------------------------------------------------------------------------------------------


class Head(NamedTuple):
    pointer: tl.tensor
    stride: tl.tensor
    width: tl.tensor


@triton.jit
def head_of(matrices, entry, b, a, WIDTH: tl.constexpr):
    pointer, batch_stride, row_stride = choose_matrix(entry, matrices)
    return Head(pointer + b * batch_stride + a * WIDTH, row_stride, WIDTH)


@triton.jit
def _pointers(head, start, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """Pointers to rows [BLOCK, PADDED] of one head, and which columns exist. Offsets inside a block stay below 2^31."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, PADDED)[None, :]
    pointers = head.pointer + tl.cast(start, tl.int64) * head.stride + (row * head.stride + column)
    return pointers, column < head.width


@triton.jit
def load_head(head, start, used, PADDED: tl.constexpr):
    """Rows of one head, zero where they are not used: a masked NaN times zero would still be NaN."""
    pointers, exists = _pointers(head, start, used.shape[0], PADDED)
    return tl.load(pointers, mask=used[:, None] & exists, other=0)


@triton.jit
def store_head(head, start, used, x):
    pointers, exists = _pointers(head, start, x.shape[0], x.shape[1])
    tl.store(pointers, x.to(head.pointer.dtype.element_ty), mask=used[:, None] & exists)


# ---- scores ----------------------------------------------------------------------------------------------------------
# Scores and all logarithms are base 2, the GPU's own: scales carry log2(e), and an exponential is one instruction.


class Side(NamedTuple):
    """One model, as a block of a head's queries sees it."""

    q: tl.tensor  # [BLOCK_M, padded]
    k: Head
    scale: tl.tensor  # of the dtype of scores
    bias: tuple  # (pointer, query stride, key stride), (pointer to distance 0, how far from it tiles may begin) or ()


@triton.jit
def _bias_of(bias, b, a):
    head = ()
    if len(bias) == 2:
        table, columns = bias
        head = table + a * columns + columns // 2, columns // 2 - SPAN
    elif len(bias) > 2:
        pointer, batch_stride, head_stride, query_stride, key_stride = bias
        head = pointer + b * batch_stride + tl.cast(a, tl.int64) * head_stride, query_stride, key_stride
    return head


@triton.jit
def side_of(model, scale, WIDTH: tl.constexpr, GROUP: tl.constexpr, entry, b, a, start, used, F: tl.constexpr):
    """For queries from `start` on, of which those that are not used are zero."""
    PADDED: tl.constexpr = triton.next_power_of_2(WIDTH) if WIDTH > 16 else 16
    q = load_head(head_of(model.q, entry, b, a, WIDTH), start, used, PADDED)
    k = head_of(model.k if len(model.k) > 0 else model.q, entry, b, a // GROUP, WIDTH)
    return Side(q, k, (double(scale) * LOG2E).to(F), _bias_of(model.bias, b, a))


class Block(NamedTuple):
    """A block of one head's queries."""

    student: Side
    teacher: Side
    start: tl.tensor
    alive: tl.tensor  # which of them count
    key_mask: tl.tensor | None
    keys: tl.tensor  # how many there are


@triton.jit
def last_key(block, CAUSAL: tl.constexpr):
    """None of the queries sees those from here on."""
    end = tl.minimum(block.keys, block.start + block.alive.shape[0]) if CAUSAL else block.keys
    return tl.where(tl.max(block.alive.to(tl.int32), 0) == 0, 0, end)


@triton.jit
def any_masked(block, start, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether any key of a tile is."""
    some = start + BLOCK_N > (tl.minimum(block.keys, block.start + 1) if CAUSAL else block.keys)
    if block.key_mask is not None:
        valid = load_valid(block.key_mask, start + tl.arange(0, BLOCK_N), block.keys)
        some |= tl.min(valid.to(tl.int32), 0) == 0
    return some


@triton.jit
def _look_up(pointers):
    """Loads of a small table, in the layout of the scores.

    tl.load would fetch neighbouring columns by neighbouring threads, and Triton then computes all else in that layout.
    """
    if not INTERPRETED and tl.target_info.is_cuda():
        if pointers.dtype.element_ty == tl.float64:
            found = tl.inline_asm_elementwise("ld.global.nc.f64 $0, [$1];", "=d,l", [pointers], tl.float64, True, 1)
        else:
            found = tl.inline_asm_elementwise("ld.global.nc.f32 $0, [$1];", "=f,l", [pointers], tl.float32, True, 1)
    else:
        found = tl.load(pointers)
    return found


@triton.jit
def _load_bias(bias, query_start, key_start, used, F: tl.constexpr):
    """The bias of a tile, times log2(e)."""
    query, key = tl.arange(0, used.shape[0])[:, None], tl.arange(0, used.shape[1])[None, :]
    if len(bias) == 2:
        pointer, far = bias
        distance = tl.minimum(tl.maximum(key_start - query_start, -far), far)
        found = _look_up(pointer + distance + (key - query))
    else:
        pointer, query_stride, key_stride = bias
        pointer += tl.cast(query_start, tl.int64) * query_stride + tl.cast(key_start, tl.int64) * key_stride
        pointers = pointer + (query * query_stride + key * key_stride)
        found = unmasked(tl.load(pointers, mask=used, other=0).to(F) * LOG2E)
    return found


@triton.jit
def _scores(side, block, start, used, SCALED: tl.constexpr):
    F: tl.constexpr = side.scale.dtype
    key = start + tl.arange(0, used.shape[1])
    s = dot(side.q, tl.trans(load_head(side.k, start, key < block.keys, side.q.shape[1])), F)
    if len(side.bias) > 0:
        s = side.scale * s + _load_bias(side.bias, block.start, start, used, F)
    elif SCALED:
        s *= side.scale
    return s


@triton.jit
def both_scores(block, start, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, SCALED: tl.constexpr = True):
    """A tile of both models' scores, left to be scaled where there is no bias, if not SCALED; and which keys count."""
    key = start + tl.arange(0, BLOCK_N)
    valid = load_valid(block.key_mask, key, block.keys)[None, :]
    if CAUSAL:
        valid = valid & (key[None, :] <= block.start + tl.arange(0, block.alive.shape[0])[:, None])
    used = valid
    if len(block.student.bias) > 0 or len(block.teacher.bias) > 0:
        used = valid & block.alive[:, None]
    return _scores(block.student, block, start, used, SCALED), _scores(block.teacher, block, start, used, SCALED), valid
