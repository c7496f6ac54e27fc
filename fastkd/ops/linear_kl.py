"""linear_kl: the vocabulary projections of both models and the divergence between their logits, in one op.

Tokens are taken in chunks. A chunk's logits go into a workspace that every chunk reuses: two GEMMs fill it, the row
primitive turns student logits into their gradient in place, two GEMMs carry that on to the hidden states and the
weight. The [T, V] logits never exist, and nothing is computed twice: 2 T V (Ht + 3 Hs) FLOPs with gradients,
2 T V (Ht + Hs) without.

A scalar loss fixes every token's coefficient before the pass, so the gradients are made in the forward pass and scaled
by the upstream gradient in the backward pass. Per-token losses do not know theirs: their backward runs the op again.

That is drivers/linear_kl_cpu.py and drivers/linear_kl_gpu.py.

A vocabulary may be spread over the ranks of a process group (vocabulary_shards.py). Each rank multiplies its shards of
the heads, and a chunk's rows are completed by what the ranks gather of them.

T tokens, V vocabulary, Hs and Ht hidden widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from .. import reference
from ..backend import backend_for
from ..checks import Objective, numbers
from ..divergence import Divergence, for_rows
from ..quantized import any_quantized
from ..teachers import TopK
from .autograd import apply, wants_gradient
from .drivers.divergence_rows import METRICS
from .drivers.linear_kl_call import Call, Projection
from .drivers.linear_kl_cpu import on_cpu
from .drivers.linear_kl_gpu import on_gpu
from .drivers.whole_rows import known_labels
from .dtypes import gradient_dtype, score_dtype, without_autocast
from .linear_kl_arguments import Checked, as_head, check_alone, checked, flat, tensors_of
from .linear_kl_functions import BEHIND, LinearKL, LinearKLPerToken
from .metrics import averaged
from .topk_kl import topk_linear_kl
from .vocabulary_shards import (
    NO_SHARD,
    OBJECTIVE,
    SHARD_ARGUMENTS,
    agree,
    group_by_name,
    local_tokens,
    vocabulary_group,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from ..heads import Head
    from .options import LinearOptions

__all__ = ["linear_kl"]

# For the two score buffers of a chunk: enough rows in flight for the GEMMs to run at full speed. On a GPU, in bf16, T
# 8192, V 128256, Hs 4096 take 788 MB for scores of 768 tokens, 134 MB for the hidden states' gradient and a copy of
# them without dropped tokens, and 2.1 GB for the gradients of all scores, which is what accumulating the weight's
# gradient in fp32 would take. At T 1024 the last are 263 MB, and the scores are those of 512 tokens.
WORKSPACE_MB = {"cpu": 128, "cuda": 768}

# ---- schema ---------------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastkd", "FRAGMENT")
_library.define(
    "linear_kl(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? teacher_hidden, "
    "Tensor? teacher_weight, Tensor? teacher_bias, Tensor coefficient, Tensor? labels, Tensor sizes, "
    f"bool[3] gradients, {OBJECTIVE}, {SHARD_ARGUMENTS}, bool metrics=False) "
    "-> (Tensor loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor metrics)"
)

# ---- fake -----------------------------------------------------------------------------------------------------------


def _metrics(coefficient, wanted):
    """[T, 6] zeros, or empty where they are not asked for."""
    return coefficient.new_zeros(coefficient.shape[0] if wanted else 0, METRICS)


def _outputs(student_hidden, student_weight, student_bias, coefficient, gradients, metrics):
    """Loss, gradients and metrics, unwritten; what is not asked for is empty."""
    wanted = zip(gradients, (student_hidden, student_weight, student_bias), strict=True)
    dtype = gradient_dtype(student_weight)
    shapes = [x.shape if want and x is not None else (0,) for want, x in wanted]
    made = (student_hidden.new_empty(shape, dtype=dtype) for shape in shapes)
    return torch.empty_like(coefficient), *made, _metrics(coefficient, metrics)


@torch.library.register_fake("fastkd::linear_kl", lib=_library)
def _(
    student_hidden, student_weight, student_bias, th, tw, tb, coefficient, labels, sizes, gradients, divergence,
    numbers, group="", widest=0, metrics=False,
):  # fmt: skip
    return _outputs(student_hidden, student_weight, student_bias, coefficient, gradients, metrics)


# ---- forward, with the gradients ------------------------------------------------------------------------------------


@without_autocast
def _linear_kl(
    student_hidden: Tensor,  # [T, Hs]
    student_weight: Any,  # [Vs, Hs], a tensor or a QuantizedWeight
    student_bias: Tensor | None,  # [Vs]
    teacher_hidden: Tensor | None,  # [T, Ht]
    teacher_weight: Any,  # [Vt, Ht], likewise, or None
    teacher_bias: Tensor | None,  # [Vt]
    coefficient: Tensor,  # [T] float64
    labels: Tensor | None,  # [T] int64
    sizes: Tensor,  # [5]: student_scale, teacher_scale, student_softcap, teacher_softcap (0: none), workspace_mb
    gradients: list[bool],  # of student_hidden, student_weight, student_bias
    divergence: int,
    numbers: Tensor,  # [4]: beta, temperature, kd_weight, ce_weight; and a mix's weights
    vocab_group: str = "",
    widest_shard: int = 0,
    metrics: bool = False,
) -> tuple[Tensor, ...]:
    student_scale, teacher_scale, student_softcap, teacher_softcap, workspace_mb = sizes.tolist()
    workspace_bytes, objective = int(workspace_mb * 2**20), for_rows(divergence, numbers)
    if any_quantized((student_weight, teacher_weight)):
        workspace_bytes -= workspace_bytes // 9  # for a block of rows, and what it is made of, beside the scores
    *_, kd_weight, ce_weight = objective
    group = group_by_name(vocab_group)
    student = Projection(student_hidden, student_weight, student_bias, student_scale, student_softcap or None)
    teacher = None
    columns = vocabulary = student_weight.shape[0]
    if teacher_weight is not None and kd_weight != 0:
        assert teacher_hidden is not None
        teacher = Projection(teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap or None)
        vocabulary = min(vocabulary, teacher_weight.shape[0])
    if ce_weight == 0 or labels is None:
        columns, labels = vocabulary, None
    elif columns > vocabulary and group is None:
        labels = known_labels(labels, columns)
    widest = columns if group is None else widest_shard
    told = _metrics(coefficient, metrics)
    call = Call(
        student, teacher, vocabulary, columns, coefficient, labels, workspace_bytes, gradients, group, widest,
        told if metrics else None,
    )  # fmt: skip
    if backend_for(student_hidden.device)[0] == "cpp":
        return *on_cpu(call, *objective), told
    if coefficient.shape[0] == 0:
        outputs = _outputs(student_hidden, student_weight, student_bias, coefficient, gradients, metrics)
        return tuple(x.zero_() for x in outputs)
    return *on_gpu(call, *objective), told


_library.impl("linear_kl", _linear_kl, "CompositeExplicitAutograd")

BEHIND["linear_kl"] = _linear_kl

# ---- autograd.Function: linear_kl_functions.py -----------------------------------------------------------------------

# ---- public function ------------------------------------------------------------------------------------------------


@overload
def linear_kl(
    student_hidden: Tensor, student_weight: Tensor | Head,
    teacher_hidden: Tensor | TopK | None, teacher_weight: Tensor | Head | None = ...,
    *, return_metrics: Literal[False] = ..., **options: Unpack[LinearOptions],
) -> Tensor: ...  # fmt: skip
@overload
def linear_kl(
    student_hidden: Tensor, student_weight: Tensor | Head,
    teacher_hidden: Tensor | TopK | None, teacher_weight: Tensor | Head | None = ...,
    *, return_metrics: Literal[True], **options: Unpack[LinearOptions],
) -> tuple[Tensor, dict[str, Tensor]]: ...  # fmt: skip
@overload
def linear_kl(
    student_hidden: Tensor, student_weight: Tensor | Head,
    teacher_hidden: Tensor | TopK | None, teacher_weight: Tensor | Head | None = ...,
    *, return_metrics: bool, **options: Unpack[LinearOptions],
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...  # fmt: skip
def linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor | Head,
    teacher_hidden: Tensor | TopK | None,
    teacher_weight: Tensor | Head | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    workspace_mb: float | None = None,
    divergence: Divergence | Mapping[Divergence, float] = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    kd_weight: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    vocab_group: ProcessGroup | None = None,
    return_metrics: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Distillation loss from hidden states and vocabulary heads, without ever holding the logits.

    Equal to ``fastkd.logit_kl`` on ``student_scale * student_hidden @ student_weight.T + student_bias`` and the
    teacher's logits likewise, both capped where a softcap is given, with scores in float32 whatever the inputs' dtype
    (float64 for float64 students).

    Args:
        student_hidden: [..., Hs], the input of the student's head. Receives a gradient.
        student_weight: [Vs, Hs], ``lm_head.weight``, in the dtype of ``student_hidden``. Receives a gradient.
        teacher_hidden, teacher_weight: [..., Ht] with the same leading shape, and [Vt, Ht]; constants. May be None with
            ``kd_weight=0``, which makes this a fused linear cross-entropy. A weight may be a ``fastkd.Head``; bias,
            scale and softcap are its own then, and not given beside it. One that is a ``fastkd.QuantizedWeight`` is
            never there as a whole, and a constant. In place of both of the teacher's, a ``fastkd.TopK`` is a teacher of
            which some log-probabilities [..., K] are known, and has no bias, scale or softcap; its student is not
            quantised.
        student_bias, teacher_bias: [Vs] and [Vt]. The student's receives a gradient.
        student_scale, teacher_scale: multiply the hidden states; T5 v1.0 has ``d_model ** -0.5``.
        student_softcap, teacher_softcap: make logits z ``softcap * tanh(z / softcap)``, as Gemma 2 does; None: not.
        workspace_mb: memory for the logits of the tokens in flight, in units of 2**20 bytes; default 128 on CPU, 768 on
            a GPU. At least one token is taken at a time. On a GPU the gradients of 16-bit logits are held for all
            tokens, beside it, where that takes no more than summing up the weight's gradient in float32 would. With a
            ``TopK`` the default is half of it.
        vocab_group: a ``torch.distributed`` process group over whose ranks the vocabulary is spread, of which
            ``student_weight``, ``teacher_weight`` and the biases are this rank's shards: contiguous, in the order of
            ranks, of any size, 0 included, and the same columns of both models as far as both have them. All other
            arguments are the same on all ranks, and labels count in the whole vocabulary. Every rank returns the loss
            of the whole vocabulary and, for ``student_hidden``, its gradient, summed up over the ranks already; those
            of ``student_weight`` and ``student_bias`` are of the shard. Heads that are DTensors, ``Shard(0)`` over a
            one-dimensional mesh, need no ``vocab_group``, and get gradients that are DTensors; what else is a DTensor
            has to be ``Replicate()``. A head that FSDP has sharded, over ranks of different data, is gathered by
            ``fastkd.head`` instead, which averages its gradient over them; a bare ``.full_tensor()`` does not.

    With ``vocab_group`` every rank of the group has to make the call, and its backward pass, in the same grad mode. It
    sends 56 bytes for every token that is not dropped, 24 more for divergences other than forward and reverse KL, 48
    more for metrics, and ``4 * Hs`` for every token (``8 * Hs`` in float64) where ``student_hidden`` needs a gradient;
    with ``reduction="none"`` the backward pass sends all but metrics again. An error on one rank is an error on all,
    for which the ranks exchange a hundred bytes first: on a GPU that waits for the device, so that such a call is no
    part of a CUDA graph, and ``torch.compile`` breaks its graph there.

    The other arguments, the result and the errors are those of ``fastkd.logit_kl``. Under ``torch.autocast`` the
    inputs are cast as ``F.linear`` casts them. With ``reduction="mean"`` or ``"sum"`` the gradients are computed in the
    forward pass and kept until the backward pass; with ``"none"`` the backward pass computes the logits again. On a GPU
    float32 inputs are multiplied as torch is set to: in TF32 only where ``torch.backends.cuda.matmul`` allows it.
    """
    student = as_head("student", student_weight, student_bias, student_scale, student_softcap)
    if isinstance(teacher_hidden, TopK):
        check_alone(teacher_weight, teacher_bias, teacher_scale, teacher_softcap)
        return topk_linear_kl(
            student_hidden, student, teacher_hidden, workspace_mb=workspace_mb, divergence=divergence, beta=beta,
            temperature=temperature, weight=weight, labels=labels, ce_weight=ce_weight, kd_weight=kd_weight,
            ignore_index=ignore_index, reduction=reduction, normalizer=normalizer, vocab_group=vocab_group,
            return_metrics=return_metrics, impl=impl,
        )  # fmt: skip
    teacher = as_head("teacher", teacher_weight, teacher_bias, teacher_scale, teacher_softcap)
    group = vocabulary_group(vocab_group, tensors_of(student, teacher), 0)

    def check() -> Checked:
        objective = Objective(divergence, beta, temperature, kd_weight, ce_weight)
        objective.check_teacher("teacher_hidden", teacher_hidden if teacher.weight is None else teacher.weight)
        tokens = local_tokens(weight, labels, normalizer, ignore_index, reduction)
        hidden = {"student_hidden": student_hidden, "teacher_hidden": teacher_hidden}
        return checked(hidden, student, teacher, group, objective, tokens, workspace_mb, return_metrics, impl)

    (inputs, objective, tokens, fused, keywords), shard = agree(group, check, Checked.facts)
    workspace, _ = keywords.pop("workspace_mb"), keywords.pop("return_metrics")

    leading, device = inputs.student_hidden.shape[:-1], inputs.student_hidden.device
    if not fused:
        metrics: dict[str, Tensor] | None = {} if return_metrics else None
        options = {**keywords, **vars(objective), **vars(tokens)}
        loss = reference.linear_kl(**inputs._asdict(), shard=shard, metrics=metrics, **options)
        return loss if metrics is None else (loss, metrics)

    workspace = WORKSPACE_MB[device.type] if workspace is None else workspace
    flat_labels = tokens.flat_labels()
    wanted = tuple(wants_gradient(x) for x in inputs[:3])
    arguments = (
        *inputs._replace(student_hidden=flat(inputs.student_hidden), teacher_hidden=flat(inputs.teacher_hidden)),
        tokens.coefficients(leading, device),
        flat_labels if shard is None or flat_labels is None else shard.local_columns(flat_labels),
        numbers(*(0.0 if x is None else x for x in keywords.values()), workspace),
        wanted,
        *((*objective.for_op(), *NO_SHARD) if shard is None else shard.for_op()),
        return_metrics,
    )
    loss, *_, rows = apply(LinearKLPerToken if reduction == "none" else LinearKL, *arguments)
    dtype = score_dtype(inputs.student_hidden)
    loss = (loss.reshape(leading) if reduction == "none" else loss).to(dtype)
    return (loss, averaged(rows, tokens.weights(leading, device), objective, dtype)) if return_metrics else loss
