"""The kernel: one program takes one row, or a shard of one."""

import triton
import triton.language as tl

from ..common import REVERSE_KL, beta_constants, double
from .passes import first_pass, label_of, loss_of_row, refined, value_sums, write_block, write_gradient


@triton.jit
def _write(to, numbers, N: tl.constexpr):
    if to is not None:
        for i in tl.static_range(N):
            tl.store(to + i, numbers[i])


@triton.jit
def _write_zeros(loss, stats, gradient, metrics, sums, columns, F: tl.constexpr, BLOCK: tl.constexpr):
    zero = double(0.0)
    zeros = (zero, zero, zero, zero, zero, zero, zero)
    _write(loss, zeros, 1)
    _write(stats, zeros, 7)
    _write(metrics, zeros, 6)
    _write(sums, zeros, 3)
    if gradient is not None:
        for start in range(0, columns, BLOCK):
            write_block(gradient, start + tl.arange(0, BLOCK), columns, tl.zeros((BLOCK,), F), True)


@triton.jit
def _shard_of_row(
    student, teacher, label, columns, tau, DIVERGENCE: tl.constexpr, SEPARATE: tl.constexpr, METRICS: tl.constexpr,
    F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics and metrics of a shard, as if it were all of the row, with its own D in the mean's place."""
    divergence, stats, own = first_pass(student, teacher, label, columns, tau, DIVERGENCE, SEPARATE, METRICS, F, BLOCK)
    if teacher is not None and DIVERGENCE == REVERSE_KL:
        divergence = refined(divergence, student, teacher, columns, stats, tau, F, BLOCK)
    max_s, sum_s, max_t, sum_t, _, careful, sum_1 = stats
    zero = double(0.0)
    return (max_s, sum_s, max_t, sum_t, divergence, careful, sum_1), (zero, zero, own[0], own[1], own[2], own[3])


@triton.jit
def _sums_of_shard(
    student, teacher, columns, stats, b, tau, DIVERGENCE: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr
):
    """What a shard adds to D, to the mean of u and to that of v."""
    found = (double(0.0), double(0.0), double(0.0))
    if (stats[1] != 0) & (stats[3] != 0):
        found = value_sums(student, teacher, columns, stats, b, tau, DIVERGENCE, F, BLOCK)
    return found


@triton.jit
def _write_gradient(
    student, teacher, label, gradient, columns, stats, coefficient, beta, weights, tau, kd_weight, ce_weight,
    DIVERGENCE: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if stats[5] != 0:
        write_gradient(
            student, teacher, label, gradient, columns, stats, coefficient, beta, weights, tau, kd_weight, ce_weight,
            DIVERGENCE, True, F, BLOCK,
        )  # fmt: skip
    else:
        write_gradient(
            student, teacher, label, gradient, columns, stats, coefficient, beta, weights, tau, kd_weight, ce_weight,
            DIVERGENCE, False, F, BLOCK,
        )  # fmt: skip


@triton.jit
def rows_kernel(
    student,
    teacher,
    coefficient,
    labels,
    loss,  # None: stats are read, or are those of a shard
    stats,  # None: they are not kept
    gradient,  # None: it is not wanted
    metrics,  # None: they are not wanted
    sums,  # None: they are not wanted
    columns,
    student_row,  # strides
    student_column,
    teacher_row,
    teacher_column,
    gradient_row,
    gradient_column,
    weights,  # of a mix, or None
    beta: tl.float64,
    tau: tl.float64,
    kd_weight: tl.float64,
    ce_weight: tl.float64,
    DIVERGENCE: tl.constexpr,
    SEPARATE: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether all rows begin at multiples of 16 bytes, and columns lie side by side
    BLOCK: tl.constexpr,
):
    """One row: loss, stats and metrics, unless they are given, and gradient or sums, if wanted; or a shard's stats."""
    SHARD: tl.constexpr = loss is None and gradient is None and sums is None
    F: tl.constexpr = tl.float64 if student.dtype.element_ty == tl.float64 else tl.float32
    beta, tau, kd_weight, ce_weight = double(beta), double(tau), double(kd_weight), double(ce_weight)
    index = tl.program_id(0).to(tl.int64)
    student = (student + index * student_row, student_column, ALIGNED)
    if teacher is not None:
        teacher = (teacher + index * teacher_row, teacher_column, ALIGNED)
    if gradient is not None:
        gradient = (gradient + index * gradient_row, gradient_column, ALIGNED)
    if stats is not None:
        stats += index * 7
    if metrics is not None:
        metrics += index * 6
    if sums is not None:
        sums += index * 3
    if loss is not None:
        loss += index
    weight = tl.load(coefficient + index)
    if weight == 0:  # the row is not read
        if loss is not None or SHARD:
            _write_zeros(loss, stats, gradient, metrics, sums, columns, F, BLOCK)
        else:  # stats are given
            _write_zeros(None, None, gradient, metrics, sums, columns, F, BLOCK)
    else:
        label = None
        if labels is not None:
            label = label_of(student, tl.load(labels + index), columns)
            tl.debug_barrier()  # every thread has read the score before one overwrites it with its gradient
        if loss is not None:
            row_loss, row_stats, row_metrics = loss_of_row(
                student, teacher, label, columns, beta, weights, tau, kd_weight, ce_weight, DIVERGENCE, SEPARATE,
                metrics is not None, F, BLOCK,
            )  # fmt: skip
            tl.store(loss, weight * row_loss)
        elif SHARD:
            row_stats, row_metrics = _shard_of_row(
                student, teacher, label, columns, tau, DIVERGENCE, SEPARATE, metrics is not None, F, BLOCK
            )
        else:
            max_s, sum_s, max_t, sum_t = tl.load(stats), tl.load(stats + 1), tl.load(stats + 2), tl.load(stats + 3)
            row_stats = (max_s, sum_s, max_t, sum_t, tl.load(stats + 4), tl.load(stats + 5), tl.load(stats + 6))
        if loss is not None or SHARD:
            _write(stats, row_stats, 7)
            _write(metrics, row_metrics, 6)
        if sums is not None:
            b = beta_constants(beta, weights, F)
            _write(sums, _sums_of_shard(student, teacher, columns, row_stats, b, tau, DIVERGENCE, F, BLOCK), 3)
        if gradient is not None:
            _write_gradient(
                student, teacher, label, gradient, columns, row_stats, weight, beta, weights, tau, kd_weight, ce_weight,
                DIVERGENCE, F, BLOCK,
            )  # fmt: skip
