"""How rows are launched."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import MIX, TVD, beta_arguments, working_dtype
from ..tuning import check, launch_options
from .kernels import rows_kernel
from .passes import Shape

__all__ = ["divergence_rows"]


@lru_cache
def _shape(dtype: torch.dtype, columns: int, divergence: int, *kind: bool) -> tuple[Shape, int, int]:
    """What a kernel is compiled for, its warps and its ceiling of registers: columns fit (tests/test_compile_gpu.py).

    Left to itself, ptxas spills a few row constants to fit one block more into a multiprocessor; told a ceiling it does
    not. With 128 registers two blocks of 8 warps run side by side, one computing while the other waits.
    """
    wide = dtype == torch.float64
    largest, per_thread, registers = (1024, 4, 255) if wide else (2048, 8, 128)
    if divergence >= MIX.value and not wide:  # its members' sums and weights take the registers of half the columns
        largest, per_thread = 1024, 4
    block = min(largest, max(32 * per_thread, triton.next_power_of_2(columns)))
    shape = Shape(divergence, *kind, F=working_dtype(dtype), BLOCK=block)
    return Shape(*map(tl.constexpr, shape)), block // (32 * per_thread), registers


def divergence_rows(
    student: Tensor,  # [R, V]
    teacher: Tensor | None,  # [R, V]
    coefficient: Tensor,  # [R]
    labels: Tensor | None,  # [R]
    loss: Tensor | None,  # [R]
    stats: Tensor | None,  # [R, 7]
    gradient: Tensor | None,  # [R, V], of any float dtype and stride; it may be the student
    divergence: int,
    beta: float | Sequence[float],
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    *,
    metrics: Tensor | None = None,  # [R, 6]
    sums: Tensor | None = None,  # [R, 3]
) -> None:
    """Writes what is given, as fastkd/ops/drivers/divergence_rows.py says."""
    rows, columns = student.shape
    shard = loss is None and gradient is None and sums is None
    if teacher is None and kd_weight != 0:
        raise ValueError("teacher: needed unless kd_weight is 0")
    if labels is None and ce_weight != 0:
        raise ValueError("labels: needed unless ce_weight is 0")
    if loss is None and stats is None:
        raise ValueError("stats: needed where there is no loss")
    if loss is None and metrics is not None and not shard:
        raise ValueError("metrics: expected None, because they go with a loss, and there is none")
    if sums is not None and (kd_weight == 0 or loss is not None):
        raise ValueError("sums: expected a teacher and statistics of whole rows, and no loss")
    if not 0 <= divergence <= TVD.value and not MIX.value < divergence < 2 * MIX.value:
        raise ValueError(f"divergence: expected 0 to {TVD.value} or a mix's code, got {divergence}")
    teacher = teacher if kd_weight != 0 else None
    labels = labels if ce_weight != 0 else None
    for name, x in (("student", student), ("teacher", teacher), ("gradient", gradient)):
        check(name, x, None, rows, columns)
    check("labels", labels, torch.int64, rows)
    for name, x in (("coefficient", coefficient), ("loss", loss)):
        check(name, x, torch.float64, rows)
    for name, x, width in (("stats", stats, 7), ("metrics", metrics, 6), ("sums", sums, 3)):
        check(name, x, torch.float64, rows, width)
    if rows == 0:
        return
    given = [x for x in (student, teacher, gradient) if x is not None]
    aligned = all(x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0 for x in given)
    kind = labels is not None and temperature != 1, metrics is not None, shard, aligned
    matrices = [None if x is None else (x, *x.stride()) for x in (student, teacher, gradient)]
    numbers = {"tau": float(temperature), "kd_weight": float(kd_weight), "ce_weight": float(ce_weight)}
    outputs = loss, stats, metrics, sums
    shape, warps, registers = _shape(student.dtype, columns, divergence, *kind)
    with torch.cuda.device_of(student):
        options = launch_options(warps, registers)
        rows_kernel[(rows,)](
            *matrices, coefficient, labels, *outputs, columns, S=shape, **beta_arguments(beta), **numbers, **options
        )
