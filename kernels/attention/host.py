"""How attention_kl and relation_kl are launched."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.dtypes import fp16_lift, gradient_dtype, score_dtype
from ..common import JSD, MIX, beta_arguments, for_products
from ..tuning import launch, together
from .bias import bias_kernel, diagonals_kernel
from .forward import forward_kernel
from .gradient import gradient_kernel
from .tiles import STATS

__all__ = ["attention_kl", "relation_kl"]

T = TypeVar("T")

# Relations that one launch takes: queries, keys and values of a layer.
ENTRIES = 3

Bias = tuple | None


@dataclass(frozen=True)
class _Setting:
    """What all kernels of a call, or of a group of relations, have in common."""

    num_heads: int
    width_s: int  # of a head
    width_t: int
    group_s: int  # heads of queries that share one of keys
    group_t: int
    student_scale: float
    teacher_scale: float
    causal: bool
    divergence: int
    beta: float | tuple[float, ...]
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype

    def launch(self, kernel: str, case: tuple, run: Callable[[dict], T]) -> T:
        size = max(self.student_dtype.itemsize, min(self.teacher_dtype.itemsize, 4))
        width = max(16, triton.next_power_of_2(max(self.width_s, self.width_t)))
        return launch(kernel, size, width, (self, case), run)

    def constants(self) -> dict:
        return {
            "student_scale": self.student_scale,
            "teacher_scale": self.teacher_scale,
            **beta_arguments(self.beta),
            "DIVERGENCE": self.divergence,
            "WIDTH_S": self.width_s,
            "WIDTH_T": self.width_t,
            "PADDED_S": max(16, triton.next_power_of_2(self.width_s)),
            "PADDED_T": max(16, triton.next_power_of_2(self.width_t)),
            "GROUP_S": self.group_s,
            "GROUP_T": self.group_t,
            "F": tl.float64 if self.student_dtype == torch.float64 else tl.float32,
        }


def _group(q: Tensor, k: Tensor) -> int:
    """How many heads of queries share one of keys."""
    return max(1, q.shape[2] // max(1, k.shape[2]))


def _hashable(beta: float | Sequence[float]) -> float | tuple[float, ...]:
    return float(beta) if isinstance(beta, (int, float)) else tuple(beta)


@dataclass
class _Entry:
    """One relation of relation_kl, or the one call of attention_kl."""

    student_q: Tensor  # [B, Lq, Hs]
    student_k: Tensor  # [B, Lk, Hs]
    teacher_q: Tensor  # [B, Lq, Ht]
    teacher_k: Tensor  # [B, Lk, Ht]
    coefficient: Tensor  # [B, A, Lq]
    key_mask: Tensor | None  # [B, Lk]
    loss: Tensor  # [B, A, Lq]
    stats: Tensor | None  # [B, A, STATS, Lq]
    lift: Tensor | None  # 0-d


def _entry(
    student_q, student_k, teacher_q, teacher_k, coefficient, key_mask, divergence: int, beta, grad: bool
) -> _Entry:
    batch, heads, queries = coefficient.shape
    double = student_q.dtype == torch.float64
    stats = coefficient.new_empty(
        (batch, heads, STATS.value, queries), dtype=torch.float64 if double else torch.float32
    )
    lifted = grad and student_q.dtype == torch.float16
    lift = fp16_lift(coefficient.abs().amax(), divergence, beta).float() if lifted else None
    matrices = [for_products(x, student_q) for x in (student_q, student_k, teacher_q, teacher_k)]
    matrices = [x if x.stride(-1) == 1 else x.contiguous() for x in matrices]
    return _Entry(
        *matrices,
        coefficient.contiguous(),
        None if key_mask is None else for_products(key_mask, student_q).contiguous(),
        torch.empty_like(coefficient, memory_format=torch.contiguous_format),
        stats if grad else None,
        lift,
    )


def _matrices(xs: list[Tensor]) -> tuple:
    return tuple((x, x.stride(0), x.stride(1)) for x in xs)


def _bias(bias: Tensor | None, coefficient: Tensor, keys: int, student: Tensor) -> Bias:
    """As the kernels take it: by distance (diagonals, reach), or (tensor, its four strides)."""
    if bias is None:
        return None
    bias = for_products(bias, student)
    if bias.dim() == 2:
        return bias.contiguous(), bias.shape[1] // 2
    return bias, *bias.expand(*coefficient.shape, keys).stride()


def _kind(bias: Bias) -> int | None:
    """Dense, by distance, or none."""
    return None if bias is None else len(bias)


def _launch_forward(entries: list[_Entry], setting: _Setting, student_bias: Bias, teacher_bias: Bias) -> None:
    lengths = tuple(e.coefficient.shape[2] for e in entries)
    key_lengths = tuple(e.student_k.shape[1] for e in entries)
    batch = entries[0].coefficient.shape[0]
    key_masks = None if entries[0].key_mask is None else tuple(e.key_mask for e in entries)
    stats = None if entries[0].stats is None else tuple(e.stats for e in entries)

    def run(options: dict) -> None:
        blocks = triton.cdiv(max(lengths), options["BLOCK_M"])
        forward_kernel[(blocks * batch * setting.num_heads, len(entries))](
            _matrices([e.student_q for e in entries]),
            _matrices([e.student_k for e in entries]),
            _matrices([e.teacher_q for e in entries]),
            _matrices([e.teacher_k for e in entries]),
            tuple(e.coefficient for e in entries),
            key_masks,
            tuple(e.loss for e in entries),
            stats,
            lengths,
            key_lengths,
            student_bias,
            teacher_bias,
            setting.num_heads,
            blocks,
            CAUSAL=setting.causal,
            **setting.constants(),
            **options,
        )

    biases = _kind(student_bias), _kind(teacher_bias)
    kernel = "mix_forward" if setting.divergence >= MIX.value else "forward"
    setting.launch(kernel, (batch, lengths, key_lengths, key_masks is None, stats is None, *biases), run)


def _launch_gradient(
    entries: list[_Entry], setting: _Setting, student_bias: Bias, teacher_bias: Bias, as_query: bool, as_key: bool
) -> list[Tensor]:
    """The gradients of the entries' queries, keys, or what is both."""
    student = [e.student_q for e in entries], [e.student_k for e in entries]
    teacher = [e.teacher_q for e in entries], [e.teacher_k for e in entries]
    own, other = (0, 1) if as_query else (1, 0)
    gradients = [_empty_gradient(x) for x in student[own]]
    lengths, other_lengths = (tuple(x.shape[1] for x in student[side]) for side in (own, other))
    batch = student[own][0].shape[0]
    shared = not as_query and setting.group_s > 1
    if shared:
        gradients = [
            x.new_empty(*x.shape[:2], setting.group_s * x.shape[2], dtype=score_dtype(x)) for x in student[own]
        ]
    key_masks = None if entries[0].key_mask is None else tuple(e.key_mask for e in entries)

    def run(options: dict) -> None:
        blocks = triton.cdiv(max(lengths), options["BLOCK_M"])
        gradient_kernel[(blocks * batch * setting.num_heads, len(entries))](
            _matrices(student[own]),
            _matrices(student[other]),
            _matrices(teacher[own]),
            _matrices(teacher[other]),
            tuple(e.stats for e in entries),
            key_masks,
            None if entries[0].lift is None else tuple(e.lift for e in entries),
            tuple(gradients),
            lengths,
            other_lengths,
            student_bias,
            teacher_bias,
            setting.num_heads,
            blocks,
            CAUSAL=setting.causal,
            AS_QUERY=as_query,
            AS_KEY=as_key,
            **setting.constants(),
            **options,
        )

    kernel = "mixture_gradient" if setting.divergence >= JSD.value else "gradient"
    kernel = "mix_gradient" if setting.divergence >= MIX.value else kernel
    biases = _kind(student_bias), _kind(teacher_bias)
    setting.launch(kernel, (batch, lengths, other_lengths, key_masks is None, as_query, as_key, *biases), run)
    if shared:
        parts = [g.unflatten(2, (-1, setting.group_s, setting.width_s)) for g in gradients]
        gradients = [g.sum(3).flatten(2).to(gradient_dtype(x)) for g, x in zip(parts, student[own], strict=True)]
    return gradients


