"""Argument checks of the public functions: one place, one wording, before any work and for every backend.

Every message names the argument, what was expected and what was given. Checks that look at values (label range, NaN
weights) run on CPU tensors only: on a GPU they would wait for the device, and the kernels answer such rows with NaN
instead. Nothing here runs on values while torch.compile traces.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .divergence import DIVERGENCES, divergence_code

__all__ = [
    "Objective",
    "TokenArguments",
    "as_divergence",
    "as_int",
    "as_normalizer",
    "as_number",
    "average",
    "check_choice",
    "check_constant",
    "check_flag",
    "check_mask",
    "check_same_device",
    "check_tensor",
    "is_finite",
    "is_not_negative",
    "is_positive",
    "numbers",
    "values_are_at_hand",
]

REDUCTIONS = ("mean", "sum", "none")
FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
MASKS = (torch.bool, *INTEGERS)
# What the divergences that have a beta are where it ends.
LIMITS: dict[tuple[str, float], str] = {
    ("jsd", 0): 'jsd is 0, and jsd / beta tends to divergence="forward_kl"',
    ("jsd", 1): 'jsd is 0, and jsd / (1 - beta) tends to divergence="reverse_kl"',
    ("skew_kl", 0): 'skew_kl is divergence="forward_kl"',
    ("skew_kl", 1): "skew_kl is 0",
    ("skew_reverse_kl", 0): 'skew_reverse_kl is divergence="reverse_kl"',
    ("skew_reverse_kl", 1): "skew_reverse_kl is 0",
}


def numbers(*values: float) -> Tensor:
    """Numbers [n] float64 as ops take them, on the CPU.

    As floats they would be constants to torch.compile, which would make a graph for every value of a schedule.
    """
    if not torch.compiler.is_compiling():
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * value for value in values])


@dataclass(frozen=True)
class Objective:
    """What is computed on a pair of score rows: kd_weight * temperature^2 * divergence + ce_weight * cross-entropy."""

    divergence: str | Mapping[Any, float]  # a mix: in the order of DIVERGENCES, of weights > 0
    beta: float
    temperature: float
    kd_weight: float
    ce_weight: float

    def __post_init__(self) -> None:
        self._set("divergence", as_divergence(self.divergence))
        self._set("beta", as_number("beta", self.beta, self._expected_beta(), lambda x: 0 < x < 1))
        self._set("temperature", as_number("temperature", self.temperature, "> 0", is_positive))
        self._set("kd_weight", as_number("kd_weight", self.kd_weight, "that is finite", is_finite))
        self._set("ce_weight", as_number("ce_weight", self.ce_weight, "that is finite", is_finite))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _expected_beta(self) -> str:
        if not isinstance(self.beta, (int, float)) or 0 < self.beta < 1:
            return "in (0, 1)"
        limits = [LIMITS[name, self.beta] for name in self.members if (name, self.beta) in LIMITS]
        return "in (0, 1)" + "".join(f", as at {self.beta} {limit}" for limit in limits)

    @property
    def code(self) -> int:
        """The number that kernels know the divergence by."""
        return divergence_code(self.divergence)

    @property
    def members(self) -> Mapping[Any, float]:
        """The divergences that count, and their weights, in the order of DIVERGENCES."""
        return {self.divergence: 1.0} if isinstance(self.divergence, str) else self.divergence

    @property
    def all_weights(self) -> list[float]:
        """Every divergence's weight, in the order of DIVERGENCES."""
        return [self.members.get(name, 0.0) for name in DIVERGENCES]

    @property
    def weights(self) -> list[float]:
        """The same of a mix; of a single divergence none."""
        return [] if isinstance(self.divergence, str) else self.all_weights

    def check_teacher(self, name: str, teacher: object) -> None:
        """Raises where there is none, but needs to be."""
        if teacher is None and self.kd_weight != 0:
            raise ValueError(f"{name}: expected a tensor because kd_weight is {self.kd_weight}, got None")

    def for_op(self) -> tuple[int, Tensor]:
        """The trailing arguments of an op: the code, and in one tensor these four numbers and a mix's weights."""
        return self.code, numbers(self.beta, self.temperature, self.kd_weight, self.ce_weight, *self.weights)


