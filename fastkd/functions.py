"""The ``torch.autograd.Function`` of every op, for code that builds its own reductions or custom graphs on them."""

from .ops.linear_kl import LinearKL, LinearKLPerToken
from .ops.logit_kl import LogitKL

__all__ = ["LinearKL", "LinearKLPerToken", "LogitKL"]
