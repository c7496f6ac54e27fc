"""The distillation methods: each is a row in METHODS, its terms and their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

import fastkd


@dataclass(frozen=True)
class Method:
    """One objective: loss = sum over terms of weight * term.

    terms: "ce", cross-entropy with the target tokens; "logit_kl", temperature^2 * KL(teacher || student) of the
    softmaxes at that temperature.
    temperature: the default, which `--temperature` overrides.
    """

    summary: str
    terms: Mapping[str, float]
    temperature: float = 1.0

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return any(term != "ce" for term in self.terms)


METHODS: dict[str, Method] = {
    "scratch": Method("cross-entropy alone, no teacher: the baseline", {"ce": 1.0}),
    "mlmkd": Method("logit KL alone (MlmKD in MiniEnD, Zhang et al., 2024)", {"logit_kl": 1.0}),
    # DistilBERT's temperature. The unit weights are an assumption: DistilBERT's own are 5 : 2.
    "kd": Method(
        "cross-entropy + logit KL (Hinton et al., 2015; temperature 2 as DistilBERT, Sanh et al., 2019)",
        {"ce": 1.0, "logit_kl": 1.0},
        temperature=2.0,
    ),
}


def vocabulary_loss(
    method: Method,
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    teacher_weight: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    temperature: float | None = None,
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
        temperature=method.temperature if temperature is None else temperature,
        normalizer=normalizer,
        workspace_mb=workspace_mb,
    )
