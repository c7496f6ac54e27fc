"""The autograd.Functions of linear_kl, of whole teachers and of teachers known by their top.

Both ops take as many arguments, in the same places: the student's three tensors, three of the teacher, coefficient,
labels, sizes, which gradients are wanted, what of the objective is no tensor, its numbers, those of a shard, and
whether metrics are. Both return losses [T], the three gradients, and metrics [T, 6].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..quantized import any_quantized
from .autograd import Gradient, GradientsAhead, Loss, apply, for_arguments, in_dtypes_of, save, saved

__all__ = ["BEHIND", "LinearKL", "LinearKLPerToken", "TopKLinearKL", "TopKLinearKLPerToken"]

OF_STUDENT = (0, 1, 2)  # arguments that get a gradient: hidden states, weight and bias
GRADIENTS, NUMBERS = 9, 11  # the places of which gradients are wanted, and of the objective's numbers

# What is behind an op, by its name, where it takes quantised weights, which torch's dispatcher does not know.
BEHIND: dict[str, Callable[..., tuple[Tensor, ...]]] = {}


def _linear_kl(*arguments: Any) -> tuple[Tensor, ...]:
    return (BEHIND["linear_kl"] if any_quantized(arguments) else torch.ops.fastkd.linear_kl)(*arguments)


def _summed(outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    loss, *others = outputs
    return loss.sum(), *others


def _without_gradients(arguments: Sequence[Any]) -> tuple[Any, ...]:
    return *arguments[:GRADIENTS], [False] * 3, *arguments[GRADIENTS + 1 :]


class LinearKL(GradientsAhead):
    """The summed loss, a 0-d float64 tensor, the gradients, which the forward pass computes, and the rows' metrics.

    Arguments are those of ``torch.ops.fastkd.linear_kl``.
    """

    op = "linear_kl"

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _summed(_linear_kl(*arguments))

    @staticmethod
    def of_student(arguments: Sequence[Any]) -> Sequence[int]:
        return OF_STUDENT


class TopKLinearKL(LinearKL):
    """The same with a ``TopK``. Arguments are those of ``torch.ops.fastkd.topk_linear_kl``."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _summed(torch.ops.fastkd.topk_linear_kl(*arguments))


class _LinearKLGradient(Gradient):
    @staticmethod
    def forward(op: str, *arguments: Any) -> tuple[Tensor, ...]:
        _, *gradients, _ = _linear_kl(*arguments)
        return in_dtypes_of(OF_STUDENT, arguments, gradients)


class _TopKLinearKLGradient(Gradient):
    @staticmethod
    def forward(op: str, *arguments: Any) -> tuple[Tensor, ...]:
        _, *gradients, _ = torch.ops.fastkd.topk_linear_kl(*arguments)
        return in_dtypes_of(OF_STUDENT, arguments, gradients)


class LinearKLPerToken(Loss):
    """Losses per token, [T] float64, and their metrics; the backward pass computes logits and gradients anew.

    Arguments are those of ``torch.ops.fastkd.linear_kl``.
    """

    gradient: type[Gradient] = _LinearKLGradient

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        loss, *_, metrics = _linear_kl(*_without_gradients(arguments))
        return loss, metrics

    @classmethod
    def keep(cls, ctx: Any, inputs: Sequence[Any], output: Sequence[Any]) -> None:
        save(ctx, (*inputs[:GRADIENTS], inputs[NUMBERS]))
        ctx.objective, ctx.shard = inputs[NUMBERS - 1], inputs[NUMBERS + 1 : NUMBERS + 3]

    @classmethod
    def gradients(cls, ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, coefficient, labels, sizes, numbers = saved(ctx)
        inputs = (*tensors, coefficient * grad_loss, labels, sizes)
        constants = (ctx.needs_input_grad[:3], ctx.objective, numbers, *ctx.shard)
        return for_arguments(ctx, OF_STUDENT, apply(cls.gradient, "linear_kl", *inputs, *constants))


class TopKLinearKLPerToken(LinearKLPerToken):
    """The same with a ``TopK``. Arguments are those of ``torch.ops.fastkd.topk_linear_kl``."""

    gradient = _TopKLinearKLGradient

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        loss, *_, metrics = torch.ops.fastkd.topk_linear_kl(*_without_gradients(arguments))
        return loss, metrics
