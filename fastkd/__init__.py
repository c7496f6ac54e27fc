"""Fused, memory-efficient losses for distilling language models.

    loss = fastkd.linear_kl(student_hidden, student_head.weight, teacher_hidden, teacher_head.weight)

``python -m fastkd.doctor`` tells which kernels are active on this machine, and why others are not.

What is here is loaded when it is first used, and torch with it; that registers the operators ``torch.ops.fastkd.*``.
A program that calls them by name, such as an exported one, imports ``fastkd.functions`` before.
"""

import importlib as _importlib
import importlib.util as _import
import sys as _sys
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from . import functions, nn
    from .divergence import DIVERGENCES, Divergence
    from .heads import Head, head
    from .ops.attention_kl import attention_kl
    from .ops.cka_loss import cka_loss
    from .ops.linear_kl import linear_kl
    from .ops.logit_kl import logit_kl
    from .ops.relation_kl import relation_kl
    from .quantized import QuantizedWeight
    from .relative_bias import RelativeBias
    from .states import hidden_states, targets
    from .teachers import TopK

__all__ = [
    "DIVERGENCES",
    "Divergence",
    "Head",
    "QuantizedWeight",
    "RelativeBias",
    "TopK",
    "__version__",
    "attention_kl",
    "cka_loss",
    "functions",
    "head",
    "hidden_states",
    "linear_kl",
    "logit_kl",
    "nn",
    "relation_kl",
    "targets",
]

__version__ = "0.2.0"

_HOMES = {
    "DIVERGENCES": ".divergence",
    "Divergence": ".divergence",
    "Head": ".heads",
    "QuantizedWeight": ".quantized",
    "RelativeBias": ".relative_bias",
    "TopK": ".teachers",
    "attention_kl": ".ops.attention_kl",
    "cka_loss": ".ops.cka_loss",
    "head": ".heads",
    "hidden_states": ".states",
    "linear_kl": ".ops.linear_kl",
    "logit_kl": ".ops.logit_kl",
    "relation_kl": ".ops.relation_kl",
    "targets": ".states",
}
_MODULES = (
    "backend",
    "checks",
    "distributed",
    "divergence",
    "functions",
    "heads",
    "nn",
    "ops",
    "quantized",
    "reference",
    "relative_bias",
    "states",
    "teachers",
)


def __getattr__(name: str) -> _Any:
    if name in _MODULES:
        return _importlib.import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(_importlib.import_module(_HOMES[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


# In the source tree `fastkd.kernels` lies beside this folder and not in it (see pyproject.toml).
_kernels = _Path(__file__).parents[1] / "kernels" / "__init__.py"
if not (_Path(__file__).parent / "kernels").is_dir() and (_kernels.parent / "common.py").is_file():
    _spec = _import.spec_from_file_location(
        "fastkd.kernels", _kernels, submodule_search_locations=[str(_kernels.parent)]
    )
    assert _spec is not None and _spec.loader is not None
    kernels = _sys.modules["fastkd.kernels"] = _import.module_from_spec(_spec)
    _spec.loader.exec_module(kernels)
