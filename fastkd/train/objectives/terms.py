"""The losses of the distillation methods' terms (see `methods`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

import fastkd

from ...states import shifted
from ..common.family import KINDS, PLACES
from ..models.anatomy import logits
from .methods import SAME_SHAPE_TERMS, Method
from .mixup import Mixup

Given = tuple[torch.Tensor, fastkd.Head]  # what a head is given, [B, L, H], and the head


@dataclass(frozen=True)
class Batch:
    """What all terms of a batch share.

    labels: [B, L], of what each state is to predict, -100 for nothing. masks: see `valid_positions`. rows: what sums
    over the positions of each are divided by. kind: the model's, of KINDS. stacks: of each pair of hidden states.
    mixup: how its examples are mixed. group: of processes over whose batches the CKA is computed at once, see
    `fastkd.cka_loss` for the gradients then. workspace_mb: see `fastkd.linear_kl`.
    """

    labels: torch.Tensor
    masks: Mapping[str, torch.Tensor]
    rows: Mapping[str, torch.Tensor]
    kind: str
    stacks: Sequence[str]
    mixup: Mixup | None
    group: torch.distributed.ProcessGroup | None
    workspace_mb: float | None


def aligned_labels(kind: str, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return a batch's labels [B, L] where the states that predict them are; kind: the model's, of KINDS."""
    labels = inputs["labels"]
    labels = labels[:, None] if labels.dim() == 1 else labels  # classes, as transformers' collators leave them
    return shifted(labels) if KINDS[kind].shifts_labels else labels


