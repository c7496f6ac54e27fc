"""What the autograd.Functions of all ops have in common: constants, torch.func, and that they have one derivative.

They are written as torch.func wants them: `forward` without a context, and whatever `backward` needs is an input or an
output. Under `torch.func.vmap` an op is called once for each example. What a backward pass computes is a function of
its own, a ``Gradient``, so that differentiating it is an error and not silently nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Function",
    "Gradient",
    "GradientsAhead",
    "Loss",
    "apply",
    "constant",
    "differentiable",
    "for_arguments",
    "in_dtypes_of",
    "save",
    "saved",
    "wants_gradient",
]


def differentiable(x: Any) -> Any:
    """x as autograd can save it: of a tensor from torch.inference_mode() another one of the same memory.

    Not under torch.compile, which cannot tell.
    """
    if torch.compiler.is_compiling() or not isinstance(x, Tensor):
        return x
    if not x.is_inference() or torch.is_inference_mode_enabled():
        return x
    plain = torch.empty(0, dtype=x.dtype, device=x.device)
    return plain.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def constant(x: Any) -> Any:
    """x as something that gets no gradient, whatever its requires_grad says; what is no tensor passes."""
    return differentiable(x).detach() if isinstance(x, Tensor) else x


def wants_gradient(x: Any) -> bool:
    """Whether autograd records what becomes of x, at any level of torch.func's transforms."""
    if not isinstance(x, Tensor) or not torch.is_grad_enabled():
        return False
    if x.requires_grad or torch.compiler.is_compiling():
        return x.requires_grad
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(x) and wants_gradient(functorch.get_unwrapped(x))


def _example(x: Any, dim: Any, i: int) -> Any:
    return x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x


def _told_apart(arguments: Sequence[Any]) -> list[Any]:
    """Arguments with a view for a tensor that was there before: torch.compile takes each only once."""
    found: list[Any] = []
    for x in arguments:
        found.append(x.view_as(x) if isinstance(x, Tensor) and any(x is other for other in found) else x)
    return found


def apply(function: type[Function], *arguments: Any) -> Any:
    """What ``function.apply`` returns; torch.compile, where nothing is differentiated, gets to see `forward` alone.

    It would take the first of its arguments for a context, as it cannot count those of a variable number. Nor does a
    backward pass go the longer way, unless it is to be differentiated, or torch.func is about.
    """
    if torch.compiler.is_compiling():
        direct = not any(isinstance(x, Tensor) and wants_gradient(x) for x in arguments)
        arguments = tuple(_told_apart(arguments))
    else:
        direct = not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
    if direct or torch.compiler.is_compiling():
        return function.forward(*arguments) if direct else function.apply(*arguments)
    try:
        return function.apply(*arguments)
    except NotImplementedError as error:
        if "jvp" not in str(error):
            raise
        # torch.compile takes no Function that has a jvp of its own, which could say this
        raise NotImplementedError(
            "fastkd: kernels have no forward-mode derivative, which torch.func.jvp, jacfwd and hessian ask for; "
            'impl="reference" has one, and torch.func.jacrev asks for none'
        ) from error


# What torch binds arguments to, at every call: of a signature with names that takes longer than a small loss.
_ANY_ARGUMENTS = inspect.Signature([inspect.Parameter("arguments", inspect.Parameter.VAR_POSITIONAL)])


