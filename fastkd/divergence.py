"""The divergence family by name: each a function of log-probabilities, in the notation of DistiLLM and GKD.

p is the teacher's distribution, q the student's, [..., V] in float32 or float64, D is [...]. ``beta`` in (0, 1)
is the mixture weight of the three members that have one. The position of a name in ``DIVERGENCES`` is its code in the
compiled kernels.

A mix is a weighted sum of them, given as a mapping of names to weights; its code has a bit for each member.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["DIVERGENCES", "MIX", "Divergence", "beta_of", "divergence_code", "for_rows", "weighted"]

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"]
"""The names that ``divergence`` takes; a mix of them is a mapping of names to weights."""


def _expected_log_ratio(log_p: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum p (log a - log b) over the last dimension, where a probability of zero contributes zero."""
    p = log_p.exp()
    return torch.where(p > 0, p * torch.where(p > 0, log_a - log_b, 0), 0).sum(-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(weight * a + (1 - weight) * b)"""
    nothing = (log_a == -math.inf) & (log_b == -math.inf)  # masked in both: logaddexp has no gradient there
    log_a, log_b = log_a.masked_fill(nothing, 0), log_b.masked_fill(nothing, 0)
    share = log_a.new_ones(()) * weight  # a number's own logarithm torch.compile would take for a constant
    return torch.logaddexp(log_a + share.log(), log_b + (-share).log1p()).masked_fill(nothing, -math.inf)


def forward_kl(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """KL(p || q)"""
    return _expected_log_ratio(log_p, log_p, log_q)


def reverse_kl(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """KL(q || p): MiniLLM (Gu et al., ICLR 2024)"""
    return _expected_log_ratio(log_q, log_q, log_p)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q: GKD (Agarwal et al., ICLR 2024)"""
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _expected_log_ratio(log_p, log_p, log_m) + (1 - beta) * _expected_log_ratio(log_q, log_q, log_m)


def skew_kl(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """KL(p || beta p + (1 - beta) q): DistiLLM (Ko et al., ICML 2024)"""
    return _expected_log_ratio(log_p, log_p, _log_mixture(log_p, log_q, beta))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """KL(q || (1 - beta) p + beta q): DistiLLM (Ko et al., ICML 2024)"""
    return _expected_log_ratio(log_q, log_q, _log_mixture(log_q, log_p, beta))


def tvd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Total variation distance, 1/2 sum |p - q|"""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
}
"""The divergences by the name that every loss takes: (log p, log q, beta) -> D(p, q)."""


# Codes from here on are those of mixes, whose bits say which divergences take part.
MIX = 64


def weighted(divergence: str | Mapping[str, float], log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """D(p, q) of a name or of a mix"""
    if isinstance(divergence, str):
        return DIVERGENCES[divergence](log_p, log_q, beta)
    terms = [DIVERGENCES[name](log_p, log_q, beta) * weight for name, weight in divergence.items()]
    return torch.stack(terms).sum(0)


def divergence_code(divergence: str | Mapping[str, float]) -> int:
    """The number that the compiled kernels know a divergence, or a mix, by (csrc/divergence.h)."""
    names = list(DIVERGENCES)
    if isinstance(divergence, str):
        return names.index(divergence)
    return MIX + sum(2 ** names.index(name) for name in divergence)


def beta_of(beta: float, *weights: float) -> float | list[float]:
    """What kernels are given as `beta`: of a mix every divergence's weight, too."""
    return [beta, *weights] if weights else beta


def for_rows(divergence: int, numbers: Tensor) -> tuple[Any, ...]:
    """An op's code and numbers as kernels take them: code, beta, temperature, kd_weight, ce_weight."""
    beta, temperature, kd_weight, ce_weight, *weights = numbers.tolist()
    return divergence, beta_of(beta, *weights), temperature, kd_weight, ce_weight