@dataclass(frozen=True)
class TokenArguments:
    """The per-token keywords that every vocabulary loss shares, and how they are averaged."""

    weight: Tensor | None
    labels: Tensor | None
    ignore_index: int
    reduction: str
    normalizer: float | Tensor | None

    def __post_init__(self) -> None:
        check_choice("reduction", self.reduction, REDUCTIONS)
        object.__setattr__(self, "ignore_index", as_int("ignore_index", self.ignore_index))
        object.__setattr__(self, "normalizer", as_normalizer(self.normalizer, self.reduction))

    def check(self, objective: Objective, leading: torch.Size, vocabulary: int | None, device: torch.device) -> None:
        """Raises unless the keywords fit scores of shape [*leading, vocabulary], or [*leading, any] for None."""
        if self.weight is not None:
            check_tensor("weight", self.weight, shape=leading)
            if self.weight.dtype not in (*FLOATING, *MASKS):
                raise TypeError(
                    "weight: expected dtype float32, float64, float16, bfloat16, bool or an integer one, "
                    f"got {self.weight.dtype}"
                )
            check_same_device("weight", self.weight, device)
            check_constant("weight", self.weight)
            if values_are_at_hand(self.weight) and not self.weight.isfinite().all():
                raise ValueError(f"weight: expected finite numbers, got {_first(self.weight, ~self.weight.isfinite())}")
        if self.labels is None and objective.ce_weight != 0:
            raise ValueError(f"labels: expected a tensor because ce_weight is {objective.ce_weight}, got None")
        if self.labels is not None:
            self._check_labels(self.labels, leading, device)
            if vocabulary is not None:
                self.check_label_range(vocabulary)

    def _check_labels(self, labels: Tensor, leading: torch.Size, device: torch.device) -> None:
        check_tensor("labels", labels, shape=leading)
        if labels.dtype not in INTEGERS:
            raise TypeError(f"labels: expected an integer dtype, got {labels.dtype}")
        check_same_device("labels", labels, device)

    def check_label_range(self, vocabulary: int) -> None:
        if self.labels is not None and values_are_at_hand(self.labels):
            labels = self.labels.long()  # small dtypes would wrap around in comparisons
            bad = ((labels < 0) | (labels >= vocabulary)) & (labels != self.ignore_index)
            if bad.any():
                raise ValueError(
                    f"labels: expected values in [0, {vocabulary}) or ignore_index={self.ignore_index}, "
                    f"got {_first(labels, bad)}"
                )

    def weights(self, leading: torch.Size, device: torch.device) -> Tensor:
        """Each token's weight, [tokens] fp64, 0 if dropped."""
        if self.weight is None:
            weight = torch.ones(leading, dtype=torch.float64, device=device)
        else:
            weight = self.weight.detach().to(torch.float64)
        if self.labels is not None:
            weight = weight.masked_fill(self.labels.long() == self.ignore_index, 0)
        return weight.reshape(-1).contiguous()

    def coefficients(self, leading: torch.Size, device: torch.device) -> Tensor:
        """What each token's loss is multiplied with, [tokens] fp64: its weight over the denominator, 0 if dropped."""
        return average(self.weights(leading, device), self.reduction, self.normalizer)

    def flat_labels(self) -> Tensor | None:
        """Labels as the kernels take them: [tokens] int64."""
        return None if self.labels is None else self.labels.reshape(-1).long().contiguous()


def average(weight: Tensor, reduction: str, normalizer: float | Tensor | None) -> Tensor:
    """Weights [...] as they enter a sum that is the reduction: for "mean", over their sum or the normalizer.

    With a normalizer of 0 they are all 0: nothing is left to average. Of weights that cancel there is no mean.
    """
    if reduction != "mean":
        return weight
    if normalizer is None:
        return torch.where(weight == 0, 0, weight / weight.sum())
    if isinstance(normalizer, Tensor):
        total = normalizer.detach().to(device=weight.device, dtype=weight.dtype)
    else:
        total = weight.new_ones(()) * normalizer  # of a number itself torch.compile would make a constant
    return torch.where(total == 0, 0, weight / torch.where(total == 0, 1, total))


def as_normalizer(value: Any, reduction: str) -> float | Tensor | None:
    """A normalizer as `average` takes it. A tensor may be on a GPU: nobody asks for its value."""
    if value is None:
        return None
    if reduction != "mean":
        raise ValueError(f'normalizer: only used with reduction="mean", got reduction={reduction!r}')
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"normalizer: expected a number or 0-d tensor, got shape {_list(value)}")
        check_constant("normalizer", value)
        if values_are_at_hand(value):
            as_number("normalizer", value, ">= 0", is_not_negative)
        return value
    return as_number("normalizer", value, ">= 0", is_not_negative)


