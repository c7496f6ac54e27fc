"""Distillation of T5 models with fastkd's losses; `fastkd-train --help` is the way in.

Reading order: cli -> arguments (flags, parser, config, checks) -> runs. A run is prepare, which makes data of the flags
(formats, sources, tasks, rows, corpus, tokenizer, data), then stages, which make teacher and student (student, trainer
on top of checkpoints; methods, objectives, capture, mixup) and judge them (evaluate, metrics, cost), and at last what
is left to read (report, plots, card). A teacher is pruned, and distilled in rounds, by minidisc (prune, models,
schedule). Several processes work together by processes and sharding; plan says beforehand what each of them will hold.
Needs the packages of `pip install 'fastkd[train]'`; importing this module loads none of them.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

LAUNCHERS = Path(__file__).parent / "launchers"  # an accelerate configuration for FSDP2, a Slurm script for two nodes

_HOMES = {
    "DistillTrainer": "trainer",
    "EncT5ForSequenceClassification": "models",
    "METHODS": "methods",
    "Method": "methods",
    "PrunedT5ForConditionalGeneration": "models",
    "SpanCorruption": "data",
    "capture_qkv": "capture",
    "embedded_corpus": "corpus",
    "importance": "prune",
    "slice_teacher": "student",
    "sliced": "prune",
    "train_tokenizer": "tokenizer",
}
__all__ = ["LAUNCHERS", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{__name__}.{name} needs the package {error.name}: pip install 'fastkd[train]'") from error
