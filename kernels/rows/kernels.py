"""The kernels: one program takes one row, or a shard of one."""

import triton
import triton.language as tl

from ..common import REVERSE_KL, _beta_constants, _double
from .passes import first_pass, label_of, loss_of_row, refined, value_sums, write_block, write_gradient


@triton.jit
def rows_kernel(
    student,
    teacher,
    coefficient,
    labels,
    loss,  # None: stats are read
    stats,  # None: they are not kept
    gradient,  # None: it is not wanted
    metrics,  # None: they are not wanted
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
    BLOCK: tl.constexpr,
):
    """One row: loss, stats and metrics, unless they are given, and the gradient, if wanted."""
    F: tl.constexpr = tl.float64 if student.dtype.element_ty == tl.float64 else tl.float32
    beta, tau, kd_weight, ce_weight = _double(beta), _double(tau), _double(kd_weight), _double(ce_weight)
    index = tl.program_id(0).to(tl.int64)
    student = (student + index * student_row, student_column)
    if teacher is not None:
        teacher = (teacher + index * teacher_row, teacher_column)
    if gradient is not None:
        gradient = (gradient + index * gradient_row, gradient_column)
    if stats is not None:
        stats += index * 7
    if metrics is not None:
        metrics += index * 6
    weight = tl.load(coefficient + index)
    if weight == 0:  # the row is not read
        if loss is not None:
            tl.store(loss + index, _double(0.0))
            if stats is not None:
                for i in tl.static_range(7):
                    tl.store(stats + i, _double(0.0))
            if metrics is not None:
                for i in tl.static_range(6):
                    tl.store(metrics + i, _double(0.0))
        if gradient is not None:
            for start in range(0, columns, BLOCK):
                write_block(gradient, start, columns, tl.zeros((BLOCK,), F), BLOCK)
    else:
        label = None
        if labels is not None:
            label = label_of(student, tl.load(labels + index), columns)
            tl.debug_barrier()  # every thread has read the score before one overwrites it with its gradient
        if loss is not None:
            row_loss, row_stats, row_metrics = loss_of_row(
                student,
                teacher,
                label,
                columns,
                beta,
                weights,
                tau,
                kd_weight,
                ce_weight,
                DIVERGENCE,
                SEPARATE,
                metrics is not None,
                F,
                BLOCK,
            )
            tl.store(loss + index, weight * row_loss)
            if stats is not None:
                for i in tl.static_range(7):
                    tl.store(stats + i, row_stats[i])
            if metrics is not None:
                for i in tl.static_range(6):
                    tl.store(metrics + i, row_metrics[i])
        else:
            max_s, sum_s, max_t, sum_t = tl.load(stats), tl.load(stats + 1), tl.load(stats + 2), tl.load(stats + 3)
            row_stats = (max_s, sum_s, max_t, sum_t, tl.load(stats + 4), tl.load(stats + 5), tl.load(stats + 6))
        if gradient is not None:
            if row_stats[5] != 0:
                write_gradient(
                    student, teacher, label, gradient, columns, row_stats, weight, beta, weights, tau, kd_weight,
                    ce_weight, DIVERGENCE, True, F, BLOCK,
                )  # fmt: skip
            else:
                write_gradient(
                    student, teacher, label, gradient, columns, row_stats, weight, beta, weights, tau, kd_weight,
                    ce_weight, DIVERGENCE, False, F, BLOCK,
                )  # fmt: skip


@triton.jit
def shard_kernel(
    student,
    teacher,
    coefficient,
    labels,
    stats,
    sums,  # None: stats are written
    metrics,  # None: they are not wanted
    columns,
    student_row,  # strides
    student_column,
    teacher_row,
    teacher_column,
    weights,  # of a mix, or None
    beta: tl.float64,
    tau: tl.float64,
    DIVERGENCE: tl.constexpr,
    SEPARATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One shard of a row: its statistics, as if it were all of the row, or by those of the row the sums of pass 2."""
    F: tl.constexpr = tl.float64 if student.dtype.element_ty == tl.float64 else tl.float32
    beta, tau = _double(beta), _double(tau)
    index = tl.program_id(0).to(tl.int64)
    student = (student + index * student_row, student_column)
    if teacher is not None:
        teacher = (teacher + index * teacher_row, teacher_column)
    stats += index * 7
    kept = tl.load(coefficient + index) != 0  # of others the row is not read
    if sums is None:
        if kept:
            label = None
            if labels is not None:
                label = label_of(student, tl.load(labels + index), columns)
            divergence, row_stats, own = first_pass(
                student, teacher, label, columns, tau, DIVERGENCE, SEPARATE, metrics is not None, F, BLOCK
            )
            if teacher is not None and DIVERGENCE == REVERSE_KL:
                divergence = refined(divergence, student, teacher, columns, row_stats, tau, F, BLOCK)
            max_s, sum_s, max_t, sum_t, _, saturated, sum_1 = row_stats
            row_stats = (max_s, sum_s, max_t, sum_t, divergence, saturated, sum_1)
            for i in tl.static_range(7):
                tl.store(stats + i, row_stats[i])
            if metrics is not None:
                for i in tl.static_range(4):
                    tl.store(metrics + index * 6 + 2 + i, own[i])
        else:
            for i in tl.static_range(7):
                tl.store(stats + i, _double(0.0))
    else:
        sums += index * 3
        max_s, sum_s, max_t, sum_t = tl.load(stats), tl.load(stats + 1), tl.load(stats + 2), tl.load(stats + 3)
        if kept & (sum_s != 0) & (sum_t != 0):
            zero = _double(0.0)
            row_stats = (max_s, sum_s, max_t, sum_t, zero, zero, zero)
            b = _beta_constants(beta, weights, F)
            found = value_sums(student, teacher, columns, row_stats, b, tau, DIVERGENCE, F, BLOCK)
            for i in tl.static_range(3):
                tl.store(sums + i, found[i])
        else:
            for i in tl.static_range(3):
                tl.store(sums + i, _double(0.0))
