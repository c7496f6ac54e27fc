"""How attention_kl and relation_kl are launched."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ...ops.dtypes import fp16_lift, gradient_dtype, score_dtype
from ..common import FORWARD_KL, JSD, LOG2E, MIX, beta_arguments, for_products, working_dtype
from ..tuning import launch, together
from .forward import forward_kernel
from .gradient import factors_kernel, gradient_kernel
from .products import Gradients, Part
from .scores import scores_kernel
from .tiles import MASKED, SPAN, STATS, Call, Constants, Model, Rows

__all__ = ["attention_kl", "relation_kl"]

# Relations that one launch takes: queries, keys and values of a layer.
ENTRIES = 3


def _bias(bias: Tensor | None, coefficient: Tensor, keys: int, student: Tensor) -> tuple:
    """As a Model has it."""
    if bias is None:
        return ()
    if bias.dim() == 2:
        table = (bias.double() * LOG2E.value).clamp(min=MASKED.value).to(score_dtype(student))
        table = torch.nn.functional.pad(table, (2 * SPAN.value,) * 2, mode="replicate")
        return table, table.shape[1]
    bias = for_products(bias, student)
    return bias, *bias.expand(*coefficient.shape, keys).stride()


def _model(entries: Sequence[tuple[Tensor, ...]], student: Tensor, bias: tuple) -> Model:
    def matrix(x: Tensor) -> tuple:
        x = for_products(x, student)
        x = x if x.stride(-1) == 1 else x.contiguous()
        return x, x.stride(0), x.stride(1)

    q, *k = (tuple(map(matrix, xs)) for xs in zip(*entries, strict=True))
    return Model(q, k[0] if k else (), bias)


def _lift(coefficient: Tensor, divergence: int, beta: float | Sequence[float]) -> Tensor:
    largest = coefficient.abs().amax() if coefficient.numel() > 0 else coefficient.new_zeros(())
    return fp16_lift(largest, divergence, beta).float()


class _Launches:
    """Those for relations that are alike but for their lengths, or for the one call of attention_kl: its entries."""

    def __init__(
        self,
        students: Sequence[tuple[Tensor, ...]],  # queries and, unless they are these, keys
        teachers: Sequence[tuple[Tensor, ...]],
        coefficients: Sequence[Tensor],
        key_masks: Sequence[Tensor],
        num_heads: int,
        scales: Sequence[float],
        causal: bool,
        grad: bool,
        divergence: int,
        beta: float | Sequence[float],
        biases: Sequence[tuple] = ((), ()),
    ):
        student, given, stats, lifts = students[0][0], beta_arguments(beta), (), ()
        wide = score_dtype(student)
        if grad:
            stats = tuple(x.new_empty((*x.shape[:2], STATS.value, x.shape[2]), dtype=wide) for x in coefficients)
        if grad and student.dtype == torch.float16:
            lifts = tuple(_lift(x, divergence, beta) for x in coefficients)
        self.divergence, self.heads = divergence, len(coefficients[0]) * num_heads  # of all sequences
        self.students, self.dtypes = students, (student.dtype, teachers[0][0].dtype)
        self.numbers = {"student_scale": float(scales[0]), "teacher_scale": float(scales[1]), "beta": given["beta"]}
        self.coefficients = tuple(x.contiguous() for x in coefficients)
        self.losses = tuple(torch.empty_like(x) for x in self.coefficients)
        masks = tuple(for_products(x, student).contiguous() for x in key_masks)
        queries, keys = (tuple(xs[n].shape[1] for xs in students) for n in (0, -1))
        models = (_model(xs, student, bias) for xs, bias in zip((students, teachers), biases, strict=True))
        self.call = Call(*models, Rows(stats, masks, lifts, queries, keys, num_heads), given["weights"] or ())
        self.rows = max(queries)
        widths = (xs[0][0].shape[2] // num_heads for xs in (students, teachers))
        groups = (max(1, xs[0][0].shape[2] // max(1, xs[0][-1].shape[2])) for xs in (students, teachers))
        self.C = Constants(divergence, causal, *widths, *groups, working_dtype(wide))

    def _launch(self, name: str, kernel: Any, arguments: tuple, heads: int, rows: int, least: int = 16) -> None:
        call, C, given = self.call, self.C, self.call.rows
        size = max(self.dtypes[0].itemsize, min(self.dtypes[1].itemsize, 4))
        width = max(least, triton.next_power_of_2(max(C.WIDTH_S, C.WIDTH_T)))
        there = len(given.key_masks) > 0, len(given.stats) > 0, len(call.student.bias), len(call.teacher.bias)

        def run(options: dict[str, Any]) -> None:
            blocks = triton.cdiv(rows, options["BLOCK_M"])
            kernel[blocks * heads, len(given.queries)](call, *arguments, blocks, **self.numbers, C=C, **options)

        name = f"mix_{name}" if self.divergence >= MIX.value else name
        launch(name, size, width, (C, *self.dtypes, there, heads, rows, given.queries, given.keys), run)

    def forward(self) -> None:
        """Losses and statistics."""
        arguments = self.coefficients, self.losses
        # a bias, or a second look at the scores, takes the registers that narrow heads leave
        narrow = self.divergence < JSD.value and self.call.student.bias == () and self.call.teacher.bias == ()
        self._launch("forward", forward_kernel, arguments, self.heads, self.rows, 16 if narrow else 64)

    def gradients(self) -> tuple[Tensor, ...]:
        """Those of relations, whose queries are their keys."""
        gradients = tuple(torch.empty(x.shape, dtype=gradient_dtype(x), device=x.device) for (x,) in self.students)
        tops = None
        if self.divergence == FORWARD_KL.value and not self.C.CAUSAL and gradients[0].dtype.itemsize == 2:
            tops = tuple(x.new_empty(self.heads) for x in self.call.rows.stats)
            factors_kernel[self.heads, len(tops)](self.call.rows, tops, F=self.C.F, BLOCK=1024)
        name = "mixture_gradient" if JSD.value <= self.divergence < MIX.value else "gradient"
        self._launch(name, gradient_kernel, (tops, gradients), self.heads, self.rows)
        return gradients

    def scores(self, part: Part, columns: int) -> Tensor:
        """The gradient of some scores, [sequences, heads, queries, columns], times the lift."""
        gradient, (sequences, heads, queries) = self.students[0][0].new_empty(*part.shape, columns), part.shape
        arguments = gradient, *(x.start for x in part), heads, queries, columns
        self._launch("scores", scores_kernel, arguments, sequences * heads, queries)
        return gradient


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
    biases = [_bias(x, coefficient, student_k.shape[1], student_q) for x in (student_bias, teacher_bias)]
    with torch.cuda.device_of(student_q):
        launches = _Launches(
            [(student_q, student_k)], [(teacher_q, teacher_k)], [coefficient], () if key_mask is None else [key_mask],
            num_heads, [student_scale, teacher_scale], causal, any(gradients), divergence, beta, biases,
        )  # fmt: skip
        launches.forward()
        lift = launches.call.rows.lifts[0] if launches.call.rows.lifts else None
        found = Gradients(
            student_q, student_k, student_bias, coefficient, key_mask, student_scale, causal, lift, gradients
        )
        for part in found.parts() if any(gradients) else ():
            found.add(part, launches.scores(part, found.columns))
        return launches.losses[0], *found.results()


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
    alike = [  # what a launch must have in common
        (len(x), x.shape[2], x.dtype, y.shape[2], y.dtype, is_causal, mask is None, grad)
        for x, y, mask, is_causal, grad in zip(student, teacher, key_mask, causal, gradients, strict=True)
    ]
    losses, found = list(coefficient), [x.new_empty(0, dtype=gradient_dtype(x)) for x in student]
    for members in together(alike, ENTRIES):
        first = members[0]
        with torch.cuda.device_of(student[first]):
            launches = _Launches(
                [(student[n],) for n in members], [(teacher[n],) for n in members], [coefficient[n] for n in members],
                [mask for n in members if (mask := key_mask[n]) is not None], num_heads,
                [(x[first].shape[2] // num_heads) ** -0.5 for x in (student, teacher)],
                causal[first], gradients[first], divergence, beta,
            )  # fmt: skip
            launches.forward()
            given = launches.gradients() if gradients[first] else [found[n] for n in members]
        for n, loss, gradient in zip(members, launches.losses, given, strict=True):
            losses[n], found[n] = loss, gradient
    return losses, found
