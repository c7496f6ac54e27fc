"""Held-out loss and accuracy, from hidden states, in chunks of tokens so that logits stay small."""

from __future__ import annotations

import numpy as np
import torch

CHUNK = 1024  # tokens: 16 MB of fp32 logits at 4,096 pieces


@torch.no_grad()
def token_scores(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return [B, L, 2] (fp32): each target token's negative log-likelihood in nats, and 1 where the argmax is right.

    hidden [B, L, H], weight [V, H], labels [B, L]; where a label is -100 both scores are 0.
    """
    scores = [
        _chunk_scores(h, weight, y)
        for h, y in zip(hidden.flatten(0, 1).split(CHUNK), labels.flatten().split(CHUNK), strict=True)
    ]
    return torch.cat(scores).view(*labels.shape, 2)


def _chunk_scores(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight).float()  # [CHUNK, V]
    nats = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    return torch.stack([nats, (logits.argmax(-1) == labels).float()], -1)


def held_out_metrics(prediction: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """Average token scores over all target tokens; the `compute_metrics` of DistillTrainer.

    prediction: (scores [N, L, 2], labels [N, L]). Returns "loss" in nats per target token and "token_accuracy".
    """
    scores, labels = prediction
    nats, hits = scores[labels != -100].astype(np.float64).mean(0)
    return {"loss": float(nats), "token_accuracy": float(hits)}
