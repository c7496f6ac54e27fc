"""The kernel: one program takes one row, or a shard of one."""

import triton
import triton.language as tl

from ..common import double, write_row
from .column import RowStats
from .passes import Objective, Row, Scores, first_pass, label_of, loss_of_row, value_sums, write_block, write_gradient


@triton.jit
def _computed(row, index, weight, loss, stats, metrics, sums, objective, S):
    """Of a row that counts; the kernel calls it for Triton, which looks at each launch at constants that it names."""
    zero = double(0.0)
    if loss is not None:
        row_loss, row_stats, row_metrics = loss_of_row(row, objective, S)
        write_row(loss, index, (weight * row_loss,))
    elif S.SHARD:  # as if it were all of the row
        row_stats, own = first_pass(row, objective.tau, S.DIVERGENCE, S)
        row_metrics = [zero] * 2 + own
    else:
        row_stats = RowStats(*[tl.load(stats + index * 7 + i) for i in (0, 1, 2, 3, 4, 5, 6)])
    if loss is not None or S.SHARD:
        write_row(stats, index, row_stats)
        write_row(metrics, index, row_metrics)
    if sums is not None:
        found = zero, zero, zero
        if (row_stats.sum_s != 0) & (row_stats.sum_t != 0):
            found = value_sums(row, row_stats, objective, S.DIVERGENCE, S)
        write_row(sums, index, found)
    if row.gradient is not None:
        if row_stats.careful != 0:
            write_gradient(row, row_stats, weight, objective, True, S)
        else:
            write_gradient(row, row_stats, weight, objective, False, S)


@triton.jit
def rows_kernel(
    student,  # matrices are (pointer, row stride, column stride)
    teacher,
    gradient,  # None: it is not wanted
    coefficient,
    labels,
    loss,  # None: stats are read, or are those of a shard
    stats,  # None: they are not kept
    metrics,  # None: they are not wanted
    sums,  # None: they are not wanted
    columns,
    weights,  # of a mix, or None
    beta: tl.float64,
    tau: tl.float64,
    kd_weight: tl.float64,
    ce_weight: tl.float64,
    S,
):
    """One row: loss, stats and metrics, unless they are given, and gradient or sums, if wanted; or a shard's stats."""
    objective = Objective(double(beta), weights, double(tau), double(kd_weight), double(ce_weight))
    index, zero = tl.program_id(0).to(tl.int64), double(0.0)
    student = Scores(student[0] + index * student[1], student[2])
    if teacher is not None:
        teacher = Scores(teacher[0] + index * teacher[1], teacher[2])
    if gradient is not None:
        gradient = Scores(gradient[0] + index * gradient[1], gradient[2])
    weight = tl.load(coefficient + index)
    if weight == 0:  # the row is not read
        if loss is not None or S.SHARD:  # else stats are given
            write_row(stats, index, (zero,) * 7)
        write_row(loss, index, (zero,))
        write_row(metrics, index, (zero,) * 6)
        write_row(sums, index, (zero,) * 3)
        if gradient is not None:
            for start in range(0, columns, S.BLOCK):
                write_block(gradient, start + tl.arange(0, S.BLOCK), columns, tl.zeros((S.BLOCK,), S.F), True)
    else:
        label = None
        if labels is not None:
            label = label_of(student, tl.load(labels + index), columns)
            tl.debug_barrier()  # every thread has read the score before one overwrites it with its gradient
        row = Row(student, teacher, gradient, label, columns)
        _computed(row, index, weight, loss, stats, metrics, sums, objective, S)
