"""How attention_kl and relation_kl are launched."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.dtypes import fp16_lift, gradient_dtype, score_dtype
from ..common import FORWARD_KL, JSD, LOG2E, MIX, beta_arguments, for_products
from ..tuning import launch, together
from .forward import forward_kernel
from .gradient import factors_kernel, gradient_kernel
from .products import Gradients, Part
from .scores import scores_kernel
from .tiles import MASKED, SPAN, STATS

__all__ = ["attention_kl", "relation_kl"]

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

    def launch(self, kernel: str, case: tuple, run: Callable[[dict], None], least: int = 16) -> None:
        size = max(self.student_dtype.itemsize, min(self.teacher_dtype.itemsize, 4))
        width = max(least, triton.next_power_of_2(max(self.width_s, self.width_t)))
        launch(kernel, size, width, (self, case), run)

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
    largest = coefficient.abs().amax() if coefficient.numel() > 0 else coefficient.new_zeros(())
    lift = fp16_lift(largest, divergence, beta).float() if lifted else None
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
    """As the kernels take it: by distance (log2(e) diagonals, padded; their number), or (tensor, its four strides)."""
    if bias is None:
        return None
    if bias.dim() == 2:
        table = (bias.double() * LOG2E.value).clamp(min=MASKED.value).to(score_dtype(student))
        table = torch.nn.functional.pad(table, (2 * SPAN.value,) * 2, mode="replicate")
        return table, table.shape[1]
    bias = for_products(bias, student)
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
    # a bias, or a second look at the scores, takes the registers that narrow heads leave
    least = 16 if biases == (None, None) and setting.divergence < JSD.value else 64
    setting.launch(kernel, (batch, lengths, key_lengths, key_masks is None, stats is None, *biases), run, least)


def _launch_gradient(entries: list[_Entry], setting: _Setting) -> list[Tensor]:
    """The gradients of relations, whose queries are their keys."""
    student, teacher = [e.student_q for e in entries], [e.teacher_q for e in entries]
    gradients = [torch.empty(x.shape, dtype=gradient_dtype(x), device=x.device) for x in student]
    lengths, batch = tuple(x.shape[1] for x in student), student[0].shape[0]
    key_masks = None if entries[0].key_mask is None else tuple(e.key_mask for e in entries)
    lifts = None if entries[0].lift is None else tuple(e.lift for e in entries)
    stats, constants, tops = tuple(e.stats for e in entries), setting.constants(), None
    if setting.divergence == FORWARD_KL.value and gradients[0].dtype.itemsize == 2:
        programs = batch * setting.num_heads, len(entries)
        tops = tuple(x.new_empty(programs[0]) for x in stats)
        factors_kernel[programs](
            stats, tops, key_masks, lifts, lengths, setting.num_heads, BLOCK=1024, F=constants["F"]
        )  # fmt: skip

    def run(options: dict) -> None:
        blocks = triton.cdiv(max(lengths), options["BLOCK_M"])
        gradient_kernel[(blocks * batch * setting.num_heads, len(entries))](
            _matrices(student),
            _matrices(teacher),
            stats,
            tops,
            key_masks,
            lifts,
            tuple(gradients),
            lengths,
            setting.num_heads,
            blocks,
            CAUSAL=setting.causal,
            **constants,
            **options,
        )

    kernel = "mixture_gradient" if setting.divergence >= JSD.value else "gradient"
    kernel = "mix_gradient" if setting.divergence >= MIX.value else kernel
    setting.launch(kernel, (batch, lengths, key_masks is None), run)
    return gradients


def _launch_scores(
    entry: _Entry, setting: _Setting, student_bias: Bias, teacher_bias: Bias, part: Part, columns: int
) -> Tensor:
    """The gradient of some scores, [sequences, heads, queries, columns], times the lift."""
    batch, heads, queries = entry.coefficient.shape
    keys = entry.student_k.shape[1]
    sequences, some_heads, some_queries = part.shape
    gradient = entry.student_q.new_empty(*part.shape, columns)

    def run(options: dict) -> None:
        blocks = triton.cdiv(some_queries, options["BLOCK_M"])
        scores_kernel[(sequences * some_heads * blocks,)](
            *_matrices([entry.student_q, entry.student_k, entry.teacher_q, entry.teacher_k]),
            entry.stats,
            entry.key_mask,
            entry.lift,
            gradient,
            queries,
            keys,
            student_bias,
            teacher_bias,
            heads,
            *(x.start for x in part),
            some_heads,
            some_queries,
            columns,
            blocks,
            CAUSAL=setting.causal,
            **setting.constants(),
            **options,
        )

    kernel = "mix_scores" if setting.divergence >= MIX.value else "scores"
    case = batch, *part.shape, keys, entry.key_mask is None, _kind(student_bias), _kind(teacher_bias)
    setting.launch(kernel, case, run)
    return gradient


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
    found = Gradients(
        entry.student_q, entry.student_k, student_bias, coefficient, key_mask, setting.group_s, setting.student_scale,
        causal, entry.lift, gradients,
    )  # fmt: skip
    with torch.cuda.device_of(student_q):
        _launch_forward([entry], setting, *biases)
        for part in found.parts() if any(gradients) else ():
            found.add(part, _launch_scores(entry, setting, *biases, part, found.columns))
        return entry.loss, *found.results()


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
                launched = _launch_gradient(group, setting)
                for n, gradient in zip(members, launched, strict=True):
                    found[n] = gradient
    return [entry.loss for entry in entries], found