def as_divergence(value: Any) -> str | dict[str, float]:
    """A name of DIVERGENCES; or of a mapping of names to weights those that count, in the order of DIVERGENCES."""
    if not isinstance(value, Mapping):
        check_choice("divergence", value, DIVERGENCES)
        return value
    weights = {}
    for name, weight in value.items():
        check_choice("divergence", name, DIVERGENCES)
        weights[name] = as_number(f"divergence[{name!r}]", weight, ">= 0", is_not_negative)
    mix = {name: weights[name] for name in DIVERGENCES if name in weights and weights[name] != 0}
    if not mix:
        raise ValueError(f"divergence: expected at least one name with a weight > 0, got {dict(value)}")
    (first, weight), *others = mix.items()
    return mix if others or weight != 1 else first


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    names = list(choices)
    if isinstance(value, str) and value in names:
        return
    close = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{name}: expected one of {', '.join(names)}, got {value!r}{hint}")


def as_number(name: str, value: Any, expected: str, holds: Callable[[float], bool]) -> float:
    """The number that a Python number, a NumPy scalar or a 0-d tensor on the CPU is.

    Raises where it is none of them, or does not hold.
    """
    number = _as_python(name, value, f"a number {expected}")
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name}: expected a number {expected}, got {type(number).__name__}")
    if not holds(number):
        raise ValueError(f"{name}: expected a number {expected}, got {number}")
    return number


def as_int(name: str, value: Any, expected: str = "an int") -> int:
    """The int that a Python int, a NumPy integer or a 0-d tensor of integers on the CPU is."""
    number = _as_python(name, value, expected)
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name}: expected {expected}, got {type(number).__name__}")
    return number


def _as_python(name: str, value: Any, expected: str) -> Any:
    """What a NumPy scalar or 0-d tensor holds; anything else as it is."""
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name}: expected {expected}, got a tensor of shape {_list(value)}")
        check_constant(name, value)
        if not _has_values(value):
            raise ValueError(
                f"{name}: expected {expected}, or a 0-d tensor of it on the CPU, got one whose value is not at hand, "
                f"on {value.device}; a number of its item() is, for which you wait"
            )
        return value.item()
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def is_finite(x: float) -> bool:
    """math.isfinite, in a form that torch.compile traces."""
    return -math.inf < x < math.inf


def is_positive(x: float) -> bool:
    """And finite."""
    return 0 < x < math.inf


def is_not_negative(x: float) -> bool:
    """And finite."""
    return 0 <= x < math.inf


def check_tensor(
    name: str, value: object, *, shape: Iterable[int | None] | None = None, floating: bool = False
) -> None:
    """`shape` may hold None where any size will do."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        given = "a nested one" if value.is_nested else f"one of layout {value.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {given}")
    if floating and value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected dtype float32, float64, float16 or bfloat16, got {value.dtype}")
    if shape is not None:
        wanted = list(shape)
        fits = len(wanted) == value.dim() and all(w is None or w == g for w, g in zip(wanted, value.shape, strict=True))
        if not fits:
            sizes = ", ".join("any" if size is None else str(size) for size in wanted)
            raise ValueError(f"{name}: expected shape [{sizes}], got {_list(value)}")


def check_mask(name: str, value: object, shape: Iterable[int], device: torch.device) -> None:
    """A mask is True, or not 0, where something takes part."""
    check_tensor(name, value, shape=shape)
    assert isinstance(value, Tensor)
    if value.dtype not in MASKS:
        raise TypeError(f"{name}: expected a bool or integer dtype (True or 1 takes part), got {value.dtype}")
    check_same_device(name, value, device)


def check_constant(name: str, value: Tensor) -> None:
    """Raises where somebody waits for a gradient that the losses have none of."""
    if torch.is_grad_enabled() and value.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor that requires no gradient, as the loss has none in it, got one that does; "
            'detach() it, or apply it to the losses of reduction="none" yourself'
        )


def check_same_device(name: str, value: Any, device: torch.device, of: str = "the student") -> None:
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, that of {of}, got {value.device}")


def values_are_at_hand(x: Tensor) -> bool:
    """Whether checks may look at values: they would wait for a GPU, and while a graph is traced there are none."""
    return not torch.compiler.is_compiling() and _has_values(x)


def _has_values(x: Tensor) -> bool:
    """Whether x's values are on the CPU; torch.compile, to read them, ends its graph."""
    known = x.device.type == "cpu" and not isinstance(x, FakeTensor)
    return known and (torch.compiler.is_compiling() or not _is_batched(x))


def _is_batched(x: Tensor) -> bool:
    """Whether torch.func.vmap stands between x and its values."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def _first(x: Tensor, bad: Tensor) -> object:
    return x[bad][0].item()


def _list(x: Tensor) -> list[int]:
    return list(x.shape)
