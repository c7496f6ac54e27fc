"""attention_kl: the divergence between the attention distributions of two models, without an [Lq, Lk] matrix.

On CPU, a sequence's heads and queries are taken in chunks whose scores fit the caches: two batched GEMMs make the
scores of both models in a workspace that every chunk reuses, the row primitive turns the student's into their gradient
in place, two batched GEMMs carry that on to queries and keys. Padding at either end is cut off, and so are the keys
that causality hides from a whole chunk. On a GPU, kernels/attention_kl.py keeps scores in registers.

As in linear_kl, a scalar loss has its gradients made in the forward pass, and losses per row run the op again.

B batch, Lq queries, Lk keys, A heads, Hs and Ht widths, d = H / A head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from ..backend import backend_for, use_fused
from ..checks import (
    REDUCTIONS,
    Objective,
    average,
    check_choice,
    check_mask,
    check_normalizer,
    check_number,
    check_same_device,
    check_tensor,
    is_finite,
)
from ..relative_bias import RelativeBias
from .dtypes import autocast_like_linear, gradient_dtype, score_dtype

__all__ = ["AttentionKL", "AttentionKLPerRow", "attention_kl"]

# For the scores of both models in a chunk, on a CPU: GEMMs run at full speed, and the row primitive still finds the
# scores in the caches.
WORKSPACE_BYTES_PER_THREAD = 4 * 2**20
# A causal chunk of many queries computes many scores that are then masked.
CAUSAL_ROWS = 128

# ---- schema ---------------------------------------------------------------------------------------------------------
# A bias is [B, A, Lq, Lk], where any dimension may be 1, or else the diagonals of a relative bias, [A, 2 * reach + 1]:
# that of key j for query i is diagonals[a, clamp(j - i, -reach, reach) + reach].

_library = torch.library.Library("fastkd", "FRAGMENT")
_library.define(
    "attention_kl(Tensor student_q, Tensor student_k, Tensor teacher_q, Tensor teacher_k, Tensor? student_bias, "
    "Tensor? teacher_bias, Tensor coefficient, Tensor? key_mask, bool causal, int num_heads, float student_scale, "
    "float teacher_scale, bool[3] gradients, int divergence, float beta) "
    "-> (Tensor loss, Tensor grad_q, Tensor grad_k, Tensor grad_bias)"
)
# For chunks of attention on a CPU, in csrc/cpu; offset is the distance of a chunk's first key from its first query.
# divergence_rows_ of scores [A * R, n] that lack relative biases and causality; sums += a gradient [A, R, n] along its
# diagonals; x [A, n, n] += its transpose.
_library.define(
    "attention_rows_(Tensor(a!) student, Tensor(b!) teacher, Tensor coefficient, Tensor(c!) loss, "
    "Tensor? student_diagonals, Tensor? teacher_diagonals, int heads, int offset, bool causal, int divergence, "
    "float beta) -> ()"
)
_library.define("sum_diagonals_(Tensor gradient, Tensor(a!) sums, int offset) -> ()")
_library.define("symmetrize_(Tensor(a!) x) -> ()")

# ---- fake -----------------------------------------------------------------------------------------------------------


def empty_gradient(x: Tensor | None, wanted: bool, student: Tensor) -> Tensor:
    """The gradient of x, unwritten; without elements where it is not wanted."""
    shape = x.shape if wanted and x is not None else (0,)
    return student.new_empty(shape, dtype=gradient_dtype(student if x is None else x))


@torch.library.register_fake("fastkd::attention_kl", lib=_library)
def _(student_q, student_k, tq, tk, student_bias, tb, coefficient, mask, causal, num_heads, ss, ts, gradients, *_):
    inputs = zip((student_q, student_k, student_bias), gradients, strict=True)
    return torch.empty_like(coefficient), *(empty_gradient(x, wanted, student_q) for x, wanted in inputs)


for _name in ("attention_rows_", "sum_diagonals_", "symmetrize_"):
    torch.library.register_fake(f"fastkd::{_name}", lambda *_: None, lib=_library)

# ---- forward, with the gradients, on CPU ----------------------------------------------------------------------------


class _Bias:
    """One model's bias, in the blocks that chunks need, and the sum of their gradients if that is wanted."""

    def __init__(self, bias: Tensor, shape: tuple[int, ...], dtype: torch.dtype, wanted: bool = False):
        self.dense = bias.dim() == 4
        self.bias = bias.expand(shape) if self.dense else bias.to(dtype).contiguous()
        # the sums along diagonals are of up to B * Lq * Lk terms
        sums = dtype if self.dense else torch.float64
        self.gradient = torch.zeros(bias.shape, dtype=sums) if wanted else None

    def diagonals(self, heads: slice) -> Tensor | None:
        return None if self.dense else self.bias[heads]

    def add_gradient(self, block: Tensor, b: int, heads: slice, rows: slice, keys: slice) -> None:
        if self.gradient is None:
            return
        if not self.dense:
            torch.ops.fastkd.sum_diagonals_(block, self.gradient[heads], keys.start - rows.start)
            return
        sizes, index = self.gradient.shape, (slice(b, b + 1), heads, rows, keys)
        target = self.gradient[tuple(i if size > 1 else slice(None) for i, size in zip(index, sizes, strict=True))]
        target += block.unsqueeze(0).sum_to_size(target.shape)