def _launch_bias_gradient(
    entry: _Entry, setting: _Setting, student_bias: Bias, teacher_bias: Bias, shape: torch.Size, out: torch.dtype
) -> Tensor:
    batch, heads, queries = entry.coefficient.shape
    keys = entry.student_k.shape[1]
    matrices = [
        (x, x.stride(0), x.stride(1)) for x in (entry.student_q, entry.student_k, entry.teacher_q, entry.teacher_k)
    ]
    case = batch, queries, keys, entry.key_mask is None, tuple(shape), _kind(student_bias), _kind(teacher_bias)

    def run_diagonals(options: dict) -> Tensor:
        blocks = triton.cdiv(queries, options["BLOCK"])
        partial = entry.stats.new_zeros(batch, heads, blocks, shape[1])
        diagonals_kernel[(batch * heads * blocks,)](
            *matrices,
            entry.stats,
            entry.key_mask,
            partial,
            queries,
            keys,
            student_bias,
            teacher_bias,
            heads,
            blocks,
            CAUSAL=setting.causal,
            **setting.constants(),
            **options,
        )
        return partial.sum((0, 2), dtype=torch.float64).to(out)

    if len(shape) == 2:
        return setting.launch("diagonals", case, run_diagonals)
    gradient = torch.empty(shape, dtype=out, device=entry.student_q.device)
    if shape[3] != keys:  # a row's gradients add up to zero
        return gradient.zero_()
    sum_queries = shape[2] != queries

    def run(options: dict) -> None:
        blocks, key_blocks = triton.cdiv(queries, options["BLOCK_M"]), triton.cdiv(keys, options["BLOCK_N"])
        query_blocks, blocks_summed = (1, blocks) if sum_queries else (blocks, 1)
        bias_kernel[(key_blocks * query_blocks * shape[0] * shape[1],)](
            *matrices,
            entry.stats,
            entry.key_mask,
            gradient,
            queries,
            keys,
            student_bias,
            teacher_bias,
            heads,
            key_blocks,
            query_blocks,
            shape[1],
            batch // shape[0],
            heads // shape[1],
            blocks_summed,
            CAUSAL=setting.causal,
            SUM_QUERIES=sum_queries,
            **setting.constants(),
            **options,
        )

    setting.launch("bias", case, run)
    return gradient


