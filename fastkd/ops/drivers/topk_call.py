"""What every way of computing a loss of a top-k teacher is given, and how it takes rows of scores to losses.

T tokens, V vocabulary, K ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .topk_rows import topk_rows
from .topk_shards import topk_whole_gradient, topk_whole_stats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["TopKCall"]


class TopKCall(NamedTuple):
    """The teacher, the tokens and the objective. Of a shard, ids and labels are those of drivers/topk_shards.py."""

    ids: Tensor  # [T, K] int64
    log_probs: Tensor  # [T, K] float64
    tail_log_prob: Tensor | None  # [T] float64
    coefficient: Tensor  # [T] float64
    labels: Tensor | None  # [T] int64
    group: ProcessGroup | None  # over whose ranks the vocabulary is spread
    objective: tuple[Any, ...]  # the divergences' weights, conditional, beta, temperature, kd_weight, ce_weight

    def at(self, rows: slice | Tensor) -> TopKCall:
        """The call of some tokens."""
        tail, labels = (None if x is None else x[rows] for x in (self.tail_log_prob, self.labels))
        given = self.ids[rows], self.log_probs[rows], tail, self.coefficient[rows], labels
        return TopKCall(*given, self.group, self.objective)

    def rows(
        self,
        student: Tensor,  # [T, V]
        loss: Tensor | None,  # [T]
        stats: Tensor | None,  # [T, 3], of a shard [T, 7]; given where there is no loss
        gradient: Tensor | None,  # [T, V], may be the student
        metrics: Tensor | None = None,  # [T, 6]
    ) -> None:
        """Writes losses, statistics and metrics of rows, and their gradients: of these what is given."""
        if self.group is None:
            given: list[Any] = [*self[:5], loss, stats, gradient, *self.objective]
            topk_rows(student, *given, metrics=metrics)
            return
        if loss is not None:
            stats = topk_whole_stats([(slice(0, len(loss)), student)], self, loss, metrics)
        if gradient is not None:
            assert stats is not None
            topk_whole_gradient(student, self, stats, gradient)
