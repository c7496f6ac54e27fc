"""Fused, memory-efficient losses for distilling language models.

    loss = fastkd.linear_kl(student_hidden, student_head.weight, teacher_hidden, teacher_head.weight)

``python -m fastkd.doctor`` tells which kernels are active on this machine, and why others are not.
"""

from pathlib import Path as _Path

# Run from the source tree, `fastkd.kernels` lies beside this folder and not in it (see pyproject.toml).
if not (_Path(__file__).parent / "kernels").is_dir() and (_Path(__file__).parents[1] / "kernels" / "rows.py").is_file():
    __path__.append(str(_Path(__file__).parents[1]))

from . import functions, nn
from .divergence import DIVERGENCES
from .ops.linear_kl import linear_kl
from .ops.logit_kl import logit_kl

__all__ = ["DIVERGENCES", "__version__", "functions", "linear_kl", "logit_kl", "nn"]

__version__ = "0.1.0"
