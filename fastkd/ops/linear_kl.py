"""linear_kl: the vocabulary projections of both models and the divergence between their logits, in one op.

Tokens are taken in chunks. A chunk's logits go into a workspace that every chunk reuses: two GEMMs fill it, the row
primitive turns student logits into their gradient in place, two GEMMs carry that on to the hidden states and the
weight. The [T, V] logits never exist, and nothing is computed twice: 2 T V (Ht + 3 Hs) FLOPs with gradients,
2 T V (Ht + Hs) without.

A scalar loss fixes every token's coefficient before the pass, so the gradients are made in the forward pass and scaled
by the upstream gradient in the backward pass. Per-token losses do not know theirs: their backward runs the op again.

T tokens, V vocabulary, Hs and Ht hidden widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from ..backend import use_fused
from ..checks import Objective, TokenArguments, check_number, check_same_device, check_tensor, is_finite
from .chunks import token_chunks
from .divergence_rows import _OBJECTIVE, STATS, divergence_rows_, divergence_stats
from .dtypes import autocast_like_linear, gradient_dtype, score_dtype

__all__ = ["LinearKL", "LinearKLPerToken", "linear_kl"]

# For the two score buffers of a chunk: enough rows in flight for the GEMMs to run at full speed.
WORKSPACE_MB = {"cpu": 128, "cuda": 768}
# Low-precision weights are widened to fp32 this many rows at a time where the GEMM cannot accumulate in fp32 itself.
WIDENED_ROWS = 4096

# ---- schema ---------------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastkd", "FRAGMENT")
_library.define(
    "linear_kl(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? teacher_hidden, "
    "Tensor? teacher_weight, Tensor? teacher_bias, Tensor coefficient, Tensor? labels, float student_scale, "
    f"float teacher_scale, int workspace_bytes, bool[3] gradients, {_OBJECTIVE}) "
    "-> (Tensor loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)

# ---- fake -----------------------------------------------------------------------------------------------------------


def _outputs(student_hidden, student_weight, student_bias, coefficient, gradients):
    """Loss and gradients, unwritten; a gradient that is not asked for is empty."""
    wanted = zip(gradients, (student_hidden, student_weight, student_bias), strict=True)
    dtype = gradient_dtype(student_weight)
    shapes = [x.shape if want and x is not None else (0,) for want, x in wanted]
    return torch.empty_like(coefficient), *(student_weight.new_empty(shape, dtype=dtype) for shape in shapes)


@torch.library.register_fake("fastkd::linear_kl", lib=_library)
def _(student_hidden, student_weight, student_bias, th, tw, tb, coefficient, labels, ss, ts, ws, gradients, *objective):
    return _outputs(student_hidden, student_weight, student_bias, coefficient, gradients)


# ---- forward, with the gradients ------------------------------------------------------------------------------------


def _widened(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight [V, H] as blocks of rows in the scores' dtype; one block, uncopied, where it is in that dtype."""
    step = weight.shape[0] if weight.dtype == dtype else WIDENED_ROWS
    for start in range(0, weight.shape[0], step):
        rows = slice(start, min(start + step, weight.shape[0]))
        yield rows, weight[rows].to(dtype)


