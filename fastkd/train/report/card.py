"""The model card, README.md, of a student's folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..data.corpus import EMBEDDED
from ..models.architectures import EncT5Config, PrunedT5Config
from .outcome import Outcome
from .page import save


def write_card(
    folder: Path,
    summary: str,
    teacher: str | None,
    outcomes: Sequence[Outcome],
    facts: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> None:
    """Write README.md into a student's `save_pretrained` folder, whose config.json says how it is loaded and asked.

    summary: of its method. teacher: the folder or hub name that was given, or None if there was none or the run trained
    it; only a hub name is published, as the card's base model. outcomes: the student's last. facts, notes: see
    `report.write`; some facts also tell what the student is for, and how little it has read.
    """
    hub_name = None
    if teacher and not Path(teacher).exists():
        with contextlib.suppress(HFValidationError):
            validate_repo_id(teacher)
            hub_name = teacher
    config = folder / "config.json"  # a T5's where none is saved yet
    kind = json.loads(config.read_text(encoding="utf-8"))["model_type"] if config.is_file() else "t5"
    data = ModelCardData(
        base_model=hub_name,
        library_name="transformers",
        tags=["fastkd", "distillation", "t5"],
        metrics=sorted(outcomes[-1].metrics) or None,
    )
    save(
        folder / "README.md",
        "card.md",
        data=data.to_yaml(),
        summary=summary,
        hub_name=hub_name,
        has_teacher=bool(teacher) or any(outcome.name == "teacher" for outcome in outcomes),
        is_classifier=kind == EncT5Config.model_type,
        is_ours=kind in (EncT5Config.model_type, PrunedT5Config.model_type),
        is_embedded=facts.get("texts") in EMBEDDED.values(),
        outcomes=outcomes,
        facts=facts,
        notes=notes,
    )
