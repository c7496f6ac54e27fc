"""linear_kl with a top-k teacher on a CPU: by rows, in a workspace that stays in cache.

T tokens, V vocabulary, H hidden width.
"""

from __future__ import annotations

from torch import Tensor

from .linear_kl_call import Projection
from .linear_kl_cpu import by_rows, capped_
from .topk_call import TopKCall
from .topk_shards import topk_call_rows

__all__ = ["on_cpu"]


def on_cpu(
    student: Projection,
    call: TopKCall,
    widest: int,  # columns of the largest shard
    workspace_bytes: int,
    gradients: list[bool],  # of hidden states, weight, bias
    metrics: Tensor | None,  # [T, 6], to be written, of kept tokens alone
) -> tuple[Tensor, ...]:
    """Losses [T] and the three gradients."""

    def losses_(rows: slice | Tensor, workspace: Tensor, loss: Tensor, told: Tensor | None) -> None:
        scores, own, wanted = workspace[0], call.at(rows), any(gradients)

        def of_some(part: slice) -> None:
            gradient = scores[part] if wanted else None
            of_part = None if told is None else told[part]
            topk_call_rows(scores[part], own.at(part), loss[part], None, gradient, of_part)

        capped_(scores, None, (student.softcap, None), wanted, call.group is not None, of_some)

    columns = student.weight.shape[0]
    return by_rows(
        student, columns, widest, call.coefficient, workspace_bytes, 1, gradients, call.group, metrics, losses_
    )
