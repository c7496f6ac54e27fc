"""The losses of the distillation methods' terms (see `methods`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

import fastkd

from ..common.family import PLACES
from .methods import SAME_SHAPE_TERMS, Method
from .mixup import Mixup

Head = tuple[torch.Tensor, torch.Tensor]  # what a head is given, [B, L, H], and its weight [V, H]


def vocabulary_loss(
    method: Method, student: Head, teacher: Head | None, labels: torch.Tensor | None, **options: Any
) -> torch.Tensor:
    """Return the scalar loss of a method's vocabulary terms without materialising any [tokens, V] logits.

    labels: [B, L] with -100 where nothing is to be predicted. options: weight, normalizer and workspace_mb of
    `fastkd.linear_kl`.
    """
    return fastkd.linear_kl(
        *student,
        *(teacher or (None, None)),
        labels=labels,
        ce_weight=method.terms.get("ce", 0.0),
        kd_weight=method.terms.get("logit_kl", 0.0),
        divergence=method.divergence,
        beta=method.divergence_beta,
        temperature=method.temperature,
        **options,
    )


def relation_loss(
    method: Method,
    place: str,
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    masks: Mapping[str, torch.Tensor],
    rows: Mapping[str, torch.Tensor | float],
) -> torch.Tensor:
    """Return the scalar loss of a method's relation term at `place` (MiniLMv2, Wang et al., 2021, arXiv 2012.15828).

    For each of Q, K and V: R = softmax(X X^T / sqrt(d_r) + mask) in each relation head, d_r wide, then the divergence
    of the teacher's R and the student's, averaged over valid rows and heads; then the mean of the three, times the
    term's weight. Padding is masked everywhere, later positions in decoder self-attention.
    Assumptions, where MiniEnD says nothing: no relative-position bias and the scale 1/sqrt(d_r), although T5's own
    attention has the one and not the other; in cross-attention, Q-Q relations are over decoder positions, without a
    causal mask, and K-K and V-V relations over encoder positions.

    student, teacher: [q, k, v], each [B, L, H], of widths of their own. masks: of each side, "encoder" and "decoder",
    [B, L], nonzero where it is valid. rows: what the sum over each side's rows is divided by.
    """
    where = PLACES[place]
    loss = fastkd.relation_kl(
        list(student),
        list(teacher),
        num_heads=method.relation_heads,
        key_mask=[masks[side] for side in where.sides],
        causal=where.causal,
        divergence=method.divergence,
        beta=method.divergence_beta,
        normalizer=[rows[side] for side in where.sides],
    )
    assert isinstance(loss, torch.Tensor)  # only reduction="none" returns several
    return method.terms[place] * loss


def hidden_masks(masks: Mapping[str, torch.Tensor], match_first_position: bool) -> dict[str, torch.Tensor]:
    """Return which positions of each stack a hidden-state term compares, [B, L] booleans.

    masks: of each side, "encoder" and "decoder", [B, L], nonzero where there is no padding. In the decoder, what counts
    is the input, which is the targets shifted by one, as in HSM: a position that reads a text's last token is compared,
    and the first, which reads the start token, only if `match_first_position` says so.
    """
    valid = masks["decoder"].bool()
    decoder = valid.roll(1, -1)
    decoder[:, 0] = valid[:, 0] & match_first_position
    return {"encoder": masks["encoder"].bool(), "decoder": decoder}


def hidden_loss(
    method: Method,
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    group: torch.distributed.ProcessGroup | None = None,
) -> torch.Tensor:
    """Return the scalar loss of a method's hidden-state term.

    "hidden_cka": `fastkd.cka_loss`, over the valid positions of the whole batch at once, summed over the pairs (HSM,
    Dasgupta and Cohn, ICLR 2025). "hidden_linear": the squared error, averaged over the teacher's width and the valid
    positions, summed over the pairs; the student's states are projected already. "hidden_mse": likewise, without a
    projection, but averaged over the pairs (MiniDisc, Zhang et al., 2024). "hidden_pkd": that of the states divided by
    their L2 norms (PKD, Sun et al., 2019, arXiv 1908.09355).
    student, teacher: [B, L, H], of widths of their own only for "hidden_cka". masks: [B, L] booleans, one per pair.
    group: processes over whose batches the CKA is computed at once; see `fastkd.cka_loss` for the gradients then.
    """
    (term,) = method.hidden_terms
    if term == "hidden_cka":
        return method.terms[term] * fastkd.cka_loss(list(student), list(teacher), mask=list(masks), group=group)
    if term == "hidden_pkd":
        student, teacher = ([normalize(state.float(), dim=-1) for state in side] for side in (student, teacher))
    losses = [
        (s.float() - t.float()).square().mean(-1).masked_fill(~mask, 0).sum() / mask.sum().clamp_min(1)
        for s, t, mask in zip(student, teacher, masks, strict=True)
    ]
    total = torch.stack(losses).sum()
    return method.terms[term] * (total / len(losses) if term in SAME_SHAPE_TERMS else total)


def mixup_loss(
    method: Method,
    term: str,
    student: Head,
    teacher: Head | None,
    labels: torch.Tensor,
    mixup: Mixup,
    normalizer: torch.Tensor | float,
    workspace_mb: float | None,
) -> torch.Tensor:
    """Return the scalar loss of a method's term on mixed examples (MixKD, Liang et al., ICLR 2021, arXiv 2011.00593).

    "mixup_ce" (SM): lam * cross-entropy with the targets of one example of the pair + (1 - lam) * with the other's.
    "mixup_kd" (TMKD): the mean squared difference of all logits of teacher and student, or the method's divergence of
    their softmaxes, averaged over the positions that are valid in either example.
    student, teacher: of the mixed examples; labels [B, L]: of the unmixed ones. normalizer: what sums over target
    tokens are divided by.
    """
    valid, weight = labels != -100, method.terms[term]
    if term == "mixup_ce":
        plain = replace(method, terms={"ce": weight})
        lam = mixup.lam.view(-1, 1).expand(labels.shape)
        common: dict[str, Any] = {"normalizer": normalizer, "workspace_mb": workspace_mb}
        ours = vocabulary_loss(plain, student, None, labels, weight=lam, **common)
        return ours + vocabulary_loss(plain, student, None, labels[mixup.partner], weight=1 - lam, **common)
    union = mixup.union(valid)
    rows = union.sum() * normalizer / valid.sum().clamp_min(1)  # of the whole batch, of which this may be a part
    if method.mixup_distance == "divergence":
        plain = replace(method, terms={"logit_kl": weight})
        options = {"weight": union.float(), "normalizer": rows, "workspace_mb": workspace_mb}
        return vocabulary_loss(plain, student, teacher, None, **options)
    assert teacher is not None
    (ours, our_weight), (theirs, their_weight) = student, teacher
    errors = _logit_errors((ours[union], our_weight), (theirs[union], their_weight), workspace_mb)
    return weight * errors.sum() / rows


def _logit_errors(student: Head, teacher: Head, workspace_mb: float | None) -> torch.Tensor:
    """Return each token's mean squared difference of logits [N], over the vocabulary that both models have.

    The heads are given [N, H]. Logits exist for a chunk of tokens at a time, in workspace_mb (128 without), and are
    computed again in the backward pass.
    """
    vocabulary = min(len(weight) for _, weight in (student, teacher))
    tokens = max(1, int((workspace_mb or 128) * 2**20 / (4 * 4 * vocabulary)))  # four fp32 buffers at the peak
    (hidden, weight), (their_hidden, their_weight) = student, teacher

    def chunk(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.linear(ours, weight[:vocabulary]).float()
        expected = torch.nn.functional.linear(theirs, their_weight[:vocabulary]).float()
        return (logits - expected).square().mean(-1)

    pairs = zip(hidden.split(tokens), their_hidden.split(tokens), strict=True)
    return torch.cat([checkpoint(chunk, ours, theirs, use_reentrant=False) for ours, theirs in pairs])
