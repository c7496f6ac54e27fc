"""The row primitive of teachers that are known by their top: what drivers/divergence_rows.py is of whole rows.

For student scores s [R, V], and of the teacher K ids with their log-probabilities, row by row:

    loss = coefficient * (kd_weight * temperature^2 * D(p, q) + ce_weight * cross_entropy(s, label))

The columns fall into K + 1 categories: the ids, and the tail, which is all others. p is the teacher's mass of each, as
given, q that of softmax(s / temperature); with `conditional` there is no tail, and q is a softmax over the ids alone.
D is a weighted sum of the divergences of fastkd.divergence, and with u_c = dD/dq_c

    d D / d s_j = q_j (u_c(j) - sum_c q_c u_c) / temperature     for column j of category c(j):

one factor times q_j for all the tail's columns, whatever their number, and K columns beside it.

 -  An id of -1, or of no column, and a log-probability of -inf are padding: no category, and the column the tail's.
 -  The student's tail is a sum over its own columns, never 1 less the ids'. Kernels set the K scores aside first.
 -  A tail that the student has nothing in, having no column or only scores of -inf, is no category; what the teacher
    has in it is shared out among the ids: their masses are divided by their sum.
 -  Without a category, or with all scores at -inf, D is 0, and so is its gradient.
 -  The masses need not sum to 1: the tail "ignore" gives some that do not.

One operator writes what it is given of loss, statistics, gradient and metrics. Statistics are what the gradient needs
of a row beside its K scores; without a loss they are given, of a pass before. The gradient may be written over the
student. With `conditional` and a ce_weight of 0, K scores of a row are read, and no others.

Metrics go with a loss, and say of a row (temperature^2 * D, cross-entropy, the student's entropy, the teacher's,
agreement, the student's mass): the entropies are those of the categories, in nats; agreement is 1 where no score, with
`conditional` none of an id, is higher than that of the teacher's likeliest id; the mass is what the ids have of q, with
`conditional` 0. All are 0 where a term has no weight, a row is skipped or has no category.

R rows, V columns, K ids. student [R, V] of any float dtype and stride; ids [R, K] int64, none twice in a row, and
log_probs [R, K] float64, both contiguous; tail_log_prob [R] float64, None for a tail of no mass; coefficient [R]
float64, 0 skips the row (it is not read; loss and gradient are 0); labels [R] int64, NaN where out of range; loss [R]
float64; stats [R, 3] float64, private to each kernel: in the CPU's the maximum of the scores that are neither an id's
nor the label's, and the sums of e^((s - maximum) / temperature) and of e^(s - maximum) over these; gradient [R, V] of
any float dtype and stride; divergences: a weight for each, in the order of fastkd.divergence.DIVERGENCES; metrics
[R, 6] float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...backend import backend_for

__all__ = ["TOPK_STATS", "topk_rows", "topk_rows_problem"]

TOPK_STATS = 3
# Ids in a row, for the kernel in Triton: it holds them in registers.
MOST_IN_TRITON = 511

# ---- schema ---------------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastkd", "FRAGMENT")
_library.define(
    "topk_rows(Tensor student, Tensor ids, Tensor log_probs, Tensor? tail_log_prob, Tensor coefficient, "
    "Tensor? labels, Tensor(a!)? loss, Tensor(b!)? stats, Tensor(c!)? gradient, float[] divergences, "
    "bool conditional, float beta, float temperature, float kd_weight, float ce_weight, Tensor(d!)? metrics=None) -> ()"
)

# ---- fake -----------------------------------------------------------------------------------------------------------


@torch.library.register_fake("fastkd::topk_rows", lib=_library)
def _(*_: object, **__: object) -> None:
    """It writes into tensors it is given."""


# ---- implementation: the extension registers its own for CPU tensors ------------------------------------------------


def _in_triton(*arguments: object, metrics: Tensor | None = None) -> None:
    from ...kernels import topk_rows

    topk_rows.topk_rows(*arguments, metrics=metrics)


_library.impl("topk_rows", _in_triton, "CUDA")

# ---- functions for the other ops ------------------------------------------------------------------------------------


def topk_rows_problem(device: torch.device, entries: int) -> str | None:
    """Why the kernel for this device does not take so many ids in a row, or None."""
    if backend_for(device)[0] != "triton" or entries <= MOST_IN_TRITON:
        return None
    return f"the kernel for GPUs takes at most {MOST_IN_TRITON} ids in a row of a TopK, got {entries}"


def topk_rows(
    student: Tensor,  # [R, V]
    ids: Tensor,  # [R, K]
    log_probs: Tensor,  # [R, K]
    tail_log_prob: Tensor | None,  # [R]
    coefficient: Tensor,  # [R]
    labels: Tensor | None,  # [R]
    loss: Tensor | None,  # [R]
    stats: Tensor | None,  # [R, 3]
    gradient: Tensor | None,  # [R, V], may be the student
    divergences: Sequence[float],  # [6]
    conditional: bool,
    *numbers: float,  # beta, temperature, kd_weight, ce_weight
    metrics: Tensor | None = None,  # [R, 6]
) -> None:
    """Writes each row's loss, statistics and metrics, and coefficient * d loss / d student: of these what is given."""
    call = _in_triton if backend_for(student.device)[0] == "triton" else torch.ops.fastkd.topk_rows
    call(
        student, ids, log_probs, tail_log_prob, coefficient, labels, loss, stats, gradient, divergences, conditional,
        *numbers, metrics=metrics,
    )  # fmt: skip
