"""The arguments of linear_kl: their checks, and what ranks with shards of a vocabulary tell each other of them.

T tokens, V vocabulary, Hs and Ht hidden widths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..backend import use_fused
from ..checks import (
    Objective,
    TokenArguments,
    as_number,
    check_flag,
    check_same_device,
    check_tensor,
    is_finite,
    is_positive,
)
from ..heads import Head
from ..quantized import QuantizedWeight
from .autograd import constant, differentiable, wants_gradient
from .dtypes import autocast_like_linear
from .vocabulary_shards import Facts, local_tensor, shard_on

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Checked",
    "Inputs",
    "as_head",
    "as_softcap",
    "as_workspace",
    "check_alone",
    "check_inputs",
    "checked",
    "flat",
    "tensors_of",
]


def _is_given(value: Any, default: Any) -> bool:
    return value is not default and (isinstance(value, Tensor) or value != default)


def _shown(value: Any) -> Any:
    """A number as it is; of a tensor, whose numbers may be thousands, what it is."""
    return value if isinstance(value, int | float) else type(value).__name__


def as_head(model: str, weight: Any, bias: Any, scale: Any, softcap: Any) -> Head:
    """One model's head: what is given as its weight, where that is one already, and nothing beside it then."""
    if not isinstance(weight, Head):
        return Head(weight, bias, scale, softcap)
    beside = {"bias": (bias, None), "scale": (scale, 1.0), "softcap": (softcap, None)}
    for name, (value, default) in beside.items():
        if _is_given(value, default):
            raise ValueError(
                f"{model}_{name}: expected nothing, as {model}_weight is a Head with a {name} of its own, got "
                f"{_shown(value)}; head._replace({name}=...) makes another Head"
            )
    return weight


def check_alone(weight: Any, bias: Any, scale: Any, softcap: Any) -> None:
    """Raises where a teacher's head, or part of one, is given beside a TopK, which would be left out."""
    beside = {"weight": (weight, None), "bias": (bias, None), "scale": (scale, 1.0), "softcap": (softcap, None)}
    for name, (value, default) in beside.items():
        if _is_given(value, default):
            raise ValueError(
                f"teacher_{name}: expected {default}, as the teacher is a TopK, whose log-probabilities are what its "
                f"head has made of hidden states already, got {_shown(value)}; "
                f"leave it out: where TopK.from_hidden makes the TopK, it is part of the fastkd.Head given there"
            )


def as_workspace(megabytes: Any) -> float | None:
    """The argument workspace_mb as a float, or None for the default."""
    return None if megabytes is None else as_number("workspace_mb", megabytes, "> 0", is_positive)


def as_softcap(name: str, cap: Any) -> float | None:
    """A softcap as a float, or None for none."""
    return None if cap is None else as_number(name, cap, "> 0", is_positive)


class Inputs(NamedTuple):
    """The public function's tensors, checked, in the dtypes that autocast gives them, and of this rank alone."""

    student_hidden: Tensor  # [..., Hs]
    student_weight: Any  # [Vs, Hs], a tensor or a QuantizedWeight
    student_bias: Tensor | None  # [Vs]
    teacher_hidden: Tensor | None  # [..., Ht]
    teacher_weight: Any  # [Vt, Ht], likewise, or None
    teacher_bias: Tensor | None  # [Vt]


def _check_head(
    model: str, hidden: Any, weight: Any, bias: Any, leading: Any, device: torch.device, sharded: bool
) -> None:
    """Checks one model's hidden [..., H], weight [V, H] and bias [V]; a shard may be of no columns."""
    check_tensor(f"{model}_hidden", hidden, shape=None if leading is None else [*leading, None], floating=True)
    width = hidden.shape[-1] if hidden.dim() else 0
    if width == 0:
        raise ValueError(f"{model}_hidden: expected shape [..., H] with H > 0, got {list(hidden.shape)}")
    if isinstance(weight, QuantizedWeight):
        weight.check(f"{model}_weight", width)
    else:
        check_tensor(f"{model}_weight", weight, shape=[None, width], floating=True)
    if weight.shape[0] == 0 and not sharded:
        raise ValueError(f"{model}_weight: expected shape [V, {width}] with V > 0, got {list(weight.shape)}")
    named = [(f"{model}_hidden", hidden), (f"{model}_weight", weight)]
    if bias is not None:
        check_tensor(f"{model}_bias", bias, shape=[weight.shape[0]], floating=True)
        named.append((f"{model}_bias", bias))
    for name, tensor in named:
        check_same_device(name, tensor, device)
        if tensor.dtype != hidden.dtype:
            raise TypeError(f"{name}: expected dtype {hidden.dtype}, that of {model}_hidden, got {tensor.dtype}")


