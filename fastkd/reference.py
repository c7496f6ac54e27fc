"""The specification: every op in plain torch, differentiated by autograd, in fp32 (fp64 for fp64 students).

Nothing here is fused or saves memory; everything here is meant to be read. ``impl="reference"`` calls these functions,
and the tests compare every other implementation with them in fp64. Arguments are those of the public functions, which
have checked them.

T tokens (any leading shape), V vocabulary, H hidden; B batch, L length, A heads, d head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import GatheredColumns, ReplicatedInput
from .divergence import weighted
from .relative_bias import RelativeBias
from .teachers import TopK

if TYPE_CHECKING:
    from .ops.vocabulary_shards import VocabularyShard
    from .quantized import QuantizedWeight

__all__ = ["attention_kl", "cka_loss", "linear_kl", "logit_kl", "relation_kl"]


def _token_weights(x: Tensor, weight: Tensor | None, labels: Tensor | None, ignore_index: int) -> Tensor:
    """Every token's weight [T...], 0 where it is dropped, for tensors x [T..., *] in x's dtype."""
    weight = x.new_ones(x.shape[:-1]) if weight is None else weight.detach().to(x.dtype)
    return weight if labels is None else weight.masked_fill(labels.long() == ignore_index, 0)


def _shared(scores: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(log q, log p) [T..., V] over the columns that both models have, and which rows have no distribution [T...]"""
    vocabulary = min(scores.shape[-1], target.shape[-1])
    shared, target = scores[..., :vocabulary], target[..., :vocabulary]
    # a row of nothing but -inf counts as masked
    empty = (shared == -torch.inf).all(-1) | (target == -torch.inf).all(-1)  # [T...]
    log_q, log_p = (
        F.log_softmax(x.masked_fill(empty.unsqueeze(-1), 0) / temperature, -1) for x in (shared, target)
    )  # [T..., V]
    return log_q, log_p, empty


