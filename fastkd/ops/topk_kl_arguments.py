"""The arguments of both losses with a teacher that is known by its top: their checks, and what becomes of them.

K ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..backend import use_fused
from ..checks import Objective, TokenArguments, numbers
from ..teachers import WITHOUT_TAIL, TopK
from .autograd import wants_gradient
from .drivers.topk_rows import topk_rows_problem
from .dtypes import score_dtype
from .linear_kl_arguments import flat
from .metrics import averaged_of_topk
from .vocabulary_shards import NO_SHARD, Facts, VocabularyShard

__all__ = ["Checked", "Result", "check_teacher", "objective_for"]

Result: TypeAlias = Tensor | tuple[Tensor, dict[str, Tensor]]


class Checked(NamedTuple):
    """The arguments of either function, checked, and of this rank alone."""

    tensors: tuple[Any, ...]  # the student's logits; or its hidden states, weight and bias
    columns: int  # of the student's vocabulary, or this rank's shard of it
    teacher: TopK
    objective: Objective
    tokens: TokenArguments
    keywords: dict[str, Any]
    fused: bool

    @property
    def leading(self) -> torch.Size:
        return self.tensors[0].shape[:-1]

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def dtype(self) -> torch.dtype:
        return score_dtype(self.tensors[0])

    def facts(self) -> Facts:
        """What this rank tells the others that hold a shard of the vocabulary."""
        teacher, student, coefficient = self.teacher, self.tensors[0], self.coefficient()
        others = {
            **self.keywords,
            "reduction": self.tokens.reduction,
            "fused": self.fused,
            "dtype": student.dtype,
            "device": self.device.type,
            "gradients": [wants_gradient(x) for x in self.tensors],
            "teacher": (teacher.tail, teacher.temperature, teacher.indices.shape[-1]),
        }
        hidden = flat(student) if len(self.tensors) > 1 else None
        given = [
            x.reshape(-1).double() for x in (teacher.indices, teacher.log_probs, teacher.tail_log_prob) if x is not None
        ]
        known = torch.cat(given)
        return Facts(self.objective, others, self.columns, None, self.tokens, hidden, None, coefficient != 0, known)

    def coefficient(self) -> Tensor:
        return self.tokens.coefficients(self.leading, self.device)

    def for_op(self, shard: VocabularyShard | None) -> tuple[list[Any], list[Any], Tensor]:
        """(teacher, coefficient and labels; the trailing arguments; [tokens] the log-probability of its tail)"""
        objective, teacher, coefficient = self.objective, self.teacher, self.coefficient()
        ids, log_probs, tail = teacher.for_op(
            objective.temperature, self.columns if shard is None else shard.vocabulary
        )
        labels = self.tokens.flat_labels() if objective.ce_weight != 0 else None
        if shard is not None:
            ids, labels = shard.local_columns(ids), None if labels is None else shard.local_columns(labels)
        of_teacher = [ids.contiguous(), log_probs.contiguous(), tail.contiguous() if teacher.tail == "bucket" else None]
        weights = (objective.kd_weight, objective.ce_weight, *objective.all_weights)
        trailing = [teacher.tail == "conditional", numbers(objective.beta, objective.temperature, *weights)]
        over = NO_SHARD if shard is None else (shard.group.group_name, shard.widest)
        return [*of_teacher, coefficient, labels], [*trailing, *over, self.keywords["return_metrics"]], tail

    def result(self, loss: Tensor, rows: Tensor, tail: Tensor) -> Result:
        """What is returned of a loss, [tokens] or its sum, with metrics if they are asked for."""
        loss = (loss.reshape(self.leading) if self.tokens.reduction == "none" else loss.sum()).to(self.dtype)
        if not self.keywords["return_metrics"]:
            return loss
        weight = self.tokens.weights(self.leading, self.device)
        mass = (-tail.expm1()).masked_fill(self.coefficient() == 0, 0)  # what the ids have in the teacher
        mass_of_student = self.teacher.tail != "conditional"
        return loss, averaged_of_topk(rows, mass, weight, self.objective, self.dtype, mass_of_student)

    def of_reference(
        self, shard: VocabularyShard | None, function: Callable[..., Tensor], *given: Any, **more: Any
    ) -> Result:
        """What the reference makes of the same."""
        metrics: dict[str, Tensor] | None = {} if self.keywords["return_metrics"] else None
        options = {**vars(self.objective), **vars(self.tokens), **more}
        loss = function(*given, shard=shard, metrics=metrics, **options)
        return loss if metrics is None else (loss, metrics)


def objective_for(teacher: TopK, *arguments: Any) -> Objective:
    """The objective of these arguments, checked: its divergences have to be defined for the tail."""
    objective = Objective(*arguments)
    undefined = [name for name in objective.members if name not in WITHOUT_TAIL]
    if teacher.tail in ("ignore", "renormalize") and undefined and objective.kd_weight != 0:
        raise ValueError(
            f"divergence: expected forward_kl or skew_kl, as the teacher's tail is {teacher.tail!r}, got "
            f"{undefined[0]!r}, which weighs what the student has in the tail by what the teacher has there; "
            'tail="bucket" and tail="conditional" serve every divergence'
        )
    return objective


def check_teacher(
    teacher: TopK, leading: torch.Size, device: torch.device, tokens: TokenArguments, impl: str, sharded: bool
) -> tuple[TopK, bool]:
    """The teacher as the ops take it, if it goes with the student; and whether the call runs on kernels."""
    its = teacher.check(leading, device, lambda: (tokens.weights(leading, device) != 0).reshape(leading))
    return its, use_fused(impl, device, topk_rows_problem(device, teacher.indices.shape[-1] + sharded))
