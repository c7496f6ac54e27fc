"""What every way of computing a loss of a top-k teacher is given.

T tokens, V vocabulary, K ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

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