@dataclass
class _Side:
    """One model's part in a sequence."""

    q: Tensor  # [A, Lq, d]
    k: Tensor  # [A, Lk, d]
    scale: float
    bias: _Bias | None

    def scores_(self, out: Tensor, b: int, heads: slice, rows: slice, keys: slice) -> None:
        """out [heads, rows, keys] = scale * q @ k.T, plus the bias unless it is given by its diagonals"""
        q, k = self.q[heads, rows], self.k[heads, keys]
        if self.bias is not None and self.bias.dense:
            out.copy_(self.bias.bias[b, heads, rows, keys])
            torch.baddbmm(out, q, k.mT, alpha=self.scale, out=out)
        else:
            torch.baddbmm(out, q, k.mT, beta=0, alpha=self.scale, out=out)

    def diagonals(self, heads: slice) -> Tensor | None:
        """Those of the bias, which the scores still lack."""
        return None if self.bias is None else self.bias.diagonals(heads)


class _Sums:
    """The gradients of one sequence's queries and keys, collected from its chunks.

    Heads are apart here, [A, L, d], since GEMMs cannot write little rows scattered over [L, H].
    """

    def __init__(self, side: _Side, grad_q: Tensor | None, grad_k: Tensor | None):
        self.side, self.grad_q, self.grad_k = side, grad_q, grad_k  # [L, H]
        self.q = None if grad_q is None else _zeros_like(side.q)
        # [A, d, Lk]; a relation needs it only where its chunks are not whole
        self.k_transposed = None if grad_k is None or grad_k is grad_q else _zeros_like(side.k.mT)

    def add(self, block: Tensor, heads: slice, rows: slice, keys: slice) -> None:
        """Takes the score gradients [heads, rows, keys], and may overwrite them."""
        whole_relation = self.grad_k is self.grad_q and rows == keys
        if self.q is not None:
            if whole_relation:
                torch.ops.fastkd.symmetrize_(block)  # (G + G.T) X
            target, k = self.q[heads, rows], self.side.k[heads, keys]
            if target.is_contiguous():
                torch.bmm(block, k, out=target)
            else:
                target.copy_(torch.bmm(block, k))
        if self.grad_k is not None and not whole_relation:  # q.T @ G is faster than G.T @ q
            if self.k_transposed is None:
                self.k_transposed = _zeros_like(self.side.k.mT)
            target, q = self.k_transposed[heads, :, keys], self.side.q[heads, rows].mT
            if target.is_contiguous():
                target.baddbmm_(q, block)
            else:
                target += torch.bmm(q, block)

    def write(self) -> None:
        """Writes the gradients, scaled."""
        num_heads, scale = self.side.q.shape[0], self.side.scale
        if self.grad_q is not None and self.q is not None:
            torch.mul(self.q, scale, out=_split(self.grad_q, num_heads))
        if self.grad_k is not None and self.k_transposed is not None:
            target = _split(self.grad_k, num_heads)
            if self.grad_k is self.grad_q:
                target.add_(self.k_transposed.mT, alpha=scale)
            else:
                torch.mul(self.k_transposed.mT, scale, out=target)


def _zeros_like(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=x.dtype)


def _span(kept: Tensor) -> slice:
    """From the first to the last True of a vector."""
    index = kept.nonzero()
    return slice(int(index[0]), int(index[-1]) + 1) if index.numel() else slice(0, 0)