class Function(torch.autograd.Function):
    """One that torch.func.vmap calls once for each example."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "forward" in vars(cls):
            cls.forward.__signature__ = _ANY_ARGUMENTS  # type: ignore[attr-defined]

        def vmap(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
            results = [
                cls.apply(*(_example(x, dim, i) for x, dim in zip(arguments, in_dims, strict=True)))
                for i in range(info.batch_size)
            ]
            if isinstance(results[0], Tensor):
                return torch.stack(results), 0
            return tuple(torch.stack(outputs) for outputs in zip(*results, strict=True)), (0,) * len(results[0])

        cls.vmap = staticmethod(vmap)  # type: ignore[method-assign]


def for_arguments(ctx: Any, places: Sequence[int], gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """What `backward` returns: each gradient at the place of its argument, where one is needed, and None elsewhere."""
    results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    for place, gradient in zip(places, gradients, strict=True):
        if ctx.needs_input_grad[place]:
            results[place] = gradient
    return tuple(results)


def save(ctx: Any, arguments: Sequence[Any]) -> None:
    """Saves tensors, and beside them what is none, for `saved`."""
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in arguments))
    ctx.no_tensors = tuple(None if isinstance(x, Tensor) else x for x in arguments)


def saved(ctx: Any) -> list[Any]:
    return [x if other is None else other for x, other in zip(ctx.saved_tensors, ctx.no_tensors, strict=True)]


class Gradient(Function):
    """What a backward pass computes. The first argument is the op's name, for whoever wants its derivative."""

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx, *_: Tensor):
        raise RuntimeError(
            f"fastkd.{ctx.op}: the gradient that its kernels compute cannot be differentiated again, as Hessians and "
            'gradient penalties would; impl="reference" can'
        )


def _dtypes_at(places: Sequence[int], arguments: Sequence[Any]) -> list[torch.dtype]:
    """Those of the student's tensors, of which the first is always given."""
    return [arguments[places[0] if arguments[place] is None else place].dtype for place in places]


def in_dtypes_of(places: Sequence[int], arguments: Sequence[Any], gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients as an op returns them, in the dtypes of their arguments."""
    return tuple(grad.to(dtype) for grad, dtype in zip(gradients, _dtypes_at(places, arguments), strict=True))


class Loss(Function):
    """One whose first output is a loss, and the others what the backward pass starts from.

    A subclass has the class methods `keep` and `gradients` for `setup_context` and `backward`. The second is not called
    where nothing depends on the loss.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)

        def setup_context(ctx, inputs, output) -> None:
            _, *others = output
            ctx.mark_non_differentiable(*others)
            ctx.set_materialize_grads(False)  # no zeros for what has none
            cls.keep(ctx, inputs, output)

        def backward(ctx, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
            return (None,) * len(ctx.needs_input_grad) if grad_loss is None else cls.gradients(ctx, grad_loss)

        cls.setup_context = staticmethod(setup_context)  # type: ignore[method-assign]
        cls.backward = staticmethod(backward)  # type: ignore[method-assign]

    @classmethod
    def keep(cls, ctx: Any, inputs: Sequence[Any], output: Sequence[Any]) -> None:
        """Saves what `gradients` needs."""
        raise NotImplementedError

    @classmethod
    def gradients(cls, ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """A gradient, or None, for each argument."""
        raise NotImplementedError


class GradientsAhead(Loss):
    """A summed loss, 0-d float64, and the gradients of the student's tensors, which the forward pass computes.

    What else there may be of outputs has no gradient, and the backward pass no use of it.

    A subclass has `forward`, the op's name, and the places of the student's tensors among the arguments.
    """

    op: str

    @staticmethod
    def of_student(arguments: Sequence[Any]) -> Sequence[int]:
        raise NotImplementedError

    @classmethod
    def keep(cls, ctx: Any, inputs: Sequence[Any], output: Sequence[Any]) -> None:
        ctx.places = cls.of_student(inputs)
        ctx.save_for_backward(*output[: 1 + len(ctx.places)])
        ctx.dtypes = _dtypes_at(ctx.places, inputs)

    @classmethod
    def gradients(cls, ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        loss, *saved = ctx.saved_tensors
        return for_arguments(ctx, ctx.places, apply(_Scaled, cls.op, loss, grad_loss, ctx.dtypes, *saved))


class _Scaled(Gradient):
    """Gradients that exist already times that of the loss, in their inputs' dtypes; of those not wanted an empty one.

    The loss is an argument because autograd asks it whether the results depend on anything.
    """

    @staticmethod
    def forward(op: str, loss: Tensor, grad_loss: Tensor, dtypes: Sequence[torch.dtype], *gradients: Tensor):
        return tuple((grad * grad_loss).to(dtype) for grad, dtype in zip(gradients, dtypes, strict=True))
