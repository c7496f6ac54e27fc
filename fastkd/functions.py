"""The ``torch.autograd.Function`` of every op, for code that builds its own reductions or custom graphs on them."""

from .ops import linear_kl as _linear_kl  # noqa: F401  # registers LinearKL's operator
from .ops.attention_kl import AttentionKL, AttentionKLPerRow
from .ops.cka_loss import CKA
from .ops.linear_kl_functions import LinearKL, LinearKLPerToken, TopKLinearKL, TopKLinearKLPerToken
from .ops.logit_kl import LogitKL
from .ops.relation_kl import RelationKL, RelationKLPerRow
from .ops.topk_kl import TopKLogitKL

__all__ = [
    "CKA",
    "AttentionKL",
    "AttentionKLPerRow",
    "LinearKL",
    "LinearKLPerToken",
    "LogitKL",
    "RelationKL",
    "RelationKLPerRow",
    "TopKLinearKL",
    "TopKLinearKLPerToken",
    "TopKLogitKL",
]
