"""What a model is worth at the end of its training, if it had any."""

from __future__ import annotations

from itertools import chain
from typing import Any

from ..common import endings
from ..judge import cost
from ..judge.evaluate import generate
from ..judge.metrics import score_rows
from ..models.anatomy import kind
from ..models.loading import unsharded
from ..models.tokenizer import special_tokens
from ..report.outcome import Outcome
from ..training.trainer import DistillTrainer
from .run import Run


def decoding(run: Run) -> dict[str, Any]:
    """Return by which settings all models of a run write."""
    most = run.args.generation_max_length or run.data.target_tokens
    return {"max_new_tokens": most, "num_beams": run.args.generation_num_beams or 1}


def score(run: Run, model: Any, title: str | None) -> tuple[dict[str, float], list[str]]:
    """Return (the task's figures, outputs) of what a model writes for all held-out examples; no figures for texts."""
    rows = run.data.held_out_rows
    outputs = written(run, model, rows, title)
    return {} if run.data.task.is_text or not outputs else score_rows(rows["task"], outputs, rows["target"]), outputs


def written(run: Run, model: Any, rows: Any, title: str | None) -> list[str]:
    """Return what a model writes for the sources of rows, token ids; nothing if it only fills masks in."""
    data = run.data
    if kind(model) == "masked":
        return []
    special = set(special_tokens(data.tokenizer).values())
    kept = special if run.data.task.is_text else special.intersection(chain.from_iterable(data.held_out_rows["labels"]))
    texts = generate(
        model,
        data.tokenizer,
        rows["input_ids"],
        batch_size=run.args.per_device_eval_batch_size,
        kept=kept,
        token_types=rows["token_type_ids"] if "token_type_ids" in rows.column_names else None,
        title=title,
        **decoding(run),
    )
    # A model may call its classes otherwise than the data.
    names = dict(zip(model.config.id2label.values(), data.classes, strict=False)) if data.classes else {}
    return [names.get(text, text) for text in texts]


def judge(run: Run, trainer: DistillTrainer, name: str) -> Outcome:
    """Return how a model does after its training, if it had any: held-out loss, the task's figures, and its cost."""
    endings.begin(f"the evaluation of {name}")
    state = trainer.state
    model = unsharded(trainer.model) if state.global_step else trainer.model  # a student is small, a teacher may not be
    step = state.best_global_step if run.args.load_best_model_at_end else state.global_step  # of the weights it has now
    evaluated = [e for e in state.log_history if "eval_loss" in e and e["step"] == step and step]
    trainer.score = None  # what it writes is scored below, once
    final = evaluated[-1] if evaluated else trainer.evaluate()
    metrics, outputs = score(run, model, f"{name}: writing")
    return Outcome(
        name=name,
        parameters=cost.parameters(model),
        loss=final["eval_loss"],
        token_accuracy=final["eval_token_accuracy"],
        **trainer.trained,
        metrics=metrics,
        outputs=outputs[: run.flags.report_examples],
        cost=cost.measure(model),
    )
