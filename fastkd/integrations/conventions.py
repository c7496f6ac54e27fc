"""What Liger and TRL mean by the arguments that both have."""

from __future__ import annotations

from typing import Any

from ..checks import as_number, is_positive

__all__ = ["generalized_jsd"]


def generalized_jsd(beta: float, temperature: float = 1.0) -> dict[str, Any]:
    """The keywords of fastkd's losses for what they call the generalised JSD.

    beta: the teacher's share of the mixture, in [0, 1], where 0 and 1 stand for forward and reverse KL. temperature:
    > 0; the divergence is not multiplied by its square, which `kd_weight` undoes.
    """
    beta = as_number("beta", beta, "in [0, 1]", lambda x: 0 <= x <= 1)
    temperature = as_number("temperature", temperature, "> 0", is_positive)
    ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
    return {
        "divergence": ends.get(beta, "jsd"),
        "beta": 0.5 if beta in ends else beta,
        "temperature": temperature,
        "kd_weight": temperature**-2,
    }
