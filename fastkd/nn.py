"""The losses as modules: the constants are given once, the tensors at every call.

Constants that do not fit raise ValueError or TypeError where the module is made, tensors where it is called. No module
holds a parameter or a buffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .backend import IMPLS
from .checks import REDUCTIONS, Objective, TokenArguments, as_int, as_number, check_choice, check_flag, is_finite
from .distributed import check_group
from .divergence import Divergence
from .heads import Head
from .ops.attention_kl import attention_kl
from .ops.attention_kl_arguments import as_scale, check_heads, check_kv_heads
from .ops.cka_loss import check_constants, cka_loss
from .ops.linear_kl import linear_kl
from .ops.linear_kl_arguments import as_softcap, as_workspace
from .ops.logit_kl import logit_kl
from .ops.relation_kl import relation_kl
from .relative_bias import RelativeBias
from .teachers import TopK

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["AttentionKLLoss", "CKALoss", "LinearKLLoss", "LogitKLLoss", "RelationKLLoss"]


class _Loss(nn.Module):
    """Constants of a loss, shown by repr."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options: dict[str, Any] = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


# What is wrong with constants fails where a module is made, not in training. Each class names all its keywords, so that
# Python, type checkers and help() know them.


def _check_token_constants(
    ignore_index: int, reduction: str, vocab_group: ProcessGroup | None, return_metrics: bool, impl: str
) -> None:
    TokenArguments(None, None, ignore_index, reduction, None)
    if vocab_group is not None:
        check_group(vocab_group, "vocab_group")
    check_flag("return_metrics", return_metrics)
    check_choice("impl", impl, IMPLS)


class LogitKLLoss(_Loss):
    """``fastkd.logit_kl`` as a module; keywords as there.

    Examples:
        >>> loss = LogitKLLoss(temperature=2.0)(student_logits, teacher_logits, weight=mask)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        divergence: Divergence | Mapping[Divergence, float] = "forward_kl",
        beta: float = 0.5,
        temperature: float = 1.0,
        ce_weight: float = 0.0,
        kd_weight: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        vocab_group: ProcessGroup | None = None,
        return_metrics: bool = False,
        impl: str = "auto",
    ) -> None:
        Objective(divergence, beta, temperature, kd_weight, ce_weight)
        _check_token_constants(ignore_index, reduction, vocab_group, return_metrics, impl)
        super().__init__(
            divergence=divergence,
            beta=beta,
            temperature=temperature,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            vocab_group=vocab_group,
            return_metrics=return_metrics,
            impl=impl,
        )

    def forward(
        self,
        student_logits: Tensor,  # [..., Vs]
        teacher_logits: Tensor | TopK | None,  # [..., Vt]
        *,
        weight: Tensor | None = None,  # [...]
        labels: Tensor | None = None,  # [...]
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss, as ``fastkd.logit_kl`` returns it."""
        return logit_kl(
            student_logits, teacher_logits, weight=weight, labels=labels, normalizer=normalizer, **self.options
        )


class LinearKLLoss(_Loss):
    """``fastkd.linear_kl`` as a module; keywords as there.

    Examples:
        >>> criterion = LinearKLLoss()
        >>> criterion(student_hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        student_scale: float = 1.0,
        teacher_scale: float = 1.0,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        workspace_mb: float | None = None,
        divergence: Divergence | Mapping[Divergence, float] = "forward_kl",
        beta: float = 0.5,
        temperature: float = 1.0,
        ce_weight: float = 0.0,
        kd_weight: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        vocab_group: ProcessGroup | None = None,
        return_metrics: bool = False,
        impl: str = "auto",
    ) -> None:
        Objective(divergence, beta, temperature, kd_weight, ce_weight)
        _check_token_constants(ignore_index, reduction, vocab_group, return_metrics, impl)
        as_number("student_scale", student_scale, "that is finite", is_finite)
        as_number("teacher_scale", teacher_scale, "that is finite", is_finite)
        as_softcap("student_softcap", student_softcap)
        as_softcap("teacher_softcap", teacher_softcap)
        as_workspace(workspace_mb)
        super().__init__(
            student_scale=student_scale,
            teacher_scale=teacher_scale,
            student_softcap=student_softcap,
            teacher_softcap=teacher_softcap,
            workspace_mb=workspace_mb,
            divergence=divergence,
            beta=beta,
            temperature=temperature,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            vocab_group=vocab_group,
            return_metrics=return_metrics,
            impl=impl,
        )

    def forward(
        self,
        student_hidden: Tensor,  # [..., Hs]
        student_weight: Tensor | Head,  # [Vs, Hs]
        teacher_hidden: Tensor | TopK | None,  # [..., Ht]
        teacher_weight: Tensor | Head | None = None,  # [Vt, Ht]
        *,
        student_bias: Tensor | None = None,  # [Vs]
        teacher_bias: Tensor | None = None,  # [Vt]
        weight: Tensor | None = None,  # [...]
        labels: Tensor | None = None,  # [...]
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss, as ``fastkd.linear_kl`` returns it."""
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


