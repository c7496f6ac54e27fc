"""Distillation of T5 models with fastkd's losses; `fastkd-train --help` is the way in.

Rooms, each of which imports only from those before it: common, models, data, objectives, judge, teaching, training,
report, flags, stages, minidisc, runs; on top cli, and plan, which says beforehand what each process of a run will hold.
A run goes the same way: its flags are parsed (flags), its data and models made (stages, by data and models), the
student trained (training, by the losses of objectives) and judged (judge), and what is left to read is written
(report).
Needs the packages of `pip install 'fastkd[train]'`; importing this module loads none of them.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.corpus import embedded_corpus as embedded_corpus
    from .data.examples import Chunks as Chunks
    from .minidisc.prune import importance as importance
    from .minidisc.prune import sliced as sliced
    from .models import EncT5ForSequenceClassification as EncT5ForSequenceClassification
    from .models import PrunedBertForMaskedLM as PrunedBertForMaskedLM
    from .models import PrunedBertForSequenceClassification as PrunedBertForSequenceClassification
    from .models import PrunedT5ForConditionalGeneration as PrunedT5ForConditionalGeneration
    from .models.capture import capture_hidden as capture_hidden
    from .models.capture import capture_qkv as capture_qkv
    from .models.student import slice_teacher as slice_teacher
    from .models.tokenizer import train_tokenizer as train_tokenizer
    from .objectives.methods import METHODS as METHODS
    from .objectives.methods import Method as Method
    from .training.trainer import DistillTrainer as DistillTrainer

LAUNCHERS = Path(__file__).parent / "launchers"  # an accelerate configuration for FSDP2, a Slurm script for two nodes

_HOMES = {
    "Chunks": "data.examples",
    "DistillTrainer": "training.trainer",
    "EncT5ForSequenceClassification": "models",
    "METHODS": "objectives.methods",
    "Method": "objectives.methods",
    "PrunedBertForMaskedLM": "models",
    "PrunedBertForSequenceClassification": "models",
    "PrunedT5ForConditionalGeneration": "models",
    "capture_hidden": "models.capture",
    "capture_qkv": "models.capture",
    "embedded_corpus": "data.corpus",
    "importance": "minidisc.prune",
    "slice_teacher": "models.student",
    "sliced": "minidisc.prune",
    "train_tokenizer": "models.tokenizer",
}
__all__ = ["LAUNCHERS", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{__name__}.{name} needs the package {error.name}: pip install 'fastkd[train]'") from error
