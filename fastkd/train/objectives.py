"""The distillation methods: each is a row in METHODS, its terms, their weights and their layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import fastkd

from .capture import PLACES

VOCABULARY_TERMS = ("ce", "logit_kl")
TEACHER_LAYERS = {24: 21}  # of a teacher's depth: MiniLMv2's choice for BERT-large; for T5 it is an assumption


@dataclass(frozen=True)
class Method:
    """One objective: loss = sum over terms of weight * term.

    terms: "ce", cross-entropy with the target tokens; "logit_kl", temperature^2 * divergence of the teacher's and the
    student's softmaxes at that temperature; and the relation terms (see `relation_loss`), named after their place:
    "decoder_self", "decoder_cross", "encoder_self".
    divergence, divergence_beta: of the logit term and the relation terms, a name of `fastkd.DIVERGENCES`.
    relation_heads: MiniLMv2's A_r, into which queries, keys and values are split whatever their own heads; 32 as in
    the code of MiniEnD's authors.
    teacher_layer: whose states the relation terms take, counted from 1; by default that of TEACHER_LAYERS, else the
    last. The student's is always its last.
    """

    summary: str
    terms: Mapping[str, float]
    temperature: float = 1.0
    divergence: str = "forward_kl"
    divergence_beta: float = 0.5
    relation_heads: int = 32
    teacher_layer: int | None = None

    @property
    def formula(self) -> str:
        """The weighted sum in words."""
        return " + ".join(f"{weight:g} {term}" for term, weight in self.terms.items())

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return any(term != "ce" for term in self.terms)

    @property
    def vocabulary_terms(self) -> list[str]:
        """The terms on the vocabulary, which one pass computes; without any, the head learns nothing."""
        return [term for term in self.terms if term in VOCABULARY_TERMS]

    @property
    def places(self) -> list[str]:
        """The places of the relation terms."""
        return [term for term in self.terms if term in PLACES]

    def student_layers(self, config: Any) -> dict[str, int]:
        """Return the student's layer at each place: the last."""
        return {place: _depth(config, place) for place in self.places}

    def teacher_layers(self, config: Any) -> dict[str, int]:
        """Return the teacher's layer at each place; raises ValueError if teacher_layer is not one of its layers."""
        return {place: self._teacher_layer(_depth(config, place)) for place in self.places}

    def _teacher_layer(self, depth: int) -> int:
        if self.teacher_layer is None:
            return TEACHER_LAYERS.get(depth, depth)
        if not 1 <= self.teacher_layer <= depth:
            raise ValueError(f"teacher_layer: expected 1 to {depth}, the teacher's layers, got {self.teacher_layer}")
        return self.teacher_layer

    def check_fits(self, student: Any, teacher: Any) -> None:
        """Raise ValueError if the relation terms cannot be computed between models of these two `T5Config`s."""
        if not self.places:
            return
        self.teacher_layers(teacher)
        widths = [config.num_heads * config.d_kv for config in (student, teacher)]
        common = math.gcd(*widths)
        if self.relation_heads < 1 or common % self.relation_heads:
            valid = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise ValueError(
                f"relation_heads: expected a divisor of {widths[0]} and {widths[1]}, the widths of the student's and "
                f"the teacher's queries ({valid}), got {self.relation_heads}"
            )


def _depth(config: Any, place: str) -> int:
    return config.num_layers if PLACES[place].stack == "encoder" else config.num_decoder_layers


_IMPLICIT = {"logit_kl": 1.0, "decoder_self": 1.0}

# MiniEnD's sums are unweighted. Its logit term at temperature 1 without cross-entropy is an assumption.
METHODS: dict[str, Method] = {
    "scratch": Method("cross-entropy alone, no teacher: the baseline", {"ce": 1.0}),
    "mlmkd": Method("logit KL alone (MlmKD in MiniEnD, Zhang et al., 2024)", {"logit_kl": 1.0}),
    # DistilBERT's temperature. The unit weights are an assumption: DistilBERT's own are 5 : 2.
    "kd": Method(
        "cross-entropy + logit KL (Hinton et al., 2015; temperature 2 as DistilBERT, Sanh et al., 2019)",
        {"ce": 1.0, "logit_kl": 1.0},
        temperature=2.0,
    ),
    "minilm": Method(
        "decoder self-attention relations alone (MiniLMv2, Wang et al., 2021; MiniLM in MiniEnD)",
        {"decoder_self": 1.0},
    ),
    "mlmkd+minilm": Method("the implicit objective of MiniEnD: logit KL + decoder self-attention", _IMPLICIT),
    "miniend-d": Method("MiniEnD-D: implicit + cross-attention", {**_IMPLICIT, "decoder_cross": 1.0}),
    "miniend-d-nologit": Method("MiniEnD-D without the logit KL", {"decoder_self": 1.0, "decoder_cross": 1.0}),
    "miniend-e": Method("MiniEnD-E: implicit + encoder self-attention", {**_IMPLICIT, "encoder_self": 1.0}),
    "miniend-e-nologit": Method("MiniEnD-E without the logit KL", {"decoder_self": 1.0, "encoder_self": 1.0}),
}


def vocabulary_loss(
    method: Method,
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    teacher_weight: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    normalizer: torch.Tensor | float | None = None,
    workspace_mb: float | None = None,
) -> torch.Tensor:
    """Return the scalar loss of a method's vocabulary terms without materialising any [tokens, V] logits.

    student_hidden [B, L, Hs], student_weight [V, Hs]; teacher_hidden [B, L, Ht], teacher_weight [Vt, Ht], or None for a
    method without teacher; labels [B, L] with -100 where nothing is to be predicted.
    normalizer: what the sum over tokens is divided by; by default the number of labels that are not -100.
    """
    return fastkd.linear_kl(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels=labels,
        ce_weight=method.terms.get("ce", 0.0),
        kd_weight=method.terms.get("logit_kl", 0.0),
        divergence=method.divergence,
        beta=method.divergence_beta,
        temperature=method.temperature,
        normalizer=normalizer,
        workspace_mb=workspace_mb,
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