def valid_positions(kind: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the masks of a batch, nonzero where they hold; kind: the model's, of KINDS.

    "encoder" [B, Lx] and "decoder" [B, L]: where there is no padding in what each reads, as far as the model has it.
    "targets" [B, L]: which states are to predict something; beside an encoder these are the decoder's positions.
    """
    read, targets = inputs.get("attention_mask"), aligned_labels(kind, inputs) != -100
    read = torch.ones_like(inputs["input_ids"]) if read is None else read
    sides = {"decoder": read} if kind == "causal" else {"encoder": read, "decoder": targets}
    return {**sides, "targets": targets}


def losses(
    method: Method, batch: Batch, student: Mapping[str, Any], teacher: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Return the scalar loss of each term, times its weight; vocabulary terms are computed, and named, together.

    student, teacher: what they computed of the batch, see `forward.forward`.
    """
    found = {}
    if method.vocabulary_terms:
        found["+".join(method.vocabulary_terms)] = _vocabulary_loss(
            method, method.terms, batch, student["hidden"], teacher.get("hidden"), batch.labels
        )
    for term, weight in method.terms.items():
        if term in method.places:
            found[term] = weight * _relation_loss(method, batch, term, student[term], teacher[term])
        elif term in method.mixup_terms:
            found[term] = weight * _mixup_loss(method, batch, term, student["mixed"], teacher.get("mixed"))
        elif term in method.hidden_terms:
            found[term] = weight * _hidden_loss(method, batch, term, student["states"], teacher["states"])
    return found


def _vocabulary_loss(
    method: Method,
    terms: Mapping[str, float],
    batch: Batch,
    student: Given,
    teacher: Given | None,
    labels: torch.Tensor | None,
    **options: Any,
) -> torch.Tensor:
    """Return the loss of vocabulary terms, with their weights, without materialising any [tokens, V] logits.

    Of a head with one output, which is a number, they are the squared errors to the label and to the teacher's number.
    options: weight and normalizer of `fastkd.linear_kl`.
    """
    if student[1].weight.shape[0] == 1:
        number, share = logits(*student)[..., 0], options.get("weight", 1.0)
        theirs = number if teacher is None else logits(*teacher)[..., 0]
        errors = [(terms.get("ce", 0.0), number if labels is None else labels), (terms.get("logit_kl", 0.0), theirs)]
        total = sum(weight * (share * (number - x).square()).sum() for weight, x in errors)
        return torch.as_tensor(total / options.get("normalizer", batch.rows["targets"]))
    return fastkd.linear_kl(
        *student,
        *(teacher or (None, None)),
        labels=labels,
        ce_weight=terms.get("ce", 0.0),
        kd_weight=terms.get("logit_kl", 0.0),
        divergence=method.divergence,
        beta=method.divergence_beta,
        temperature=method.temperature,
        workspace_mb=batch.workspace_mb,
        **{"normalizer": batch.rows["targets"], **options},
    )


def _relation_loss(
    method: Method, batch: Batch, place: str, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return the loss of the relation term at `place` (MiniLMv2, Wang et al., 2021, arXiv 2012.15828).

    For each of Q, K and V: R = softmax(X X^T / sqrt(d_r) + mask) in each relation head, d_r wide, then the divergence
    of the teacher's R and the student's, averaged over valid rows and heads; then the mean of the three. Padding is
    masked everywhere, later positions in decoder self-attention.
    Assumptions, where MiniEnD says nothing: no relative-position bias and the scale 1/sqrt(d_r), although T5's own
    attention has the one and not the other; in cross-attention, Q-Q relations are over decoder positions, without a
    causal mask, and K-K and V-V relations over encoder positions.

    student, teacher: [q, k, v], each [B, L, H], of widths of their own.
    """
    where = PLACES[place]
    loss = fastkd.relation_kl(
        list(student),
        list(teacher),
        num_heads=method.relation_heads,
        key_mask=[batch.masks[side] for side in where.sides],
        causal=where.causal,
        divergence=method.divergence,
        beta=method.divergence_beta,
        normalizer=[batch.rows[side] for side in where.sides],
    )
    assert isinstance(loss, torch.Tensor)  # only reduction="none" returns several
    return loss


def hidden_masks(
    masks: Mapping[str, torch.Tensor], match_first_position: bool, kind: str = "seq2seq"
) -> dict[str, torch.Tensor]:
    """Return which positions of each stack a hidden-state term compares, [B, L] booleans.

    masks: see `valid_positions`. In a decoder beside an encoder what counts is the input,
    which is the targets shifted by one, as in HSM: a position that reads a text's last token is compared, and the
    first, which reads the start token, only if `match_first_position` says so.
    """
    found = {side: mask.bool() for side, mask in masks.items() if side != "targets"}
    if kind != "causal":
        valid = found["decoder"]
        found["decoder"] = valid.roll(1, -1)
        found["decoder"][:, 0] = valid[:, 0] & match_first_position
    return found


def _hidden_loss(
    method: Method, batch: Batch, term: str, student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return the loss of the hidden-state term, times the batch's share of all target tokens.

    It is that of a batch by itself, as CKA is no sum over tokens. Accumulated batches, and processes, keep its scale;
    but CKA of fewer tokens than the states are wide is far off, so micro-batches should be well above that.
    "hidden_cka": `fastkd.cka_loss`, over the valid positions of the whole batch at once, summed over the pairs (HSM,
    Dasgupta and Cohn, ICLR 2025). "hidden_linear": the squared error, averaged over the teacher's width and the valid
    positions, summed over the pairs; the student's states are projected already. "hidden_mse": likewise, without a
    projection, but averaged over the pairs (MiniDisc, Zhang et al., 2024). "hidden_pkd": that of the states divided by
    their L2 norms (PKD, Sun et al., 2019, arXiv 1908.09355).
    student, teacher: [B, L, H], of widths of their own only for "hidden_cka".
    """
    compared = hidden_masks(batch.masks, method.match_first_position, batch.kind)
    tokens = batch.masks["targets"].sum().float()
    masks = [compared[stack] for stack in batch.stacks]
    if batch.group is not None:  # the share of each is that of their mean
        torch.distributed.all_reduce(tokens, group=batch.group)
        tokens /= batch.group.size()
    share = tokens / batch.rows["targets"].clamp_min(1)
    if term == "hidden_cka":
        return share * fastkd.cka_loss(list(student), list(teacher), mask=masks, group=batch.group)
    if term == "hidden_pkd":
        student, teacher = ([normalize(state.float(), dim=-1) for state in side] for side in (student, teacher))
    errors = [
        (s.float() - t.float()).square().mean(-1).masked_fill(~mask, 0).sum() / mask.sum().clamp_min(1)
        for s, t, mask in zip(student, teacher, masks, strict=True)
    ]
    total = torch.stack(errors).sum()
    return share * (total / len(errors) if term in SAME_SHAPE_TERMS else total)


def _mixup_loss(method: Method, batch: Batch, term: str, student: Given, teacher: Given | None) -> torch.Tensor:
    """Return the loss of a term on mixed examples (MixKD, Liang et al., ICLR 2021, arXiv 2011.00593).

    "mixup_ce" (SM): lam * cross-entropy with the targets of one example of the pair + (1 - lam) * with the other's.
    "mixup_kd" (TMKD): the mean squared difference of all logits of teacher and student, or the method's divergence of
    their softmaxes, averaged over the positions that are valid in either example.
    """
    mixup, labels, valid = batch.mixup, batch.labels, batch.masks["targets"]
    assert mixup is not None
    if term == "mixup_ce":
        lam = mixup.lam.view(-1, 1).expand(labels.shape)
        return sum(  # type: ignore[return-value]
            _vocabulary_loss(method, {"ce": 1.0}, batch, student, None, targets, weight=share)
            for targets, share in ((labels, lam), (labels[mixup.partner], 1 - lam))
        )
    union = mixup.union(valid)
    rows = union.sum() * batch.rows["targets"] / valid.sum().clamp_min(1)  # of all batches, of which this may be one
    if method.mixup_distance == "divergence":
        options = {"weight": union.float(), "normalizer": rows}
        return _vocabulary_loss(method, {"logit_kl": 1.0}, batch, student, teacher, None, **options)
    assert teacher is not None
    (ours, our_head), (theirs, their_head) = student, teacher
    errors = _logit_errors((ours[union], our_head), (theirs[union], their_head), batch.workspace_mb)
    return errors.sum() / rows


def _logit_errors(student: Given, teacher: Given, workspace_mb: float | None) -> torch.Tensor:
    """Return each token's mean squared difference of logits [N], over the vocabulary that both models have.

    The heads are given [N, H]. Logits exist for a chunk of tokens at a time, in workspace_mb (128 without), and are
    computed again in the backward pass.
    """
    (hidden, head), (their_hidden, their_head) = student, teacher
    vocabulary = min(head.weight.shape[0], their_head.weight.shape[0])
    tokens = max(1, int((workspace_mb or 128) * 2**20 / (4 * 4 * vocabulary)))  # four fp32 buffers at the peak

    def chunk(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        found, expected = logits(ours, head, vocabulary), logits(theirs, their_head, vocabulary)
        return (found - expected).square().mean(-1)

    pairs = zip(hidden.split(tokens), their_hidden.split(tokens), strict=True)
    return torch.cat([checkpoint(chunk, ours, theirs, use_reentrant=False) for ours, theirs in pairs])
