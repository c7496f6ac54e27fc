"""The model card, README.md, of a student's folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..common.family import KINDS, family_of, kind_of
from ..data.corpus import EMBEDDED
from .outcome import Outcome
from .page import save

OURS = "fastkd_"  # so begin the types of models that transformers does not know


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
    known = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {"model_type": "t5"}
    its = SimpleNamespace(**{"architectures": None, **known})
    row, is_ours = family_of(its), its.model_type.startswith(OURS)
    model_type = row.model_types[0].removeprefix(OURS) if is_ours else its.model_type
    languages = [facts[name].partition("_")[0] for name in ("source_lang", "target_lang") if name in facts]
    data = ModelCardData(
        base_model=hub_name,
        library_name="transformers",
        tags=["fastkd", "distillation", model_type],
        metrics=sorted(outcomes[-1].metrics) or None,
        language=[code for code in languages if len(code) <= 3] or None,  # and not a word
    )
    save(
        folder / "README.md",
        "card.md",
        data=data.to_yaml(),
        summary=summary,
        hub_name=hub_name,
        has_teacher=bool(teacher) or any(outcome.name == "teacher" for outcome in outcomes),
        family=row.name if model_type in (row.model_types[0], "enct5") else model_type,
        kind=kind_of(its),
        auto=KINDS[kind_of(its)].auto,
        is_number=len(known.get("id2label", "two")) == 1,
        is_ours=is_ours,
        is_embedded=facts.get("texts") in EMBEDDED.values(),
        outcomes=outcomes,
        facts=facts,
        notes=notes,
    )
