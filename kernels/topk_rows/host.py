"""How rows of top-k teachers are launched."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .kernels import topk_rows_kernel, topk_shard_gradient_kernel, topk_shard_stats_kernel

__all__ = ["topk_rows", "topk_shard_gradient", "topk_shard_stats"]

# Columns a block; tests have smaller ones.
LARGEST_BLOCK = 2048


def sizes_and_options(columns: int, entries: int, dtype: torch.dtype, nvidia: bool) -> tuple[dict[str, int], dict]:
    """Lanes and the shape of a block, of groups of 16 bytes, and launch options.

    A thread has 16 columns of a block, which are in flight at once, and at most two lanes. As in rows.py, ptxas is told
    a ceiling, with which four blocks of 4 warps run side by side.
    """
    width, lanes = 16 // dtype.itemsize, triton.next_power_of_2(entries + 1)
    block = min(LARGEST_BLOCK, max(32 * width, triton.next_power_of_2(columns)))
    options = {
        "num_warps": max(1, block // 512, lanes // 64),
        "enable_fp_fusion": True,  # Triton's default differs by version
    }
    if nvidia:
        options["maxnreg"] = 255 if dtype == torch.float64 or lanes > 256 else 128
    return {"LANES": lanes, "GROUPS": block // width, "WIDTH": width}, options


def _check(name: str, x: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    wanted = dtypes or (x.dtype,)
    if x.shape != shape or x.dtype not in wanted or not (dtypes or x.is_floating_point()):
        what = " or ".join(map(str, dtypes)) or "floating"
        raise ValueError(f"{name}: expected {what} {list(shape)}, got {x.dtype} {list(x.shape)}")
    if dtypes and not x.is_contiguous():
        raise ValueError(f"{name}: expected contiguous, got strides {x.stride()}")


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
    (rows, columns), entries, wide = student.shape, ids.shape[-1], (torch.float64,)
    labels = labels if ce_weight != 0 else None
    tail_log_prob = None if conditional else tail_log_prob
    if len(divergences) != 6:
        raise ValueError(f"divergences: expected 6 weights, got {len(divergences)}")
    if loss is None and stats is None:
        raise ValueError("stats: needed unless there is a loss")
    if loss is None and metrics is not None:
        raise ValueError("metrics of rows go with a loss")
    for name, x, shape, dtypes in (
        ("student", student, (rows, columns), ()),
        ("ids", ids, (rows, entries), (torch.int64,)),
        ("log_probs", log_probs, (rows, entries), wide),
        ("tail_log_prob", tail_log_prob, (rows,), wide),
        ("coefficient", coefficient, (rows,), wide),
        ("labels", labels, (rows,), (torch.int64,)),
        ("loss", loss, (rows,), wide),
        ("stats", stats, (rows, 3), wide),
        ("gradient", gradient, (rows, columns), ()),
        ("metrics", metrics, (rows, 6), wide),
    ):
        if x is not None:
            _check(name, x, shape, *dtypes)
    if rows == 0:
        return
    scale = kd_weight * temperature**2
    nvidia = student.is_cuda and torch.version.hip is None
    sizes, options = sizes_and_options(columns, entries, student.dtype, nvidia)
    with torch.cuda.device_of(student):
        topk_rows_kernel[(rows,)](
            student,
            ids,
            log_probs,
            tail_log_prob,
            coefficient,
            labels,
            loss,
            stats,
            gradient,
            metrics,
            columns,
            entries,
            *student.stride(),
            *(gradient.stride() if gradient is not None else (0, 0)),
            *(scale * float(weight) for weight in divergences),
            float(beta),
            float(temperature),
            float(scale),
            float(ce_weight),
            CONDITIONAL=conditional,
            SEPARATE=labels is not None and temperature != 1,
            **sizes,
            **options,
        )


def topk_shard_stats(
    student: Tensor,  # [R, V]
    aside: Tensor,  # [R, K + 1]
    coefficient: Tensor,  # [R]
    stats: Tensor,  # [R, 3]
    temperature: float,
) -> None:
    """Writes the maximum and the sums of the columns that are not set aside."""
    (rows, columns), entries = student.shape, aside.shape[-1]
    sizes, options = _shard_options(
        student, aside, (("coefficient", coefficient, (rows,)), ("stats", stats, (rows, 3)))
    )
    with torch.cuda.device_of(student):
        topk_shard_stats_kernel[(rows,)](
            student, aside, coefficient, stats, columns, entries, *student.stride(), float(temperature),
            SEPARATE=temperature != 1, **sizes, **options,
        )  # fmt: skip


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
    (rows, columns), entries = student.shape, aside.shape[-1]
    _check("gradient", gradient, (rows, columns))
    wide = (("coefficient", coefficient, (rows,)), ("stats", stats, (rows, 3)), ("factors", factors, (rows, 2)))
    sizes, options = _shard_options(student, aside, (*wide, ("at_ids", at_ids, (rows, entries))))
    with torch.cuda.device_of(student):
        topk_shard_gradient_kernel[(rows,)](
            student, aside, coefficient, stats, factors, at_ids, gradient, columns, entries, *student.stride(),
            *gradient.stride(), float(temperature), SEPARATE=temperature != 1, **sizes, **options,
        )  # fmt: skip


def _shard_options(student: Tensor, aside: Tensor, wide: Sequence[tuple[str, Tensor, tuple]]) -> tuple[dict, dict]:
    _check("aside", aside, (student.shape[0], aside.shape[-1]), torch.int64)
    for name, x, shape in wide:
        _check(name, x, shape, torch.float64)
    nvidia = student.is_cuda and torch.version.hip is None
    return sizes_and_options(student.shape[1], aside.shape[-1], student.dtype, nvidia)