def _categories(
    scores: Tensor,  # [T..., V]
    teacher: TopK,  # [T..., K]
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log q, log p) [T..., K + 1], of the teacher's ids and of the tail that all other columns are, and as above.

    With the tail "conditional" [T..., K], of the ids alone.
    """
    vocabulary, leading = scores.shape[-1], scores.shape[:-1]
    ids, log_p, log_tail = teacher.for_op(temperature, vocabulary)
    ids, log_p = ids.reshape(*leading, -1), log_p.reshape(*leading, -1)  # [T..., K]
    padding = ids < 0
    given = scores.gather(-1, ids.clamp_min(0)).masked_fill(padding, -torch.inf) / temperature  # [T..., K]
    if teacher.tail != "conditional":
        aside = torch.zeros(*leading, vocabulary + 1, dtype=torch.bool, device=scores.device)
        aside = aside.scatter(-1, ids.masked_fill(padding, vocabulary), True)[..., :vocabulary]
        others = scores.masked_fill(aside, -torch.inf) / temperature
        nothing = (others == -torch.inf).all(-1)  # [T...]: then the tail is no category
        tail = others.masked_fill(nothing.unsqueeze(-1), 0).logsumexp(-1).masked_fill(nothing, -torch.inf)
        given = torch.cat([given, tail.unsqueeze(-1)], -1)
        if teacher.tail == "bucket":
            log_tail = log_tail.reshape(leading)
            of_ids = log_p.logsumexp(-1).masked_fill(~nothing | padding.all(-1), 0)
            log_p = log_p - of_ids.unsqueeze(-1)
            log_tail = log_tail.masked_fill(nothing, -torch.inf)
        else:
            log_tail = torch.full_like(log_p[..., 0], -torch.inf)
        log_p = torch.cat([log_p, log_tail.unsqueeze(-1)], -1)
    empty = (given == -torch.inf).all(-1) | (log_p == -torch.inf).all(-1)
    log_q = F.log_softmax(given.masked_fill(empty.unsqueeze(-1), 0), -1)
    return log_q, log_p.masked_fill(empty.unsqueeze(-1), 0).to(scores.dtype), empty


def _of_top(
    scores: Tensor,  # [T..., V]
    teacher: TopK,  # [T..., K]
    temperature: float,
    log_q: Tensor,  # [T..., K + 1]
    empty: Tensor,  # [T...]
) -> dict[str, Tensor]:
    """The metrics [T...] that only such a teacher has, and agreement, which is with its likeliest id."""
    ids, log_p, log_tail = teacher.for_op(temperature, scores.shape[-1])
    ids, log_p, log_tail = (x.reshape(*scores.shape[:-1], *x.shape[1:]) for x in (ids, log_p, log_tail))
    given = scores.gather(-1, ids.clamp_min(0)).masked_fill(ids < 0, -torch.inf)  # [T..., K]
    at_first = given.gather(-1, log_p.argmax(-1, keepdim=True)).squeeze(-1)
    highest = (given if teacher.tail == "conditional" else scores).amax(-1)
    told = {"agreement": ((at_first >= highest) & ~empty).to(scores.dtype)}
    if teacher.tail != "conditional":
        told["student_mass"] = log_q[..., :-1].exp().sum(-1).masked_fill(empty, 0)
    return told | {"teacher_mass": (-log_tail.expm1()).to(scores.dtype)}


def _mean(x: Tensor, denominator: Tensor, nothing: Tensor) -> Tensor:
    """x [T...] summed up and divided, 0-d; 0 where nothing is left to average."""
    return torch.where(nothing, 0, x.sum() / torch.where(nothing, 1, denominator))


def logit_kl(
    student_logits: Tensor,  # [T..., Vs]
    teacher_logits: Tensor | TopK | None,  # [T..., Vt]
    *,
    divergence: str | Mapping[str, float],
    beta: float,
    temperature: float,
    weight: Tensor | None,  # [T...]
    labels: Tensor | None,  # [T...]
    ce_weight: float,
    kd_weight: float,
    ignore_index: int,
    reduction: str,
    normalizer: float | Tensor | None,
    shard: VocabularyShard | None = None,  # whose columns the logits are
    metrics: dict[str, Tensor] | None = None,  # filled where it is given
) -> Tensor:
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    with torch.autocast(student_logits.device.type, enabled=False):
        scores = student_logits.to(dtype)
        if shard is not None:
            scores = GatheredColumns.apply(scores, shard.student_columns, shard.group)
            if isinstance(teacher_logits, Tensor):
                teacher_logits = GatheredColumns.apply(teacher_logits.detach(), shard.teacher_columns, shard.group)
        weight = _token_weights(scores, weight, labels, ignore_index)  # [T...]
        dropped = (weight == 0).unsqueeze(-1)
        scores = scores.masked_fill(dropped, 0)  # whatever a dropped token holds, NaN included, it counts for nothing

        loss = scores[..., :0].sum(-1)  # [T...] of 0, which depends on the student also where no term does
        told: dict[str, Tensor] = {}  # [T...] each
        if teacher_logits is not None and kd_weight != 0:
            if isinstance(teacher_logits, TopK):
                log_q, log_p, empty = _categories(scores, teacher_logits, temperature)
            else:
                target = teacher_logits.detach().to(dtype).masked_fill(dropped, 0)
                log_q, log_p, empty = _shared(scores, target, temperature)
            log_q, log_p = log_q.masked_fill(dropped, 0), log_p.masked_fill(dropped, 0)
            divergences = weighted(divergence, log_p, log_q, beta).masked_fill(empty, 0)
            # one by one: torch.compile keeps numbers free
            told["kd"] = divergences * temperature * temperature
            loss = told["kd"] * kd_weight
        if labels is not None and ce_weight != 0:
            index = labels.long().masked_fill(dropped.squeeze(-1), 0).unsqueeze(-1)
            told["ce"] = -F.log_softmax(scores, -1).gather(-1, index).squeeze(-1)
            loss = loss + ce_weight * told["ce"]
        if metrics is not None:
            if "kd" in told:
                told["student_entropy"] = torch.special.entr(log_q.exp()).sum(-1).masked_fill(empty, 0)
                told["teacher_entropy"] = torch.special.entr(log_p.exp()).sum(-1).masked_fill(empty, 0)
                if isinstance(teacher_logits, TopK):
                    told |= _of_top(scores, teacher_logits, temperature, log_q, empty)
                    told["teacher_mass"] = told["teacher_mass"].masked_fill(dropped.squeeze(-1), 0)
                else:
                    told["agreement"] = ((log_q.argmax(-1) == log_p.argmax(-1)) & ~empty).to(dtype)
            kept = weight if normalizer is None else torch.where(weight.new_ones(()) * normalizer == 0, 0, weight)
            for name, x in told.items():  # whatever the reduction is
                metrics[name] = _mean(x.detach() * kept, kept.sum(), (kept == 0).all())

        loss = loss * weight
        if reduction == "none":
            return loss
        if reduction == "sum":
            return loss.sum()
        if normalizer is None:
            return _mean(loss, weight.sum(), dropped.all())
        denominator = normalizer.detach().to(loss) if isinstance(normalizer, Tensor) else loss.new_ones(()) * normalizer
        return _mean(loss, denominator, denominator == 0)


def linear_kl(
    student_hidden: Tensor,  # [T..., Hs]
    student_weight: Tensor | QuantizedWeight,  # [Vs, Hs]
    teacher_hidden: Tensor | TopK | None,  # [T..., Ht]
    teacher_weight: Tensor | QuantizedWeight | None,  # [Vt, Ht]
    *,
    student_bias: Tensor | None,  # [Vs]
    teacher_bias: Tensor | None,  # [Vt]
    student_scale: float,
    teacher_scale: float,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    shard: VocabularyShard | None = None,  # whose columns the heads make
    **options,
) -> Tensor:
    dtype = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32

    def logits(hidden: Tensor, weight: Any, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
        z = F.linear(scale * hidden.to(dtype), weight[:].to(dtype), None if bias is None else bias.to(dtype))
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    with torch.autocast(student_hidden.device.type, enabled=False):
        # what a dropped token holds, NaN included, counts for nothing, in the weight's gradient too
        kept = (
            _token_weights(student_hidden.to(dtype), options["weight"], options["labels"], options["ignore_index"]) != 0
        )
        student_hidden = student_hidden.masked_fill(~kept.unsqueeze(-1), 0)
        if shard is not None:
            student_hidden = ReplicatedInput.apply(student_hidden.to(dtype), shard.group)
        student_logits = logits(student_hidden, student_weight, student_bias, student_scale, student_softcap)
        teacher_logits: Tensor | TopK | None = teacher_hidden if isinstance(teacher_hidden, TopK) else None
        if isinstance(teacher_hidden, Tensor) and teacher_weight is not None:
            with torch.no_grad():
                teacher_logits = logits(teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap)
        return logit_kl(student_logits, teacher_logits, shard=shard, **options)


def _attention_scores(
    q: Tensor,  # [B, Lq, H]
    k: Tensor,  # [B, Lk, H], or narrower: with fewer heads, each for as many neighbouring heads of queries
    num_heads: int,
    scale: float,
    bias: Tensor | RelativeBias | None,  # broadcasts to [B, A, Lq, Lk]
) -> Tensor:  # [B, A, Lq, Lk]
    group = max(1, q.shape[-1] // max(1, k.shape[-1]))
    k = k.unflatten(-1, (num_heads // group, 1, -1)).expand(-1, -1, -1, group, -1).flatten(2, 4)  # [B, Lk, H]
    q, k = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k))  # [B, A, L, d]
    scores = scale * q @ k.transpose(-1, -2)
    if isinstance(bias, RelativeBias):
        bias = bias.to(scores.dtype).matrix(q.shape[-2], k.shape[-2])
    return scores if bias is None else scores + bias.to(scores.dtype)


def attention_kl(
    student_q: Tensor,  # [B, Lq, Hs]
    student_k: Tensor,  # [B, Lk, Hs], or narrower, see _attention_scores
    teacher_q: Tensor,  # [B, Lq, Ht]
    teacher_k: Tensor,  # [B, Lk, Ht]
    *,
    num_heads: int,
    student_scale: float,
    teacher_scale: float,
    student_bias: Tensor | RelativeBias | None,
    teacher_bias: Tensor | RelativeBias | None,
    key_mask: Tensor | None,  # [B, Lk] bool
    query_mask: Tensor | None,  # [B, Lq] bool
    causal: bool,
    divergence: str | Mapping[str, float],
    beta: float,
    reduction: str,
    normalizer: float | Tensor | None,
) -> Tensor:
    dtype = torch.float64 if student_q.dtype == torch.float64 else torch.float32
    queries, keys = student_q.shape[1], student_k.shape[1]
    allowed = torch.ones(student_q.shape[0], 1, queries, keys, dtype=torch.bool, device=student_q.device)
    if causal:
        allowed = allowed.tril()
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
    valid = allowed.any(-1)  # [B, 1, Lq]
    if query_mask is not None:
        valid = valid & query_mask[:, None, :]

    def kept(x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, L, H] in the scores' dtype, with 0 for whatever masked positions hold."""
        return x.to(dtype) if mask is None else x.to(dtype).masked_fill(~mask.unsqueeze(-1), 0)

    with torch.autocast(student_q.device.type, enabled=False):
        student_q, student_k = kept(student_q, query_mask), kept(student_k, key_mask)
        student = _attention_scores(student_q, student_k, num_heads, student_scale, student_bias)
        with torch.no_grad():
            teacher_q, teacher_k = kept(teacher_q, query_mask), kept(teacher_k, key_mask)
            teacher = _attention_scores(teacher_q, teacher_k, num_heads, teacher_scale, teacher_bias)
        return logit_kl(
            student.masked_fill(~allowed, -torch.inf),
            teacher.masked_fill(~allowed, -torch.inf),
            divergence=divergence,
            beta=beta,
            temperature=1.0,
            weight=valid.expand(-1, num_heads, -1).to(dtype),
            labels=None,
            ce_weight=0.0,
            kd_weight=1.0,
            ignore_index=-100,
            reduction=reduction,
            normalizer=None if normalizer is None else normalizer * num_heads,  # the mean is over heads, too
        )


