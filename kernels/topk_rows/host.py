"""How rows of top-k teachers are launched."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import working_dtype
from ..tuning import check, launch_options
from .kernels import topk_rows_kernel, topk_shard_gradient_kernel, topk_shard_stats_kernel
from .rest import Rows, Setting

__all__ = ["topk_rows", "topk_shard_gradient", "topk_shard_stats"]

# Columns a block; tests have smaller ones.
LARGEST_BLOCK = 2048


@lru_cache
def _setting(
    dtype: torch.dtype, columns: int, entries: int, largest: int, separate: bool, conditional: bool
) -> tuple[Setting, int, int]:
    """What a kernel is compiled for, its warps and its ceiling of registers.

    A thread has 16 columns of a block, which are in flight at once, and at most two lanes. As in rows/, ptxas is told a
    ceiling, with which four blocks of 4 warps run side by side.
    """
    width, lanes, wide = 16 // dtype.itemsize, triton.next_power_of_2(entries + 1), dtype == torch.float64
    block = min(largest, max(32 * width, triton.next_power_of_2(columns)))
    constants = (working_dtype(dtype), block // width, width, lanes, separate, conditional)
    warps, registers = max(1, block // 512, lanes // 64), 255 if wide or lanes > 256 else 128
    return Setting(*map(tl.constexpr, constants)), warps, registers


def _constants(student: Tensor, entries: int, separate: bool, conditional: bool = False) -> dict:
    """Of a launch, with its options."""
    setting, *given = _setting(student.dtype, student.shape[1], entries, LARGEST_BLOCK, separate, conditional)
    return {"S": setting, **launch_options(*given)}


def _rows(x: Tensor) -> Rows:
    return Rows(x, *x.stride(), x.shape[1])


def topk_rows(
    student: Tensor,  # [R, V]
    ids: Tensor,  # [R, K]
    log_probs: Tensor,  # [R, K]
    tail_log_prob: Tensor | None,  # [R]
    coefficient: Tensor,  # [R]
    labels: Tensor | None,  # [R]
    loss: Tensor | None,  # [R]
    stats: Tensor | None,  # [R, 3], given where there is no loss
    gradient: Tensor | None,  # [R, V], of any float dtype and stride; it may be the student
    divergences: Sequence[float],  # [6]
    conditional: bool,
    beta: float,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    metrics: Tensor | None = None,  # [R, 6]
) -> None:
    """Writes each row's loss, statistics and metrics, and coefficient * d loss / d student: of these what is given."""
    (rows, columns), entries, wide = student.shape, ids.shape[-1], torch.float64
    labels = labels if ce_weight != 0 else None
    tail_log_prob = None if conditional else tail_log_prob
    if len(divergences) != 6:
        raise ValueError(f"divergences: expected 6 weights, got {len(divergences)}")
    if loss is None and stats is None:
        raise ValueError("stats: needed unless there is a loss")
    if loss is None and metrics is not None:
        raise ValueError("metrics of rows go with a loss")
    check("student", student, None, rows, columns)
    check("ids", ids, torch.int64, rows, entries)
    check("log_probs", log_probs, wide, rows, entries)
    check("labels", labels, torch.int64, rows)
    check("gradient", gradient, None, rows, columns)
    for name, x in (("tail_log_prob", tail_log_prob), ("coefficient", coefficient), ("loss", loss)):
        check(name, x, wide, rows)
    for name, x, width in (("stats", stats, 3), ("metrics", metrics, 6)):
        check(name, x, wide, rows, width)
    if rows == 0:
        return
    scale = kd_weight * temperature**2
    numbers = (*(scale * weight for weight in divergences), beta, temperature, scale, ce_weight)
    with torch.cuda.device_of(student):
        topk_rows_kernel[(rows,)](
            _rows(student), ids, log_probs, tail_log_prob, coefficient, labels, loss, stats,
            None if gradient is None else _rows(gradient), metrics, entries, *map(float, numbers),
            **_constants(student, entries, labels is not None and temperature != 1, conditional),
        )  # fmt: skip


def topk_shard_stats(
    student: Tensor,  # [R, V]
    aside: Tensor,  # [R, K + 1]
    coefficient: Tensor,  # [R]
    stats: Tensor,  # [R, 3]
    temperature: float,
) -> None:
    """Writes the maximum and the sums of the columns that are not set aside."""
    _launch_shard(topk_shard_stats_kernel, temperature, student, aside, coefficient, stats)


def topk_shard_gradient(
    student: Tensor,  # [R, V]
    aside: Tensor,  # [R, K + 1]
    coefficient: Tensor,  # [R]
    stats: Tensor,  # [R, 3]
    factors: Tensor,  # [R, 2]
    at_ids: Tensor,  # [R, K + 1]
    gradient: Tensor,  # [R, V], of any float dtype and stride; it may be the student
    temperature: float,
) -> None:
    """Writes factors times exponentials, and what is given of the columns set aside."""
    check("factors", factors, torch.float64, len(student), 2)
    check("at_ids", at_ids, torch.float64, *aside.shape)
    check("gradient", gradient, None, *student.shape)
    given = factors, at_ids, _rows(gradient)
    _launch_shard(topk_shard_gradient_kernel, temperature, student, aside, coefficient, stats, *given)


def _launch_shard(
    kernel: triton.JITFunction, temperature: float, student: Tensor, aside: Tensor, coefficient: Tensor, stats: Tensor,
    *given: Tensor | Rows,
) -> None:  # fmt: skip
    rows, entries = len(student), aside.shape[-1]
    check("student", student, None, rows, student.shape[1])
    check("aside", aside, torch.int64, rows, entries)
    check("coefficient", coefficient, torch.float64, rows)
    check("stats", stats, torch.float64, rows, 3)
    arguments = aside, coefficient, stats, *given, entries, float(temperature)
    with torch.cuda.device_of(student):
        kernel[(rows,)](_rows(student), *arguments, **_constants(student, entries, temperature != 1))