def _check_attention_constants(num_heads: int, reduction: str, impl: str) -> None:
    check_heads(as_int("num_heads", num_heads), {})
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("impl", impl, IMPLS)


class RelationKLLoss(_Loss):
    """``fastkd.relation_kl`` as a module; keywords as there.

    Examples:
        >>> loss = RelationKLLoss(num_heads=32)([q_s, k_s, v_s], [q_t, k_t, v_t], key_mask=mask)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        num_heads: int,
        causal: bool | Sequence[bool] = False,
        divergence: Divergence | Mapping[Divergence, float] = "forward_kl",
        beta: float = 0.5,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        Objective(divergence, beta, temperature=1.0, kd_weight=1.0, ce_weight=0.0)
        _check_attention_constants(num_heads, reduction, impl)
        super().__init__(
            num_heads=num_heads,
            causal=causal,
            divergence=divergence,
            beta=beta,
            reduction=reduction,
            impl=impl,
        )

    def forward(
        self,
        student: Tensor | Sequence[Tensor],  # [B, L, Hs]
        teacher: Tensor | Sequence[Tensor],  # [B, L, Ht]
        *,
        key_mask: Tensor | Sequence[Tensor | None] | None = None,  # [B, L]
        normalizer: float | Tensor | Sequence[float | Tensor | None] | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """The loss, as ``fastkd.relation_kl`` returns it."""
        return relation_kl(student, teacher, key_mask=key_mask, normalizer=normalizer, **self.options)


class AttentionKLLoss(_Loss):
    """``fastkd.attention_kl`` as a module; keywords as there.

    Examples:
        >>> loss = AttentionKLLoss(num_heads=12)(q_s, k_s, q_t, k_t, key_mask=mask)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        teacher_num_kv_heads: int | None = None,
        student_scale: float | None = None,
        teacher_scale: float | None = None,
        causal: bool = False,
        divergence: Divergence | Mapping[Divergence, float] = "forward_kl",
        beta: float = 0.5,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        as_scale("student_scale", student_scale)
        as_scale("teacher_scale", teacher_scale)
        Objective(divergence, beta, temperature=1.0, kd_weight=1.0, ce_weight=0.0)
        _check_attention_constants(num_heads, reduction, impl)
        check_kv_heads("num_kv_heads", num_kv_heads, as_int("num_heads", num_heads))
        check_kv_heads("teacher_num_kv_heads", teacher_num_kv_heads, as_int("num_heads", num_heads))
        super().__init__(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            teacher_num_kv_heads=teacher_num_kv_heads,
            student_scale=student_scale,
            teacher_scale=teacher_scale,
            causal=causal,
            divergence=divergence,
            beta=beta,
            reduction=reduction,
            impl=impl,
        )

    def forward(
        self,
        student_q: Tensor,  # [B, Lq, Hs]
        student_k: Tensor,  # [B, Lk, Hs], or narrower, see num_kv_heads
        teacher_q: Tensor,  # [B, Lq, Ht]
        teacher_k: Tensor,  # [B, Lk, Ht]
        *,
        student_bias: Tensor | RelativeBias | None = None,
        teacher_bias: Tensor | RelativeBias | None = None,
        key_mask: Tensor | None = None,  # [B, Lk]
        query_mask: Tensor | None = None,  # [B, Lq]
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """The loss, as ``fastkd.attention_kl`` returns it."""
        return attention_kl(
            student_q,
            student_k,
            teacher_q,
            teacher_k,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            key_mask=key_mask,
            query_mask=query_mask,
            normalizer=normalizer,
            **self.options,
        )


class CKALoss(_Loss):
    """``fastkd.cka_loss`` as a module; keywords as there.

    Examples:
        >>> loss = CKALoss()(student_layers, teacher_layers, mask=attention_mask)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        eps: float = 1e-8,
        squared: bool = False,
        debiased: bool = False,
        reduction: str = "sum",
        group: ProcessGroup | None = None,
        impl: str = "auto",
    ) -> None:
        check_constants(eps, squared, debiased, reduction, group, impl)
        super().__init__(eps=eps, squared=squared, debiased=debiased, reduction=reduction, group=group, impl=impl)

    def forward(
        self,
        student: Tensor | Sequence[Tensor],  # [..., ds]
        teacher: Tensor | Sequence[Tensor],  # [..., dt]
        *,
        mask: Tensor | Sequence[Tensor | None] | None = None,  # [...]
    ) -> Tensor:
        """The loss, as ``fastkd.cka_loss`` returns it."""
        return cka_loss(student, teacher, mask=mask, **self.options)
