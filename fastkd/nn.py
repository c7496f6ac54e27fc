"""The losses as modules: the constants are given once, the tensors at every call."""

from __future__ import annotations

from torch import Tensor, nn

from .backend import IMPLS
from .checks import REDUCTIONS, Objective, check_choice
from .ops.linear_kl import linear_kl
from .ops.logit_kl import logit_kl

__all__ = ["LinearKLLoss", "LogitKLLoss"]


class _TokenLoss(nn.Module):
    """The keywords that :class:`LogitKLLoss` and :class:`LinearKLLoss` share."""

    def __init__(
        self,
        *,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        temperature: float = 1.0,
        ce_weight: float = 0.0,
        kd_weight: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        # what is wrong with these fails here, not in training
        Objective(divergence, beta, temperature, kd_weight, ce_weight)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("impl", impl, IMPLS)
        self.options: dict = {
            "divergence": divergence,
            "beta": beta,
            "temperature": temperature,
            "ce_weight": ce_weight,
            "kd_weight": kd_weight,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "impl": impl,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LogitKLLoss(_TokenLoss):
    """:func:`fastkd.logit_kl` as a module; keywords as there.

    >>> loss = LogitKLLoss(temperature=2.0)(student_logits, teacher_logits, weight=mask)  # doctest: +SKIP
    """

    def forward(
        self,
        student_logits: Tensor,  # [..., Vs]
        teacher_logits: Tensor | None,  # [..., Vt]
        *,
        weight: Tensor | None = None,  # [...]
        labels: Tensor | None = None,  # [...]
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return logit_kl(
            student_logits, teacher_logits, weight=weight, labels=labels, normalizer=normalizer, **self.options
        )


class LinearKLLoss(_TokenLoss):
    """:func:`fastkd.linear_kl` as a module; keywords as there.

    >>> loss = LinearKLLoss()(student_hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight)
    ... # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        student_scale: float = 1.0,
        teacher_scale: float = 1.0,
        workspace_mb: float | None = None,
        **options,
    ) -> None:
        super().__init__(**options)
        self.options |= {
            "student_scale": student_scale,
            "teacher_scale": teacher_scale,
            "workspace_mb": workspace_mb,
        }

    def forward(
        self,
        student_hidden: Tensor,  # [..., Hs]
        student_weight: Tensor,  # [Vs, Hs]
        teacher_hidden: Tensor | None,  # [..., Ht]
        teacher_weight: Tensor | None,  # [Vt, Ht]
        *,
        student_bias: Tensor | None = None,  # [Vs]
        teacher_bias: Tensor | None = None,  # [Vt]
        weight: Tensor | None = None,  # [...]
        labels: Tensor | None = None,  # [...]
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return linear_kl(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            weight=weight,
            labels=labels,
            normalizer=normalizer,
            **self.options,
        )