def _empty_gradient(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=gradient_dtype(x), device=x.device)


def _no_gradient(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=gradient_dtype(x), device=x.device)


def attention_kl(
    student_q: Tensor,  # [B, Lq, Hs]
    student_k: Tensor,  # [B, Lk, Hs], or narrower
    teacher_q: Tensor,  # [B, Lq, Ht]
    teacher_k: Tensor,  # [B, Lk, Ht]
    student_bias: Tensor | None,  # [B, A, Lq, Lk], any of them 1, or diagonals [A, 2 reach + 1]
    teacher_bias: Tensor | None,
    coefficient: Tensor,  # [B, A, Lq]
    key_mask: Tensor | None,  # [B, Lk]
    causal: bool,
    num_heads: int,
    student_scale: float,
    teacher_scale: float,
    gradients: list[bool],  # of student_q, student_k, student_bias
    divergence: int,
    beta: float | Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(coefficient * D of every row, its gradients; those not wanted are empty)"""
    entry = _entry(student_q, student_k, teacher_q, teacher_k, coefficient, key_mask, divergence, beta, any(gradients))
    setting = _Setting(
        num_heads,
        student_q.shape[2] // num_heads,
        teacher_q.shape[2] // num_heads,
        _group(student_q, student_k),
        _group(teacher_q, teacher_k),
        float(student_scale),
        float(teacher_scale),
        causal,
        divergence,
        _hashable(beta),
        student_q.dtype,
        teacher_q.dtype,
    )
    biases = [_bias(x, coefficient, student_k.shape[1], student_q) for x in (student_bias, teacher_bias)]
    grad_q, grad_k, grad_bias = (_no_gradient(student_q) for _ in range(3))  # outputs of an op may not alias
    with torch.cuda.device_of(student_q):
        _launch_forward([entry], setting, *biases)
        if gradients[0]:
            (grad_q,) = _launch_gradient([entry], setting, *biases, as_query=True, as_key=False)
        if gradients[1]:
            (grad_k,) = _launch_gradient([entry], setting, *biases, as_query=False, as_key=True)
        if gradients[2]:
            assert student_bias is not None
            grad_bias = _launch_bias_gradient(
                entry, setting, *biases, shape=student_bias.shape, out=gradient_dtype(student_bias)
            )
    return entry.loss, grad_q, grad_k, grad_bias


def relation_kl(
    student: list[Tensor],  # [B, L, Hs] each; lengths and widths may differ
    teacher: list[Tensor],  # [B, L, Ht]
    coefficient: list[Tensor],  # [B, A, L]
    key_mask: list[Tensor | None],  # [B, L]
    causal: list[bool],
    num_heads: int,
    gradients: list[bool],
    divergence: int,
    beta: float | Sequence[float],
) -> tuple[list[Tensor], list[Tensor]]:
    """(coefficient * D of every row, its gradients; those not wanted are empty) for every relation."""
    entries = [
        _entry(s, s, t, t, c, mask, divergence, beta, grad)
        for s, t, c, mask, grad in zip(student, teacher, coefficient, key_mask, gradients, strict=True)
    ]
    found = [_no_gradient(x) for x in student]
    settings = []  # what a launch must have in common
    for n, (entry, is_causal) in enumerate(zip(entries, causal, strict=True)):
        width_s, width_t = student[n].shape[2] // num_heads, teacher[n].shape[2] // num_heads
        scales = width_s**-0.5, width_t**-0.5
        dtypes = student[n].dtype, teacher[n].dtype
        setting = _Setting(num_heads, width_s, width_t, 1, 1, *scales, is_causal, divergence, _hashable(beta), *dtypes)
        settings.append((setting, len(coefficient[n]), entry.key_mask is None, entry.stats is None))
    for members in together(settings, ENTRIES):
        setting, group = settings[members[0]][0], [entries[n] for n in members]
        with torch.cuda.device_of(student[members[0]]):
            _launch_forward(group, setting, None, None)
            if gradients[members[0]]:
                launched = _launch_gradient(group, setting, None, None, as_query=True, as_key=True)
                for n, gradient in zip(members, launched, strict=True):
                    found[n] = gradient
    return [entry.loss for entry in entries], found