def relation_kl(
    student: list[Tensor],  # [B, L, Hs] each
    teacher: list[Tensor],  # [B, L, Ht] each
    *,
    num_heads: int,
    key_mask: list[Tensor | None],  # [B, L] bool each
    causal: list[bool],
    divergence: str | Mapping[str, float],
    beta: float,
    reduction: str,
    normalizer: list[float | Tensor | None],
) -> list[Tensor]:
    """The loss of every entry."""
    return [
        attention_kl(
            s,
            s,
            t,
            t,
            num_heads=num_heads,
            student_scale=(s.shape[-1] // num_heads) ** -0.5,
            teacher_scale=(t.shape[-1] // num_heads) ** -0.5,
            student_bias=None,
            teacher_bias=None,
            key_mask=mask,
            query_mask=mask,
            causal=is_causal,
            divergence=divergence,
            beta=beta,
            reduction=reduction,
            normalizer=rows,
        )
        for s, t, mask, is_causal, rows in zip(student, teacher, key_mask, causal, normalizer, strict=True)
    ]


LEAST_TOKENS = 4
"""Fewer have no debiased CKA: without diagonals and means nothing is left of a Gram."""
CONSTANT = 64
"""In roundings of a Gram: hidden states count as constant where U-centring leaves no more."""
ROOT = 1e-4
"""Where the signed root of a debiased CKA goes over into a line, as the root's slope at 0 is infinite."""


def _u_centred(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram [N, N] of centred x [N, d] without its diagonal, less the means of what is left; and if that is nothing.

    The inner product of two such Grams is HSIC_1 (Song et al., 2012) times n (n - 3): Székely and Rizzo, 2014.
    """
    n = valid.sum()
    pairs = valid & valid.unsqueeze(1) & ~torch.eye(x.shape[0], dtype=torch.bool, device=x.device)
    gram = x @ x.T
    rows = gram.masked_fill(~pairs, 0).sum(1) / (n - 2).clamp_min(1)
    centred = (gram - rows - rows.unsqueeze(1) + rows.sum() / (n - 1).clamp_min(1)).masked_fill(~pairs, 0)
    left, whole = (torch.linalg.matrix_norm(g.detach()) for g in (centred, gram))
    return centred, left <= CONSTANT * torch.finfo(x.dtype).eps * whole


def _debiased_loss(a: Tensor, b: Tensor, valid: Tensor, eps: float, squared: bool) -> Tensor:
    """1 - debiased CKA, or its signed root, of centred a [N, ds] and b [N, dt]"""
    (k, k_is_constant), (m, m_is_constant) = (_u_centred(h, valid) for h in (a, b))
    scale = (torch.linalg.matrix_norm(gram.double()) + eps for gram in (k, m))
    cka = (k * m).sum(dtype=torch.float64) / (next(scale) * next(scale))
    cka = cka.masked_fill(k_is_constant | m_is_constant, 0)
    return 1 - (cka if squared else cka * (cka.square() + ROOT**2) ** -0.25)


def _centred(x: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """x [N, d] less its mean over the valid tokens, and 0 for the others, whatever they hold.

    Means are taken in fp64 and from the first valid token on: tokens that are all the same become exactly 0, which has
    a zero gradient, and not rounding errors, which have a large one.
    """
    dropped = ~valid.unsqueeze(1)
    x = x.double().masked_fill(dropped, 0)
    if x.shape[0]:
        x = (x - x.detach()[valid.int().argmax(keepdim=True)]).masked_fill(dropped, 0)
    return (x - x.sum(0) / valid.sum().clamp_min(1)).masked_fill(dropped, 0).to(dtype)


def cka_loss(
    student: list[Tensor],  # [N..., ds] each
    teacher: list[Tensor],  # [N..., dt] each
    *,
    mask: list[Tensor | None],  # [N...] bool each
    eps: float,
    squared: bool,
    debiased: bool = False,
) -> list[Tensor]:
    """The loss of every pair."""
    losses = []
    for x, t, kept in zip(student, teacher, mask, strict=True):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        valid = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if kept is None else kept
        valid = valid.reshape(-1)
        with torch.autocast(x.device.type, enabled=False):
            a, b = (_centred(h.reshape(-1, h.shape[-1]), valid, dtype) for h in (x, t.detach()))
            if debiased:
                loss = _debiased_loss(a, b, valid, eps, squared)
                losses.append(loss.masked_fill(valid.sum() < LEAST_TOKENS, 0).to(dtype))
                continue
            # norms in fp64: near convergence the loss is what two of them differ by
            cross = torch.linalg.matrix_norm((b.T @ a).double())
            scale = (torch.linalg.matrix_norm((h.T @ h).double()) + eps for h in (a, b))
            cka = cross / (next(scale) * next(scale)).sqrt()
            loss = 1 - (cka.square() if squared else cka)
            losses.append(loss.masked_fill(valid.sum() < 2, 0).to(dtype))
    return losses
