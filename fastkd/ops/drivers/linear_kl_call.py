"""What every way of computing linear_kl is given, and how it takes rows of scores to losses and gradients.

T tokens, V vocabulary, H hidden width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ...distributed import sum_
from .divergence_rows import STATS, divergence_rows
from .whole_rows import RowBlock, whole_row_gradient, whole_row_stats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Call", "Projection", "sum_over"]


class Projection(NamedTuple):
    """One model's vocabulary projection and what goes into it."""

    hidden: Tensor  # [T, H]
    weight: Any  # [V, H], a tensor or a QuantizedWeight
    bias: Tensor | None  # [V]
    scale: float
    softcap: float | None = None


class Call(NamedTuple):
    """What every way of computing the op is given, but for the objective."""

    student: Projection
    teacher: Projection | None  # None: cross-entropy alone
    vocabulary: int  # that both models share; of a shard its columns
    columns: int  # of the student that count: all for the cross-entropy, else what both models share
    coefficient: Tensor  # [T] float64
    labels: Tensor | None  # [T] int64
    workspace_bytes: int
    gradients: list[bool]  # of hidden states, weight, bias
    group: ProcessGroup | None  # over whose ranks the vocabulary is spread
    widest: int  # columns of the largest shard, or `columns`: chunks have to be the same on all ranks
    metrics: Tensor | None  # [T, 6], to be written, of kept tokens alone

    @property
    def in_parts(self) -> bool:
        """Whether rows are put together from parts, whose kernels do it in several passes."""
        return self.group is not None or self.columns > self.vocabulary

    def rows(
        self,
        student: Tensor,  # [n, columns]
        teacher: Tensor | None,  # [n, vocabulary]
        coefficient: Tensor,  # [n]
        labels: Tensor | None,  # [n]
        loss: Tensor,  # [n]
        gradient: Tensor | None,  # [n, columns], may be the student
        *objective: Any,
        metrics: Tensor | None = None,  # [n, 6]
    ) -> None:
        """Writes losses and metrics of rows, and coefficient * d loss / d student: of these what is given."""
        if not self.in_parts:
            divergence_rows(student, teacher, coefficient, labels, loss, None, gradient, *objective, metrics=metrics)
            return
        block = RowBlock(slice(0, len(coefficient)), student, teacher)
        stats = coefficient.new_empty(len(coefficient), STATS)
        whole_row_stats([block], coefficient, labels, loss, stats, self.group, *objective, metrics=metrics)
        if gradient is not None:
            whole_row_gradient(block, stats, coefficient, labels, gradient, *objective)


def sum_over(group: ProcessGroup | None, hidden_grad: Tensor | None) -> None:
    """Makes a shard's gradient of the hidden states the whole vocabulary's."""
    if group is not None and hidden_grad is not None:
        sum_(hidden_grad, group)