def _scores_(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> None:
    """out [n, V] = scale * hidden @ weight.T + bias, in out's dtype whatever that of the operands."""
    if hidden.is_cuda and hidden.itemsize == 2 and out.dtype == torch.float32:
        # tensor cores multiply 16-bit operands, accumulate in fp32 and write that
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
        if scale != 1:
            out.mul_(scale)
        if bias is not None:
            out.add_(bias)
        return
    hidden = hidden.to(out.dtype)
    for columns, block in _widened(weight, out.dtype):
        target = out[:, columns]
        if bias is None:
            torch.addmm(target, hidden, block.t(), beta=0, alpha=scale, out=target)
        else:
            torch.addmm(bias[columns].to(out.dtype), hidden, block.t(), alpha=scale, out=target)


def _accumulate_(out: Tensor, a: Tensor, b: Tensor, scale: float, first: bool) -> None:
    """out = scale * a @ b, plus what out holds unless this is the first time; in out's dtype."""
    if a.dtype == out.dtype:
        out.addmm_(a, b.to(out.dtype), beta=0 if first else 1, alpha=scale)
    else:
        product = torch.mm(a, b, out_dtype=out.dtype)
        out.copy_(product.mul_(scale)) if first else out.add_(product, alpha=scale)


class _Gradients:
    """Accumulates what a chunk of score gradients adds to the gradients of hidden states, weight and bias."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, dtype: torch.dtype, wanted):
        self.weight, self.scale = weight, scale
        self.dtype = weight.dtype if weight.is_cuda else dtype  # of the GEMM operands
        self.written = 0  # rows of weight_grad
        want_hidden, want_weight, want_bias = wanted
        self.hidden_grad = hidden.new_zeros(hidden.shape, dtype=gradient_dtype(weight)) if want_hidden else None
        # fp32 even for 16-bit weights: chunks add up here
        self.weight_grad = weight.new_empty(weight.shape, dtype=dtype) if want_weight else None
        self.bias_grad = bias.new_zeros(bias.shape, dtype=dtype) if want_bias and bias is not None else None

    def add(self, rows: Tensor | slice, hidden: Tensor, scores_grad: Tensor) -> None:
        vocabulary = scores_grad.shape[1]
        if self.bias_grad is not None:
            self.bias_grad[:vocabulary] += scores_grad.sum(0)
        scores_grad = scores_grad.to(self.dtype)
        if self.hidden_grad is not None:
            grad = scores_grad.new_zeros(hidden.shape)
            for columns, block in _widened(self.weight[:vocabulary], self.dtype):
                grad.addmm_(scores_grad[:, columns], block, alpha=self.scale)
            self.hidden_grad[rows] = grad.to(self.hidden_grad.dtype)
        if self.weight_grad is not None:
            target = self.weight_grad[:vocabulary]
            _accumulate_(target, scores_grad.t(), hidden, self.scale, first=self.written == 0)
            self.written = vocabulary

    def results(self) -> tuple[Tensor, ...]:
        """The three gradients; empty where not wanted (a tensor each: outputs of an op may not alias)."""
        if self.weight_grad is not None:
            self.weight_grad[self.written :] = 0  # beyond the shared vocabulary; all, where every token was dropped
        gradients = (self.hidden_grad, self.weight_grad, self.bias_grad)
        dtype = gradient_dtype(self.weight)
        return tuple(self.weight.new_empty(0, dtype=dtype) if grad is None else grad.to(dtype) for grad in gradients)


def _linear_kl(
    student_hidden: Tensor,  # [T, Hs]
    student_weight: Tensor,  # [Vs, Hs]
    student_bias: Tensor | None,  # [Vs]
    teacher_hidden: Tensor | None,  # [T, Ht]
    teacher_weight: Tensor | None,  # [Vt, Ht]
    teacher_bias: Tensor | None,  # [Vt]
    coefficient: Tensor,  # [T] float64
    labels: Tensor | None,  # [T] int64
    student_scale: float,
    teacher_scale: float,
    workspace_bytes: int,
    gradients: list[bool],  # of student_hidden, student_weight, student_bias
    *objective: float,
) -> tuple[Tensor, ...]:
    kd_weight = objective[3]
    dtype = score_dtype(student_hidden)
    vocabulary = student_weight.shape[0]
    if teacher_weight is not None:
        vocabulary = min(vocabulary, teacher_weight.shape[0])
    buffers = 1 if teacher_weight is None or kd_weight == 0 else 2
    rows_at_once = max(1, workspace_bytes // (buffers * vocabulary * dtype.itemsize))
    rows_at_once = min(rows_at_once, max(1, coefficient.shape[0]))
    workspace = student_hidden.new_empty(buffers, rows_at_once, vocabulary, dtype=dtype)

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:vocabulary]

    loss = torch.zeros_like(coefficient)
    total = _Gradients(student_hidden, student_weight, student_bias, student_scale, dtype, gradients)
    for rows in token_chunks(coefficient, coefficient.shape[0], rows_at_once):
        hidden, weights = student_hidden[rows], coefficient[rows]
        if hidden.device.type != "cpu":
            # dropped tokens take part here; what they hold may not reach the weight's gradient, as 0 * NaN
            hidden = hidden.masked_fill((weights == 0).unsqueeze(1), 0)
        count = weights.shape[0]
        student, teacher = workspace[0, :count], None
        _scores_(student, hidden, student_weight[:vocabulary], cut(student_bias), student_scale)
        if buffers == 2:
            assert teacher_hidden is not None and teacher_weight is not None
            teacher = workspace[1, :count]
            _scores_(teacher, teacher_hidden[rows], teacher_weight[:vocabulary], cut(teacher_bias), teacher_scale)
        row_labels = None if labels is None else labels[rows]
        row_loss = torch.empty_like(weights)
        if any(gradients):
            divergence_rows_(student, teacher, weights, row_labels, row_loss, *objective)
            total.add(rows, hidden, student)
        else:
            stats = weights.new_empty(count, STATS)
            divergence_stats(student, teacher, weights, row_labels, row_loss, stats, *objective)
        loss[rows] = row_loss
    return loss, *total.results()


_library.impl("linear_kl", _linear_kl, "CompositeExplicitAutograd")

# ---- autograd.Function ----------------------------------------------------------------------------------------------


class LinearKL(torch.autograd.Function):
    """The summed loss, a 0-d float64 tensor; its gradients are computed in the forward pass.

    Arguments are those of ``torch.ops.fastkd.linear_kl``, without ``gradients``.
    """

    @staticmethod
    def forward(ctx, student_hidden, student_weight, student_bias, *arguments):
        *tensors_and_scales, objective = arguments
        loss, *gradients = torch.ops.fastkd.linear_kl(
            student_hidden,
            student_weight,
            student_bias,
            *tensors_and_scales,
            ctx.needs_input_grad[:3],
            *objective.for_kernel(),
        )
        ctx.save_for_backward(*gradients)
        ctx.dtype, ctx.constants = student_weight.dtype, len(arguments)
        return loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        pairs = zip(ctx.needs_input_grad, ctx.saved_tensors, strict=False)
        gradients = [(saved * grad_loss).to(ctx.dtype) if needed else None for needed, saved in pairs]
        return *gradients, *(None,) * ctx.constants


class LinearKLPerToken(torch.autograd.Function):
    """Losses per token, [T] float64; the backward pass computes logits and gradients from the inputs.

    Arguments are those of ``torch.ops.fastkd.linear_kl``, without ``gradients``.
    """

    @staticmethod
    def forward(ctx, *arguments):
        *inputs, objective = arguments
        ctx.save_for_backward(*inputs[:8])
        ctx.constants = inputs[8:]
        ctx.objective = objective
        return torch.ops.fastkd.linear_kl(*inputs, [False] * 3, *objective.for_kernel())[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor):
        *tensors, coefficient, labels = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        _, *gradients = torch.ops.fastkd.linear_kl(
            *tensors, coefficient * grad_loss, labels, *ctx.constants, needed, *ctx.objective.for_kernel()
        )
        dtype = tensors[1].dtype
        wanted = [gradient.to(dtype) if want else None for want, gradient in zip(needed, gradients, strict=True)]
        return *wanted, *(None,) * (5 + len(ctx.constants) + 1)


# ---- public function ------------------------------------------------------------------------------------------------


def _check_head(model: str, hidden: Any, weight: Any, bias: Any, leading: Any, device: torch.device) -> None:
    """Checks one model's hidden [..., H], weight [V, H] and bias [V]."""
    check_tensor(f"{model}_hidden", hidden, shape=None if leading is None else [*leading, None], floating=True)
    width = hidden.shape[-1] if hidden.dim() else 0
    if width == 0:
        raise ValueError(f"{model}_hidden: expected shape [..., H] with H > 0, got {list(hidden.shape)}")
    check_tensor(f"{model}_weight", weight, shape=[None, width], floating=True)
    if weight.shape[0] == 0:
        raise ValueError(f"{model}_weight: expected shape [V, {width}] with V > 0, got {list(weight.shape)}")
    named = [(f"{model}_hidden", hidden), (f"{model}_weight", weight)]
    if bias is not None:
        check_tensor(f"{model}_bias", bias, shape=[weight.shape[0]], floating=True)
        named.append((f"{model}_bias", bias))
    for name, tensor in named:
        check_same_device(name, tensor, device)
        if tensor.dtype != hidden.dtype:
            raise TypeError(f"{name}: expected dtype {hidden.dtype}, that of {model}_hidden, got {tensor.dtype}")


def linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    workspace_mb: float | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Distillation loss from hidden states and vocabulary heads, without ever holding the logits.

    Equal to :func:`fastkd.logit_kl` on ``student_scale * student_hidden @ student_weight.T + student_bias`` and the
    teacher's logits likewise, with scores in float32 whatever the inputs' dtype (float64 for float64 students).

    Args:
        student_hidden: [..., Hs], the input of the student's head. Receives a gradient.
        student_weight: [Vs, Hs], ``lm_head.weight``, in the dtype of ``student_hidden``. Receives a gradient.
        teacher_hidden, teacher_weight: [..., Ht] with the same leading shape, and [Vt, Ht]; constants. May be None with
            ``kd_weight=0``, which makes this a fused linear cross-entropy.
        student_bias, teacher_bias: [Vs] and [Vt]. The student's receives a gradient.
        student_scale, teacher_scale: multiply the hidden states; T5 v1.0 has ``d_model ** -0.5``.
        workspace_mb: memory for the logits of the tokens in flight, in units of 2**20 bytes; default 128 on CPU, 768 on
            a GPU. At least one token is taken at a time.

    The other arguments, the result and the errors are those of :func:`fastkd.logit_kl`. Under ``torch.autocast`` the
    inputs are cast as ``F.linear`` casts them. With ``reduction="mean"`` or ``"sum"`` the gradients are computed in the
    forward pass and kept until the backward pass; with ``"none"`` the backward pass computes the logits again.
    """
    objective = Objective(divergence, beta, temperature, kd_weight, ce_weight)
    tokens = TokenArguments(weight, labels, ignore_index, reduction, normalizer)
    check_number("student_scale", student_scale, "that is finite", is_finite)
    check_number("teacher_scale", teacher_scale, "that is finite", is_finite)
    if workspace_mb is not None:
        check_number("workspace_mb", workspace_mb, "> 0", lambda x: 0 < x < float("inf"))
    check_tensor("student_hidden", student_hidden, floating=True)
    student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias = autocast_like_linear(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias
    )
    leading, device = student_hidden.shape[:-1], student_hidden.device
    _check_head("student", student_hidden, student_weight, student_bias, None, device)
    vocabulary = student_weight.shape[0]
    if teacher_hidden is not None or teacher_weight is not None:
        _check_head("teacher", teacher_hidden, teacher_weight, teacher_bias, leading, device)
        vocabulary = min(vocabulary, teacher_weight.shape[0])
    elif kd_weight != 0:
        raise ValueError(f"teacher_hidden: expected a tensor because kd_weight is {kd_weight}, got None")
    tokens.check(objective, leading, vocabulary, device)

    if not use_fused(impl, device):
        return reference.linear_kl(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            student_scale=student_scale,
            teacher_scale=teacher_scale,
            **vars(objective),
            **vars(tokens),
        )

    if workspace_mb is None:
        workspace_mb = WORKSPACE_MB[device.type]
    arguments = (
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_weight,
        student_bias,
        None if teacher_hidden is None else teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        None if teacher_weight is None else teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        tokens.coefficients(leading, device),
        tokens.flat_labels(),
        float(student_scale),
        float(teacher_scale),
        int(workspace_mb * 2**20),
    )
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:3])
    if reduction == "none":
        loss = LinearKLPerToken.apply(*arguments, objective).reshape(leading)
    elif differentiated:
        loss = LinearKL.apply(*arguments, objective)
    else:
        loss = torch.ops.fastkd.linear_kl(*arguments, [False] * 3, *objective.for_kernel())[0].sum()
    return loss if student_hidden.dtype == torch.float64 else loss.float()
