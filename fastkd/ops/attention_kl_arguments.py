"""The arguments of attention_kl, checked and completed; relation_kl's heads and rows, too.

B batch, Lq queries, Lk keys, A heads, Hs and Ht widths.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import (
    as_int,
    as_number,
    average,
    check_flag,
    check_mask,
    check_same_device,
    check_tensor,
    is_finite,
)
from ..relative_bias import RelativeBias
from .autograd import constant, differentiable
from .dtypes import autocast_like_linear

__all__ = ["Inputs", "as_scale", "check_heads", "check_kv_heads", "row_coefficients"]


def check_heads(num_heads: int, widths: dict[str, int]) -> None:
    """Raises unless heads of equal width fit every named width."""
    if num_heads < 1 and not widths:
        raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
    if num_heads < 1 or any(width % num_heads for width in widths.values()):
        common = math.gcd(*widths.values())
        valid = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        named = " and ".join(f"{width} ({name})" for name, width in widths.items())
        raise ValueError(f"num_heads: expected a divisor of {named}: {valid}; got {num_heads}")


def check_kv_heads(name: str, value: Any, num_heads: int) -> int:
    """The number of keys' heads: num_heads if it is None; raises unless each is for as many heads of queries."""
    count = num_heads if value is None else as_int(name, value)
    if count < 1 or num_heads % count:
        valid = ", ".join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)
        raise ValueError(f"{name}: expected a divisor of num_heads = {num_heads}: {valid}; got {count}")
    return count


def row_coefficients(
    shape: tuple[int, int, int],  # B, Lq, Lk
    num_heads: int,
    key_mask: Tensor | None,  # [B, Lk] bool
    query_mask: Tensor | None,  # [B, Lq] bool
    causal: bool,
    reduction: str,
    normalizer: float | Tensor | None,
    device: torch.device,
) -> Tensor:
    """What each row's loss is multiplied with, [B, A, Lq] fp64: 0 where it is masked or has no key to attend to."""
    batch, queries, keys = shape
    valid = torch.full((batch, queries), keys > 0, device=device)
    if key_mask is not None:
        valid = valid & ((key_mask.cumsum(1) > 0) if causal else key_mask.any(1, keepdim=True))
    if query_mask is not None:
        valid = valid & query_mask
    weight = average(valid.double(), reduction, normalizer)
    if reduction == "mean":
        weight = weight / num_heads
    return weight.unsqueeze(1).expand(batch, num_heads, queries).contiguous()


def as_scale(name: str, value: Any) -> float | None:
    """A scale of scores as a float, or None for the default."""
    return None if value is None else as_number(name, value, "that is finite", is_finite)


def _check_bias(name: str, bias: object, shape: tuple[int, ...], device: torch.device) -> None:
    if isinstance(bias, RelativeBias):
        check_tensor(f"{name}.table", bias.table, shape=[None, shape[1]])
        bias, name = bias.table, f"{name}.table"
    else:
        if not isinstance(bias, Tensor):
            raise TypeError(f"{name}: expected a tensor or fastkd.RelativeBias, got {type(bias).__name__}")
        check_tensor(name, bias, floating=True)
        sizes = (1,) * (4 - bias.dim()) + tuple(bias.shape)
        if len(sizes) != 4 or any(size not in (1, full) for size, full in zip(sizes, shape, strict=True)):
            raise ValueError(
                f"{name}: expected a shape that broadcasts to [B, A, Lq, Lk] = {list(shape)}, got {list(bias.shape)}"
            )
    assert isinstance(bias, Tensor)
    check_same_device(name, bias, device)


class Inputs(NamedTuple):
    """The public function's arguments that make scores and say which count."""

    student_q: Tensor  # [B, Lq, Hs]
    student_k: Tensor  # [B, Lk, Hs], or narrower where there are fewer heads of keys
    teacher_q: Tensor  # [B, Lq, Ht]
    teacher_k: Tensor  # [B, Lk, Ht]
    num_heads: int
    student_scale: Any  # a float; None before `completed`
    teacher_scale: Any
    student_bias: Any  # [B, A, Lq, Lk] or what broadcasts to it, or a RelativeBias
    teacher_bias: Any
    key_mask: Tensor | None  # [B, Lk]
    query_mask: Tensor | None  # [B, Lq]
    causal: bool

    def check(self, num_kv_heads: int | None, teacher_num_kv_heads: int | None) -> None:
        """Raises unless they fit each other."""
        check_tensor("student_q", self.student_q, shape=[None] * 3, floating=True)
        batch, queries, width = self.student_q.shape
        check_tensor("teacher_q", self.teacher_q, shape=[batch, queries, None], floating=True)
        teacher_width = self.teacher_q.shape[2]
        check_heads(self.num_heads, {"student_q": width, "teacher_q": teacher_width})
        count = check_kv_heads("num_kv_heads", num_kv_heads, self.num_heads)
        narrow = width // self.num_heads * count
        check_tensor("student_k", self.student_k, shape=[batch, None, narrow], floating=True)
        keys, device = self.student_k.shape[1], self.student_q.device
        given = num_kv_heads if teacher_num_kv_heads is None else teacher_num_kv_heads
        narrow = teacher_width // self.num_heads * check_kv_heads("teacher_num_kv_heads", given, self.num_heads)
        check_tensor("teacher_k", self.teacher_k, shape=[batch, keys, narrow], floating=True)
        for model in ("student", "teacher"):
            q, k = getattr(self, f"{model}_q"), getattr(self, f"{model}_k")
            if k.dtype != q.dtype:
                raise TypeError(f"{model}_k: expected dtype {q.dtype}, that of {model}_q, got {k.dtype}")
            for name, x in ((f"{model}_q", q), (f"{model}_k", k)):
                check_same_device(name, x, device)
            bias = getattr(self, f"{model}_bias")
            if bias is not None:
                _check_bias(f"{model}_bias", bias, (batch, self.num_heads, queries, keys), device)
        check_flag("causal", self.causal)
        if self.causal and queries != keys:
            raise ValueError(f"causal: expected as many queries as keys, got {queries} and {keys}")
        for name, mask, length in (("key_mask", self.key_mask, keys), ("query_mask", self.query_mask, queries)):
            if mask is not None:
                check_mask(name, mask, [batch, length], device)

    def completed(self) -> Inputs:
        """With default scales, masks of bool, in the dtypes that autocast gives them; the teacher's are constants."""
        scales = {}
        for model, q in (("student", self.student_q), ("teacher", self.teacher_q)):
            scale = getattr(self, f"{model}_scale")
            scales[f"{model}_scale"] = (q.shape[2] // self.num_heads) ** -0.5 if scale is None else scale
        cast = autocast_like_linear(*self[:4])
        masks = [None if mask is None else differentiable(mask.bool()) for mask in (self.key_mask, self.query_mask)]
        return self._replace(
            **scales,
            student_q=differentiable(cast[0]),
            student_k=differentiable(cast[1]),
            teacher_q=constant(cast[2]),
            teacher_k=constant(cast[3]),
            student_bias=differentiable(self.student_bias),
            teacher_bias=constant(self.teacher_bias),
            key_mask=masks[0],
            query_mask=masks[1],
        )
