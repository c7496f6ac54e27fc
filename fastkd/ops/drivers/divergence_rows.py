"""The row primitive: divergence and cross-entropy between rows of scores, with its gradient. Every op is built on it.

For student scores s and teacher scores t, both [R, V], row by row:

    loss = coefficient * (kd_weight * temperature^2 * D(softmax(t / temperature), softmax(s / temperature))
                          + ce_weight * cross_entropy(s, label))

The CPU kernels are csrc/cpu/divergence_rows.cpp. GPUs have two: kernels/rows/ in Triton, which takes anything, and
csrc/cuda/divergence_rows.cu in CUDA C++, which reads a row once and knows no mix.

One operator writes what it is given of loss, statistics, gradient, metrics and sums. Statistics are what the gradient
needs of a row; without a loss they are given, of a pass before. The gradient may be written over the student. Metrics
go with a loss, and say of a row (temperature^2 * D, cross-entropy, the student's entropy, the teacher's, the column of
the student's highest score, of the teacher's): at the temperature but for the cross-entropy, in nats. Columns count
from 1; of some that are as high it is the first. All are 0 where a term has no weight, a row is skipped, or a model has
no distribution there.

A row may also be a shard of a longer one, whose label counts from the shard's first column, or is ELSEWHERE. There is
no loss then, and whole_rows.py says what comes of the shards:

 -  With statistics alone, they are those of the shard as if it were the row: (max_s, sum_s, max_t, sum_t, D,
    unspecified, sum_1); with metrics beside them, these have the shard's own entropies and columns.
 -  Of divergences from JSD on, sums are what the shard adds to the row's D, mean of u and mean of v: by the statistics
    of the whole row, as the gradient is.
 -  Of shards without columns nothing is written.

R rows, V columns. coefficient [R] float64, 0 skips the row (it is not read; what is written of it is 0); labels [R]
int64; loss [R] float64; stats [R, 7] float64, private to each kernel; gradient [R, V] of any float dtype and stride;
metrics [R, 6] and sums [R, 3] float64.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...backend import backend_for
from ...divergence import MIX

__all__ = [
    "ELSEWHERE",
    "METRICS",
    "STATS",
    "CudaRows",
    "cuda_rows_problem",
    "divergence_rows",
    "gpu_row_kernels",
    "gpu_rows",
]

STATS = 7
METRICS = 6
# The label of a shard of a row, in another shard of which the label lies.
ELSEWHERE = -(2**63)

# ---- schema ---------------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastkd", "FRAGMENT")
# `beta` is a number or, of a mix, a list: beta and every divergence's weight.
_ROWS = (
    "Tensor student, Tensor? teacher, Tensor coefficient, Tensor? labels, Tensor(a!)? loss, Tensor(b!)? stats, "
    "Tensor(c!)? gradient, int divergence, float[1] beta, float temperature, float kd_weight, float ce_weight"
)
_library.define(f"divergence_rows({_ROWS}, Tensor(d!)? metrics=None, Tensor(e!)? sums=None) -> ()")
# The same on a GPU, for rows that the kernel in CUDA C++ is made for; it knows no mix.
_library.define(f"divergence_rows_cuda({_ROWS}, int blocks) -> ()".replace("float[1]", "float"))

# ---- fake -----------------------------------------------------------------------------------------------------------


@torch.library.register_fake("fastkd::divergence_rows", lib=_library)
def _(*_: object, **__: object) -> None:
    """It writes into tensors it is given."""


# ---- implementation: the extension registers its own for CPU tensors ------------------------------------------------


class CudaRows:
    """csrc/cuda/divergence_rows.cu, with the functions of kernels/rows/."""

    blocks = -1  # of gpu_rows

    @classmethod
    def divergence_rows(cls, *arguments: Any) -> None:
        torch.ops.fastkd.divergence_rows_cuda(*arguments, cls.blocks)

    @staticmethod
    def takes(student: Tensor, teacher: Tensor | None, gradient: Tensor | None = None) -> bool:
        """Whether it is made for such rows: 32 or 16 bits, both models alike, columns side by side.

        Gradients of rows of 16 bits are of their dtype.
        """
        given = [x for x in (student, teacher, gradient) if x is not None]
        return (
            all(x.dtype in (torch.float32, torch.float16, torch.bfloat16) and x.stride(1) == 1 for x in given)
            and (teacher is None or teacher.dtype == student.dtype)
            and (gradient is None or student.dtype in (torch.float32, gradient.dtype))
        )


def cuda_rows_problem() -> str | None:
    """Why the CUDA C++ kernel cannot be used, or None."""
    if torch._C._dispatch_has_kernel_for_dispatch_key("fastkd::divergence_rows_cuda", "CUDA"):
        return None
    return "the extension was built without CUDA; install with FASTKD_BUILD=cuda, where nvcc and a CUDA torch are"


# Which of the two GPU kernels is preferred. Nothing but a measurement makes it "cuda", and there is none yet.
_preferred = "triton"


@contextlib.contextmanager
def gpu_rows(name: str, blocks: int = -1) -> Iterator[None]:
    """Rows on a GPU take the kernel "triton" or, where it is made for them, "cuda": for tests and benchmarks.

    `blocks` overrides how the latter shares a row out among multiprocessors; see csrc/cuda/divergence_rows.cu. Raises
    RuntimeError where the CUDA C++ kernel has not been built.
    """
    global _preferred
    emulated = torch._C._dispatch_has_kernel_for_dispatch_key("fastkd::divergence_rows_cuda", "CPU")
    if name == "cuda" and cuda_rows_problem() and not emulated:
        raise RuntimeError(cuda_rows_problem())
    before = _preferred, CudaRows.blocks
    _preferred, CudaRows.blocks = name, blocks
    try:
        yield
    finally:
        _preferred, CudaRows.blocks = before


def gpu_row_kernels() -> dict[str, Callable[[], contextlib.AbstractContextManager]]:
    """The kernels that there are for rows on a GPU, by name: contexts in which calls take this one."""
    names = ["triton"] if cuda_rows_problem() else ["triton", "cuda"]
    return {name: functools.partial(gpu_rows, name) for name in names}


def _on_gpu(
    student: Tensor, teacher: Tensor | None, *arguments: Any, metrics: Tensor | None = None, sums: Tensor | None = None
) -> None:
    _, _, loss, _, gradient, divergence, *_ = arguments
    whole = (loss is not None or gradient is not None) and metrics is None and sums is None
    if _preferred == "cuda" and whole and divergence < MIX and CudaRows.takes(student, teacher, gradient):
        CudaRows.divergence_rows(student, teacher, *arguments)
    else:
        from ...kernels import rows

        rows.divergence_rows(student, teacher, *arguments, metrics=metrics, sums=sums)


_library.impl("divergence_rows", _on_gpu, "CUDA")

# ---- function for the other ops ------------------------------------------------------------------------------------


def divergence_rows(
    student: Tensor,  # [R, V]
    teacher: Tensor | None,  # [R, V]
    coefficient: Tensor,  # [R]
    labels: Tensor | None,  # [R]
    loss: Tensor | None,  # [R]
    stats: Tensor | None,  # [R, 7]
    gradient: Tensor | None,  # [R, V]
    *objective: Any,
    metrics: Tensor | None = None,  # [R, 6]
    sums: Tensor | None = None,  # [R, 3]
) -> None:
    """Writes what is given, but statistics, which are read where there is a gradient or sums and no loss."""
    if loss is None and student.shape[1] == 0:
        return
    call = _on_gpu if backend_for(student.device)[0] == "triton" else torch.ops.fastkd.divergence_rows
    outputs = loss, stats, gradient
    call(student, teacher, coefficient, labels, *outputs, *objective, metrics=metrics, sums=sums)
