"""How rows are launched."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..common import MIX, TVD, beta_arguments
from .kernels import rows_kernel, shard_kernel

__all__ = ["divergence_rows", "divergence_shard_stats", "divergence_shard_sums"]


def block_and_options(columns: int, dtype: torch.dtype, nvidia: bool, mix: bool = False) -> tuple[int, dict]:
    """Columns a block, and launch options: as many columns a thread as fit its registers (tests/test_compile_gpu.py).

    Left to itself, ptxas spills a few row constants to fit one block more into a multiprocessor; told a ceiling it does
    not. With 128 registers two blocks of 8 warps run side by side, one computing while the other waits.
    """
    largest, per_thread, registers = (1024, 4, 255) if dtype == torch.float64 else (2048, 8, 128)
    if mix and dtype != torch.float64:  # its members' sums and weights take the registers of half the columns
        largest, per_thread = 1024, 4
    block = min(largest, max(32 * per_thread, triton.next_power_of_2(columns)))
    options = {
        "num_warps": block // (32 * per_thread),
        "enable_fp_fusion": True,  # Triton's default differs by version; the two-sum has no product to fuse
    }
    if nvidia:
        options["maxnreg"] = registers
    return block, options


def _check_matrix(name: str, x: Tensor, rows: int, columns: int) -> None:
    if x.shape != (rows, columns) or not x.is_floating_point():
        raise ValueError(f"{name}: expected floating [{rows}, {columns}], got {x.dtype} {list(x.shape)}")


def _check_rows(name: str, x: Tensor, rows: int, dtype: torch.dtype, *trailing: int) -> None:
    if x.shape != (rows, *trailing) or x.dtype != dtype or not x.is_contiguous():
        raise ValueError(f"{name}: expected contiguous {dtype} {[rows, *trailing]}, got {x.dtype} {list(x.shape)}")


def _checked(
    student: Tensor,
    teacher: Tensor | None,
    coefficient: Tensor,
    labels: Tensor | None,
    divergence: int,
    kd_weight: float,
    ce_weight: float,
) -> tuple[Tensor | None, Tensor | None]:
    """The teacher and the labels, each None where its weight is 0; raises for arguments that do not fit."""
    if teacher is None and kd_weight != 0:
        raise ValueError("teacher: needed unless kd_weight is 0")
    if labels is None and ce_weight != 0:
        raise ValueError("labels: needed unless ce_weight is 0")
    if not 0 <= divergence <= TVD.value and not MIX.value < divergence < 2 * MIX.value:
        raise ValueError(f"divergence: expected 0 to {TVD.value} or a mix's code, got {divergence}")
    teacher = teacher if kd_weight != 0 else None
    labels = labels if ce_weight != 0 else None
    rows, columns = student.shape
    for name, matrix in (("student", student), ("teacher", teacher)):
        if matrix is not None:
            _check_matrix(name, matrix, rows, columns)
    _check_rows("coefficient", coefficient, rows, torch.float64)
    if labels is not None:
        _check_rows("labels", labels, rows, torch.int64)
    return teacher, labels


def divergence_rows(
    student: Tensor,  # [R, V]
    teacher: Tensor | None,  # [R, V]
    coefficient: Tensor,  # [R]
    labels: Tensor | None,  # [R]
    loss: Tensor | None,  # [R]
    stats: Tensor | None,  # [R, 7], given where there is no loss
    gradient: Tensor | None,  # [R, V], of any float dtype and stride; it may be the student
    divergence: int,
    beta: float | Sequence[float],
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    *,
    metrics: Tensor | None = None,  # [R, 6]
) -> None:
    """Writes each row's loss, statistics and metrics, and coefficient * d loss / d student: of these what is given."""
    rows, columns = student.shape
    teacher, labels = _checked(student, teacher, coefficient, labels, divergence, kd_weight, ce_weight)
    if gradient is not None:
        _check_matrix("gradient", gradient, rows, columns)
    if loss is not None:
        _check_rows("loss", loss, rows, torch.float64)
    if stats is not None:
        _check_rows("stats", stats, rows, torch.float64, 7)
    if metrics is not None:
        _check_rows("metrics", metrics, rows, torch.float64, 6)
        if loss is None:
            raise ValueError("metrics: expected None, because they go with a loss, and there is none")
    if rows == 0:
        return
    nvidia = student.is_cuda and torch.version.hip is None
    block, options = block_and_options(columns, student.dtype, nvidia, divergence >= MIX.value)
    with torch.cuda.device_of(student):
        rows_kernel[(rows,)](
            student,
            teacher,
            coefficient,
            labels,
            loss,
            stats,
            gradient,
            metrics,
            columns,
            *student.stride(),
            *(teacher.stride() if teacher is not None else (0, 0)),
            *(gradient.stride() if gradient is not None else (0, 0)),
            **beta_arguments(beta),
            tau=float(temperature),
            kd_weight=float(kd_weight),
            ce_weight=float(ce_weight),
            DIVERGENCE=divergence,
            SEPARATE=labels is not None and temperature != 1,
            BLOCK=block,
            **options,
        )


def _launch_shard(
    student: Tensor,
    teacher: Tensor | None,
    coefficient: Tensor,
    labels: Tensor | None,
    stats: Tensor,
    sums: Tensor | None,
    metrics: Tensor | None,
    divergence: int,
    beta: float | Sequence[float],
    temperature: float,
    kd_weight: float,
    ce_weight: float,
) -> None:
    rows, columns = student.shape
    teacher, labels = _checked(student, teacher, coefficient, labels, divergence, kd_weight, ce_weight)
    _check_rows("stats", stats, rows, torch.float64, 7)
    if sums is not None:
        _check_rows("sums", sums, rows, torch.float64, 3)
    if metrics is not None:
        _check_rows("metrics", metrics, rows, torch.float64, 6)
    if rows == 0:
        return
    nvidia = student.is_cuda and torch.version.hip is None
    block, options = block_and_options(columns, student.dtype, nvidia, divergence >= MIX.value)
    with torch.cuda.device_of(student):
        shard_kernel[(rows,)](
            student,
            teacher,
            coefficient,
            labels,
            stats,
            sums,
            metrics,
            columns,
            *student.stride(),
            *(teacher.stride() if teacher is not None else (0, 0)),
            **beta_arguments(beta),
            tau=float(temperature),
            DIVERGENCE=divergence,
            SEPARATE=labels is not None and temperature != 1,
            BLOCK=block,
            **options,
        )


def divergence_shard_stats(
    student: Tensor,  # [R, V]
    teacher: Tensor | None,  # [R, V]
    coefficient: Tensor,  # [R]
    labels: Tensor | None,  # [R]
    stats: Tensor,  # [R, 7]
    *objective: Any,
    metrics: Tensor | None = None,  # [R, 6], 0
) -> None:
    """Writes the statistics of shards of rows, each of its shard alone; in the mean's place its own D.

    And of metrics what a shard has alone: entropies and columns.
    """
    _launch_shard(student, teacher, coefficient, labels, stats, None, metrics, *objective)


def divergence_shard_sums(
    student: Tensor,  # [R, V]
    teacher: Tensor,  # [R, V]
    stats: Tensor,  # [R, 7]
    coefficient: Tensor,  # [R]
    sums: Tensor,  # [R, 3]
    *objective: Any,
) -> None:
    """Writes what shards add to D, to the mean of u and to that of v, by the statistics of the whole rows."""
    divergence, beta, temperature, kd_weight, _ = objective
    numbers = int(divergence), beta, temperature, kd_weight, 0.0
    _launch_shard(student, teacher, coefficient, None, stats, sums, None, *numbers)