def _parts(span: slice, at_most: int) -> list[slice]:
    """A span in equal parts."""
    length = span.stop - span.start
    step = max(1, -(-length // max(1, -(-length // at_most))))
    return [slice(start, min(start + step, span.stop)) for start in range(span.start, span.stop, step)]


def _chunk_scores(itemsize: int) -> int:
    """How many scores of one model a chunk may have."""
    return WORKSPACE_BYTES_PER_THREAD * torch.get_num_threads() // (2 * itemsize)


def _chunks(num_heads: int, rows: slice, keys: slice, causal: bool, itemsize: int) -> Iterator[tuple[slice, slice]]:
    """(heads, rows) of every chunk: whole heads, and several of them, where they fit; at least a row."""
    head_rows = _chunk_scores(itemsize) // max(1, keys.stop - keys.start)
    most = max(1, head_rows // min(num_heads, torch.get_num_threads()))
    row_parts = _parts(rows, min(most, CAUSAL_ROWS) if causal else most)
    if row_parts:
        longest = row_parts[0].stop - row_parts[0].start
        for heads in _parts(slice(0, num_heads), max(1, head_rows // longest)):
            for part in row_parts:
                yield heads, part


def _sequence(x: Tensor, b: int, kept: slice, mask: Tensor | None, num_heads: int, dtype: torch.dtype) -> Tensor:
    """One sequence of x [B, L, H] as [A, L, d], uncopied if it can be; masked positions within `kept` are 0."""
    x = x[b].to(dtype)
    if mask is not None and not mask[kept].all():
        x = x.masked_fill(~mask.unsqueeze(1), 0)
    return _split(x, num_heads)


def _split(x: Tensor, num_heads: int) -> Tensor:
    """[L, H] as [A, L, d]"""
    return x.unflatten(1, (num_heads, -1)).transpose(0, 1)


@torch.autocast("cpu", enabled=False)
def attend(
    student_q: Tensor,  # [B, Lq, Hs]
    student_k: Tensor,  # [B, Lk, Hs]
    teacher_q: Tensor,  # [B, Lq, Ht]
    teacher_k: Tensor,  # [B, Lk, Ht]
    student_bias: _Bias | None,
    teacher_bias: _Bias | None,
    coefficient: Tensor,  # [B, A, Lq] float64
    key_mask: Tensor | None,  # [B, Lk] bool
    causal: bool,
    num_heads: int,
    student_scale: float,
    teacher_scale: float,
    grad_q: Tensor | None,  # [B, Lq, Hs]
    grad_k: Tensor | None,  # [B, Lk, Hs]; `grad_q` itself where queries and keys are one
    divergence: int,
    beta: float,
) -> Tensor:
    """Returns the losses [B, A, Lq] float64, writes `grad_q` and `grad_k`, and adds up `student_bias`'s gradient."""
    dtype = score_dtype(student_q)
    loss = torch.zeros_like(coefficient)
    keys_in_all = student_k.shape[1]
    most_scores = min(
        coefficient.shape[1] * coefficient.shape[2] * keys_in_all, max(_chunk_scores(dtype.itemsize), keys_in_all)
    )
    workspace = student_q.new_empty(2 * most_scores, dtype=dtype)
    for b in range(student_q.shape[0]):
        row_mask = (coefficient[b] != 0).any(0)
        mask = None if key_mask is None else key_mask[b]
        rows, keys = _span(row_mask), slice(0, keys_in_all) if mask is None else _span(mask)

        of_q, of_k = (b, rows, row_mask, num_heads, dtype), (b, keys, mask, num_heads, dtype)
        student = _Side(_sequence(student_q, *of_q), _sequence(student_k, *of_k), student_scale, student_bias)
        teacher = _Side(_sequence(teacher_q, *of_q), _sequence(teacher_k, *of_k), teacher_scale, teacher_bias)
        grads = [None if gradient is None else gradient[b] for gradient in (grad_q, grad_k)]
        sums = _Sums(student, grads[0], grads[0] if grad_k is grad_q else grads[1])
        for heads, some in _chunks(num_heads, rows, keys, causal, dtype.itemsize):
            where = (heads, some, slice(keys.start, max(keys.start, min(keys.stop, some.stop))) if causal else keys)
            shape = torch.Size((2, *(part.stop - part.start for part in where)))
            student_scores, teacher_scores = scores = workspace[: shape.numel()].view(shape)
            student.scores_(student_scores, b, *where)
            teacher.scores_(teacher_scores, b, *where)
            if mask is not None and not mask[where[2]].all():
                scores.masked_fill_(~mask[where[2]], -torch.inf)
            weights = coefficient[b, heads, some].reshape(-1).contiguous()
            chunk_loss = torch.empty_like(weights)
            torch.ops.fastkd.attention_rows_(
                student_scores.flatten(0, 1), teacher_scores.flatten(0, 1), weights, chunk_loss,
                student.diagonals(heads), teacher.diagonals(heads), shape[1], where[2].start - some.start, causal,
                divergence, beta,
            )  # fmt: skip
            if student_bias is not None:
                student_bias.add_gradient(student_scores, b, *where)
            sums.add(student_scores, *where)
            loss[b, heads, some] = chunk_loss.view(shape[1:3])
        sums.write()
    return loss


def _attention_kl(
    student_q: Tensor,  # [B, Lq, Hs]
    student_k: Tensor,  # [B, Lk, Hs]
    teacher_q: Tensor,  # [B, Lq, Ht]
    teacher_k: Tensor,  # [B, Lk, Ht]
    student_bias: Tensor | None,  # [B or 1, A or 1, Lq or 1, Lk or 1] or [A, 2 * reach + 1]
    teacher_bias: Tensor | None,
    coefficient: Tensor,  # [B, A, Lq] float64, 0 where a row is masked or has no key
    key_mask: Tensor | None,  # [B, Lk] bool
    causal: bool,
    num_heads: int,
    student_scale: float,
    teacher_scale: float,
    gradients: list[bool],  # of student_q, student_k, student_bias
    divergence: int,
    beta: float,
) -> tuple[Tensor, ...]:
    if backend_for(student_q.device)[0] == "triton":
        from ..kernels import attention_kl as kernels

        return kernels.attention_kl(
            student_q, student_k, teacher_q, teacher_k, student_bias, teacher_bias, coefficient, key_mask, causal,
            num_heads, student_scale, teacher_scale, gradients, divergence, beta,
        )  # fmt: skip
    dtype, shape = score_dtype(student_q), (*coefficient.shape, student_k.shape[1])
    want_q, want_k, want_bias = gradients
    biases = (
        None if student_bias is None else _Bias(student_bias, shape, dtype, want_bias),
        None if teacher_bias is None else _Bias(teacher_bias, shape, dtype),
    )
    pairs = ((student_q, want_q), (student_k, want_k))
    sums = [x.new_empty(x.shape, dtype=dtype) if want else None for x, want in pairs]
    loss = attend(
        student_q, student_k, teacher_q, teacher_k, *biases, coefficient, key_mask, causal, num_heads, student_scale,
        teacher_scale, *sums, divergence, beta,
    )  # fmt: skip
    sums.append(None if biases[0] is None else biases[0].gradient)
    inputs = (student_q, student_k, student_bias)
    results = []
    for x, total in zip(inputs, sums, strict=True):
        gradient = empty_gradient(x, total is not None, student_q)
        results.append(gradient if total is None else total.to(gradient.dtype))
    return loss, *results


_library.impl("attention_kl", _attention_kl, "CompositeExplicitAutograd")

# ---- autograd.Function ----------------------------------------------------------------------------------------------


class AttentionKL(torch.autograd.Function):
    """The summed loss, a 0-d float64 tensor; its gradients are computed in the forward pass.

    Arguments are those of ``torch.ops.fastkd.attention_kl`` up to ``teacher_scale``, the student's three that get
    gradients first, and an ``Objective``.
    """

    @staticmethod
    def forward(ctx, student_q, student_k, student_bias, teacher_q, teacher_k, teacher_bias, *rest):
        *constants, objective = rest
        loss, *gradients = torch.ops.fastkd.attention_kl(
            student_q, student_k, teacher_q, teacher_k, student_bias, teacher_bias, *constants,
            ctx.needs_input_grad[:3], *objective.for_kernel()[:2],
        )  # fmt: skip
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in (student_q, student_k, student_bias)]
        return loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        pairs = zip(ctx.needs_input_grad, ctx.saved_tensors, ctx.dtypes, strict=False)
        gradients = [(saved * grad_loss).to(dtype) if needed else None for needed, saved, dtype in pairs]
        return *gradients, *(None,) * (len(ctx.needs_input_grad) - 3)


class AttentionKLPerRow(torch.autograd.Function):
    """Losses per row, [B, A, Lq] float64; the backward pass computes scores and gradients from the inputs.

    Arguments as those of :class:`AttentionKL`.
    """

    @staticmethod
    def forward(ctx, student_q, student_k, student_bias, teacher_q, teacher_k, teacher_bias, *rest):
        coefficient, key_mask, *constants, objective = rest
        tensors = (student_q, student_k, teacher_q, teacher_k, student_bias, teacher_bias)
        ctx.save_for_backward(*tensors, coefficient, key_mask)
        ctx.constants, ctx.objective = constants, objective.for_kernel()[:2]
        return torch.ops.fastkd.attention_kl(*tensors, coefficient, key_mask, *constants, [False] * 3, *ctx.objective)[
            0
        ]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        *tensors, coefficient, key_mask = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        _, *gradients = torch.ops.fastkd.attention_kl(
            *tensors, coefficient * grad_loss, key_mask, *ctx.constants, needed, *ctx.objective
        )
        inputs = (tensors[0], tensors[1], tensors[4])
        gradients = [
            gradient.to(x.dtype) if want else None for want, x, gradient in zip(needed, inputs, gradients, strict=True)
        ]
        return *gradients, *(None,) * (len(ctx.needs_input_grad) - 3)


# ---- public function ------------------------------------------------------------------------------------------------


def check_heads(num_heads: object, widths: dict[str, int]) -> None:
    """Raises unless heads of equal width fit every named width."""
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads: expected an int, got {type(num_heads).__name__}")
    if num_heads < 1 and not widths:
        raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
    if num_heads < 1 or any(width % num_heads for width in widths.values()):
        common = math.gcd(*widths.values())
        valid = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        named = " and ".join(f"{width} ({name})" for name, width in widths.items())
        raise ValueError(f"num_heads: expected a divisor of {named}: {valid}; got {num_heads}")


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
        valid &= (key_mask.cumsum(1) > 0) if causal else key_mask.any(1, keepdim=True)
    if query_mask is not None:
        valid &= query_mask
    weight = average(valid.double(), reduction, normalizer)
    if reduction == "mean":
        weight = weight / num_heads
    return weight.unsqueeze(1).expand(batch, num_heads, queries).contiguous()


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


def _for_kernel(bias: Any, dtype: torch.dtype) -> Any:
    """[B, A, Lq, Lk] with any of them 1, or [A, 2 * reach + 1] in the scores' dtype."""
    if isinstance(bias, RelativeBias):
        return bias.to(dtype).diagonals()
    return None if bias is None else bias[(None,) * (4 - bias.dim())]


def attention_kl(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    *,
    num_heads: int,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    student_bias: Tensor | RelativeBias | None = None,
    teacher_bias: Tensor | RelativeBias | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = False,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Divergence between the attention distributions of teacher and student, in memory that grows with the length.

    For every head and query, ``D(p, q)`` with ``q = softmax(student_scale * student_q @ student_k.T + student_bias)``
    over the keys that are not masked, and ``p`` likewise: the first of MiniLM's two terms (Wang et al., 2020, arXiv
    2002.10957). Scores are float32 whatever the inputs' dtype (float64 for float64 students).

    Args:
        student_q, student_k: [B, Lq, Hs] and [B, Lk, Hs], as the projections make them; heads lie side by side in the
            last dimension, each Hs / num_heads wide. Receive gradients.
        teacher_q, teacher_k: [B, Lq, Ht] and [B, Lk, Ht]; constants. Ht may differ from Hs.
        num_heads: of both models; a divisor of Hs and of Ht.
        student_scale, teacher_scale: of the scores; by default 1 / sqrt(head width). T5 has 1.
        student_bias, teacher_bias: a tensor that broadcasts to [B, A, Lq, Lk], or :class:`fastkd.RelativeBias`, T5's,
            which is never spread out. The student's receives a gradient, in its table if it is a RelativeBias.
        key_mask: [B, Lk] bool or integer, True or not 0 where a key takes part. Others have a probability of exactly 0.
        query_mask: [B, Lq], likewise; other rows count for nothing. So do rows that have no key left.
        causal: a query sees the keys up to its own position; needs Lq equal to Lk.
        divergence, beta: as in :func:`fastkd.logit_kl`.
        reduction: ``"mean"`` is over heads and over the rows that count, ``"sum"`` adds up both, ``"none"`` returns
            [B, A, Lq].
        normalizer: with ``"mean"``, a number or 0-d tensor that replaces the number of rows that count.
        impl: ``"auto"``, ``"reference"`` or ``"fused"``; see :mod:`fastkd.doctor`.

    Returns:
        A 0-d tensor, or [B, A, Lq] with ``reduction="none"``: float32, or float64 for float64 students.

    Raises:
        ValueError, TypeError: for arguments that do not fit, before any work.
        RuntimeError: ``impl="fused"`` where no kernel can run.
    """
    objective = Objective(divergence, beta, temperature=1.0, kd_weight=1.0, ce_weight=0.0)
    check_choice("reduction", reduction, REDUCTIONS)
    check_normalizer(normalizer, reduction)
    check_tensor("student_q", student_q, shape=[None] * 3, floating=True)
    batch, queries, width = student_q.shape
    check_tensor("student_k", student_k, shape=[batch, None, width], floating=True)
    keys, device = student_k.shape[1], student_q.device
    check_tensor("teacher_q", teacher_q, shape=[batch, queries, None], floating=True)
    check_tensor("teacher_k", teacher_k, shape=[batch, keys, teacher_q.shape[2]], floating=True)
    check_heads(num_heads, {"student_q": width, "teacher_q": teacher_q.shape[2]})
    for name, x, like in (("student_k", student_k, student_q), ("teacher_k", teacher_k, teacher_q)):
        if x.dtype != like.dtype:
            raise TypeError(f"{name}: expected dtype {like.dtype}, that of {name[:-1]}q, got {x.dtype}")
    for name, x in (("student_k", student_k), ("teacher_q", teacher_q), ("teacher_k", teacher_k)):
        check_same_device(name, x, device)
    for name, scale in (("student_scale", student_scale), ("teacher_scale", teacher_scale)):
        if scale is not None:
            check_number(name, scale, "that is finite", is_finite)
    for name, bias in (("student_bias", student_bias), ("teacher_bias", teacher_bias)):
        if bias is not None:
            _check_bias(name, bias, (batch, num_heads, queries, keys), device)
    if not isinstance(causal, bool):
        raise TypeError(f"causal: expected a bool, got {type(causal).__name__}")
    if causal and queries != keys:
        raise ValueError(f"causal: expected as many queries as keys, got {queries} and {keys}")
    if key_mask is not None:
        check_mask("key_mask", key_mask, [batch, keys], device)
        key_mask = key_mask.bool()
    if query_mask is not None:
        check_mask("query_mask", query_mask, [batch, queries], device)
        query_mask = query_mask.bool()
    if student_scale is None:
        student_scale = (width // num_heads) ** -0.5
    if teacher_scale is None:
        teacher_scale = (teacher_q.shape[2] // num_heads) ** -0.5
    student_q, student_k, teacher_q, teacher_k = autocast_like_linear(student_q, student_k, teacher_q, teacher_k)

    if not use_fused(impl, device):
        return reference.attention_kl(
            student_q,
            student_k,
            teacher_q,
            teacher_k,
            num_heads=num_heads,
            student_scale=student_scale,
            teacher_scale=teacher_scale,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            key_mask=key_mask,
            query_mask=query_mask,
            causal=causal,
            divergence=divergence,
            beta=beta,
            reduction=reduction,
            normalizer=normalizer,
        )

    dtype = score_dtype(student_q)
    arguments = (
        student_q,
        student_k,
        _for_kernel(student_bias, dtype),
        teacher_q.detach(),
        teacher_k.detach(),
        None if teacher_bias is None else _for_kernel(teacher_bias, dtype).detach(),
        row_coefficients(
            (batch, queries, keys), num_heads, key_mask, query_mask, causal, reduction, normalizer, device
        ),
        key_mask,
        causal,
        num_heads,
        float(student_scale),
        float(teacher_scale),
        objective,
    )
    loss = AttentionKLPerRow.apply(*arguments) if reduction == "none" else AttentionKL.apply(*arguments)
    return loss if student_q.dtype == torch.float64 else loss.float()
