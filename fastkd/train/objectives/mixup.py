"""Mixup: pairs of a batch's examples, interpolated on their word embeddings (Zhang et al., 2018, arXiv 1710.09412)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Mixup:
    """Which examples of a batch are mixed, and how: example i with share lam[i], example partner[i] with the rest.

    partner: [B], a permutation. lam: [B] (fp32), between 0 and 1.
    """

    partner: torch.Tensor
    lam: torch.Tensor

    @classmethod
    def draw(cls, labels: torch.Tensor, alpha: float) -> Mixup:
        """Draw a permutation of a batch and lam of Beta(alpha, alpha), one per pair, from torch's CPU generator.

        That generator's state is in every checkpoint, so a resumed run draws what an uninterrupted one would.
        """
        partner = torch.randperm(len(labels))
        lam = torch.distributions.Beta(alpha, alpha, validate_args=False).sample((len(labels),))
        return cls(partner.to(labels.device), lam.to(labels.device))

    def mix(self, states: torch.Tensor) -> torch.Tensor:
        """Return lam * states + (1 - lam) * partner's states, [B, L, H]."""
        lam = self.lam.to(states.dtype).view(-1, 1, 1)
        return lam * states + (1 - lam) * states[self.partner]

    def union(self, mask: torch.Tensor) -> torch.Tensor:
        """Return where a mask [B, L] holds for either example of a pair."""
        return mask | mask[self.partner]
