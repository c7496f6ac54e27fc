"""The row primitive: divergence and cross-entropy between rows of scores, with its gradient. Every op is built on it.

For student scores s and teacher scores t, both [R, V], row by row:

    loss = coefficient * (kd_weight * temperature^2 * D(softmax(t / temperature), softmax(s / temperature))
                          + ce_weight * cross_entropy(s, label))

The CPU kernels are csrc/cpu/divergence_rows.cpp, the Triton ones kernels/rows.py.

R rows, V columns. coefficient [R] float64, 0 skips the row (it is not read; loss and gradient are 0); labels [R] int64;
loss [R] float64; stats [R, 7] float64, what the gradient needs of a row, private to each kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import backend_for

__all__ = ["STATS", "divergence_gradient", "divergence_rows_", "divergence_stats"]

STATS = 7

_OBJECTIVE = "int divergence, float beta, float temperature, float kd_weight, float ce_weight"

# ---- schema ---------------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastkd", "FRAGMENT")
_library.define(
    "divergence_rows_(Tensor(a!) student, Tensor? teacher, Tensor coefficient, Tensor? labels, Tensor(b!) loss, "
    f"{_OBJECTIVE}) -> ()"
)
_library.define(
    "divergence_stats(Tensor student, Tensor? teacher, Tensor coefficient, Tensor? labels, Tensor(a!) loss, "
    f"Tensor(b!) stats, {_OBJECTIVE}) -> ()"
)
_library.define(
    "divergence_gradient(Tensor student, Tensor? teacher, Tensor stats, Tensor coefficient, Tensor? labels, "
    f"Tensor(a!) gradient, {_OBJECTIVE}) -> ()"
)

# ---- fake -----------------------------------------------------------------------------------------------------------


def _fake(*_: object) -> None:
    """All three write into tensors they are given."""


for _name in ("divergence_rows_", "divergence_stats", "divergence_gradient"):
    torch.library.register_fake(f"fastkd::{_name}", _fake, lib=_library)

# ---- implementation: the extension registers its own for CPU tensors ------------------------------------------------


def _triton(name: str):
    def call(*arguments: object) -> None:
        from ..kernels import rows

        getattr(rows, name)(*arguments)

    return call


for _name in ("divergence_rows_", "divergence_stats", "divergence_gradient"):
    _library.impl(_name, _triton(_name), "CUDA")


def _call(name: str, student: Tensor, *arguments: object) -> None:
    if backend_for(student.device)[0] == "triton":
        _triton(name)(student, *arguments)
    else:
        getattr(torch.ops.fastkd, name)(student, *arguments)


# ---- functions for the other ops ------------------------------------------------------------------------------------


def divergence_rows_(
    student: Tensor,  # [R, V]
    teacher: Tensor | None,  # [R, V]
    coefficient: Tensor,  # [R]
    labels: Tensor | None,  # [R]
    loss: Tensor,  # [R]
    *objective: float,
) -> None:
    """Writes each row's loss, and overwrites `student` with coefficient * d loss / d student."""
    _call("divergence_rows_", student, teacher, coefficient, labels, loss, *objective)


def divergence_stats(
    student: Tensor,  # [R, V]
    teacher: Tensor | None,  # [R, V]
    coefficient: Tensor,  # [R]
    labels: Tensor | None,  # [R]
    loss: Tensor,  # [R]
    stats: Tensor,  # [R, 7]
    *objective: float,
) -> None:
    """Writes each row's loss and the statistics that `divergence_gradient` starts from."""
    _call("divergence_stats", student, teacher, coefficient, labels, loss, stats, *objective)


def divergence_gradient(
    student: Tensor,  # [R, V]
    teacher: Tensor | None,  # [R, V]
    stats: Tensor,  # [R, 7]
    coefficient: Tensor,  # [R]
    labels: Tensor | None,  # [R]
    gradient: Tensor,  # [R, V]
    *objective: float,
) -> None:
    """Writes coefficient * d loss / d student into `gradient`, of any float dtype and stride."""
    _call("divergence_gradient", student, teacher, stats, coefficient, labels, gradient, *objective)