def _in_dtype_of(hidden: Any, weight: Any) -> Any:
    """A quantised weight as one whose rows are multiplied with these hidden states; another as it is."""
    return weight.to(hidden.dtype) if isinstance(weight, QuantizedWeight) and isinstance(hidden, Tensor) else weight


def check_inputs(inputs: Inputs, objective: Objective, tokens: TokenArguments, sharded: bool) -> Inputs:
    """Checks the tensors and the keywords that go with them, and applies autocast."""
    check_tensor("student_hidden", inputs.student_hidden, floating=True)
    inputs = Inputs(*autocast_like_linear(*inputs))
    inputs = Inputs(*map(differentiable, inputs[:3]), *map(constant, inputs[3:]))
    inputs = inputs._replace(
        student_weight=_in_dtype_of(inputs.student_hidden, inputs.student_weight),
        teacher_weight=_in_dtype_of(inputs.teacher_hidden, inputs.teacher_weight),
    )
    leading, device = inputs.student_hidden.shape[:-1], inputs.student_hidden.device
    _check_head("student", *inputs[:3], None, device, sharded)
    vocabulary = inputs.student_weight.shape[0]
    if inputs.teacher_hidden is not None or inputs.teacher_weight is not None:
        _check_head("teacher", *inputs[3:], leading, device, sharded)
        assert inputs.teacher_weight is not None
    tokens.check(objective, leading, None if sharded else vocabulary, device)
    return inputs


def flat(hidden: Any) -> Any:
    """Hidden states [T, H]"""
    return None if hidden is None else hidden.reshape(-1, hidden.shape[-1])


class Checked(NamedTuple):
    """The arguments of the public function, checked, and of this rank alone."""

    inputs: Inputs
    objective: Objective
    tokens: TokenArguments
    fused: bool
    keywords: dict[str, Any]

    def facts(self) -> Facts:
        """What this rank tells the others that hold a shard of the vocabulary."""
        inputs, objective, tokens, fused, keywords = self
        hidden, teacher = inputs.student_hidden, inputs.teacher_hidden
        others = {
            **keywords,
            "reduction": tokens.reduction,
            "fused": fused,
            "dtype": hidden.dtype,
            "width": hidden.shape[-1],
            "device": hidden.device.type,
            "gradients": [wants_gradient(x) for x in inputs[:3]],
            "teacher": teacher is not None,
        }
        return Facts(
            objective,
            others,
            inputs.student_weight.shape[0],
            None if inputs.teacher_weight is None else inputs.teacher_weight.shape[0],
            tokens,
            flat(hidden),
            flat(teacher),
            tokens.coefficients(hidden.shape[:-1], hidden.device) != 0,
        )


def tensors_of(student: Head, teacher: Head) -> dict[str, Any]:
    """The tensors of both heads by their names as arguments."""
    return {
        "student_weight": student.weight,
        "student_bias": student.bias,
        "teacher_weight": teacher.weight,
        "teacher_bias": teacher.bias,
    }


def checked(
    hidden: dict[str, Any],  # by their names
    student: Head,
    teacher: Head,
    group: ProcessGroup | None,
    objective: Objective,
    tokens: TokenArguments,
    workspace_mb: Any,
    return_metrics: Any,
    impl: str,
) -> Checked:
    """Checks all arguments, and takes this rank's part of those that are DTensors."""
    check_flag("return_metrics", return_metrics)
    keywords: dict[str, Any] = {
        "student_scale": as_number("student_scale", student.scale, "that is finite", is_finite),
        "teacher_scale": as_number("teacher_scale", teacher.scale, "that is finite", is_finite),
        "student_softcap": as_softcap("student_softcap", student.softcap),
        "teacher_softcap": as_softcap("teacher_softcap", teacher.softcap),
        "workspace_mb": as_workspace(workspace_mb),
        "return_metrics": return_metrics,
    }
    shards = tensors_of(student, teacher)
    if group is not None:
        shards = {name: shard_on(group, name, x, 0) for name, x in shards.items()}
    whole = {name: local_tensor(name, x) for name, x in hidden.items()}
    inputs = check_inputs(Inputs(**whole, **shards), objective, tokens, group is not None)
    return Checked(inputs, objective, tokens, use_fused(impl, inputs.student_hidden.device), keywords)
