"""The model card, README.md, of a student's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..common.cache import write_whole
from ..data.corpus import EMBEDDED
from ..models.architectures import EncT5Config, PrunedT5Config
from .outcome import Outcome
from .page import fenced, listed, table

_TEMPLATE = Path(__file__).parent / "templates" / "card.md"


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
    task, prefix = facts["task"], facts.get("source_prefix", "")
    student, hub_name = outcomes[-1], teacher if teacher and _is_hub_name(teacher) else None
    data = ModelCardData(
        base_model=hub_name,
        library_name="transformers",
        tags=["fastkd", "distillation", "t5"],
        metrics=sorted(student.metrics) or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        origin=_origin(student.name, summary, hub_name, bool(teacher) or any(o.name == "teacher" for o in outcomes)),
        snippet=fenced(_snippet(_model_type(folder), task, prefix), "python"),
        table=table(outcomes),
        limits="\n".join(f"- {limit}" for limit in [*_limits(facts, task), *notes]),
        facts=listed(facts),
    )
    text = str(card).encode("utf-8", errors="backslashreplace")  # as in report.md
    write_whole(folder / "README.md", text)


def _is_hub_name(teacher: str) -> bool:
    """Return whether a teacher was named as on the hub, and not by a folder."""
    try:
        validate_repo_id(teacher)
    except HFValidationError:
        return False
    return not Path(teacher).exists()


def _origin(method: str, summary: str, hub_name: str | None, has_teacher: bool) -> str:
    """Return a sentence about the teacher and the method."""
    if not has_teacher:
        return f"It was trained without a teacher, by fastkd's method `{method}`: {summary}."
    teacher = f"`{hub_name}`" if hub_name else "a T5 that is not published with it"
    return f"It was distilled from {teacher} by fastkd's method `{method}`: {summary}."


def _model_type(folder: Path) -> str:
    """Return that of the saved model; a T5's where none is saved yet."""
    path = folder / "config.json"
    return str(json.loads(path.read_text(encoding="utf-8"))["model_type"]) if path.is_file() else "t5"


def _snippet(model_type: str, task: str, prefix: str) -> str:
    """Return code that loads the student and lets it do its task."""
    is_text = task == "span_corruption"  # its answer is made of sentinels
    source = "The capital of <extra_id_0> is Paris." if is_text else f"{prefix}your text"
    if model_type == EncT5Config.model_type:
        auto = "AutoModelForSequenceClassification"
        answer = "number = model(**inputs).logits.argmax().item()\nprint(model.config.id2label[number])"
    else:
        auto = "AutoModelForSeq2SeqLM"
        answer = "output = model.generate(**inputs, max_new_tokens=64)[0]\n"
        answer += f"print(tokenizer.decode(output, skip_special_tokens={not is_text}))"
    is_ours = model_type in (EncT5Config.model_type, PrunedT5Config.model_type)
    registration = "import fastkd.train.models  # tells transformers of this kind of T5\n" if is_ours else ""
    return f"""\
{registration}from transformers import {auto}, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto}.from_pretrained(folder)
inputs = tokenizer({source!r}, return_tensors="pt")
{answer}"""


def _limits(facts: Mapping[str, Any], task: str) -> list[str]:
    """Return what the student is not, as far as the facts tell."""
    limits = ["The scores are those of held-out data from the same source; it was not tested on other data."]
    limits.append("It was not examined for bias or for harmful output.")
    if task == "span_corruption":
        limits.append("It was trained to fill in spans of text; fine-tune it before it is used for anything else.")
    else:
        limits.append(f"It was trained for one task, {task}, and knows inputs in the form above.")
    for name in ("training_chunks", "training_examples"):
        if isinstance(facts.get(name), int):
            limits.append(f"Its training data were {facts[name]:,} {name.removeprefix('training_')}.")
    if facts.get("texts") in EMBEDDED.values():
        limits.append(f"It has read nothing but the {facts['texts']}, a small English corpus.")
    return limits
