"""The teacher of a run: given, or trained on its data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import transformers

import fastkd

from ..common.cache import cached
from ..common.errors import InputError
from ..flags.arguments import EMBEDDING_FACTOR
from ..judge import cost
from ..models.loading import load_config
from ..models.student import new_model
from ..models.tokenizer import padded_size
from ..objectives.methods import METHODS
from ..report.outcome import Outcome
from .caching import cached_teacher
from .given import Teacher, teacher_on_demand
from .identity import recipe
from .judging import decoding, judge
from .planning import trained_config
from .prepare import VERSION, heading
from .run import Run
from .trainers import make_trainer


def get_teacher(run: Run) -> Teacher:
    """Return the teacher that was given, or one trained on this run's data, from the cache if it was trained before."""
    flags, teacher = run.flags, run.given.teacher
    trained: dict[str, Any] = {}
    if teacher is not None:
        heading(f"Teacher: {flags.teacher}")
    else:
        heading("Teacher: a T5 trained from scratch")
        folder, trained = _trained(run)
        teacher = teacher_on_demand(flags, run.args, folder, load_config(folder, "teacher"), run.cache)
    teacher.outcome = dataclasses.replace(_judged(run, teacher), **trained)
    if flags.teacher_cache and flags.objective.needs_teacher:
        teacher.cached = cached_teacher(run, teacher)
    return teacher


def _trained(run: Run) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a teacher that is trained on the run's data, and what its training took."""
    flags, args, data = run.flags, run.args, run.data
    rate, seed = flags.teacher_learning_rate, args.seed + 1  # other corruptions and orders than the student will see
    own_flags = dataclasses.replace(flags, embedding_learning_rate=EMBEDDING_FACTOR * rate)
    sizes: dict[str, Any] = {"max_steps": flags.teacher_steps or 0, "learning_rate": rate, "seed": seed}
    keeps: dict[str, Any] = {"save_strategy": "no", "load_best_model_at_end": False}
    own_args = dataclasses.replace(args, data_seed=None, **sizes, **keeps)
    settings = {
        "version": VERSION,
        "data": data.digest,
        "teacher_layers": flags.teacher_layers,
        "teacher_d_model": flags.teacher_d_model,
        **recipe(own_args),
        "max_steps": flags.teacher_steps,
    }

    def make(folder: Path) -> dict[str, Any]:
        model = new_model(trained_config(flags, padded_size(data.tokenizer), data.classes), seed)
        own = dataclasses.replace(run, flags=own_flags, args=own_args, data=data.with_seed(seed))
        trainer = make_trainer(own, model, "teacher", method=METHODS["scratch"])
        trainer.train()
        trainer.save_model(str(folder))
        return trainer.trained

    return cached(run.cache, "teacher", settings, make, by_all=True, says=True)


def _judged(run: Run, teacher: Teacher) -> Outcome:
    """Return how a teacher does, which answers all held-out data for that only once."""
    settings = {
        "version": [VERSION, fastkd.__version__, transformers.__version__],
        "teacher": teacher.facts["digest"],
        "data": run.data.digest,
        "decoding": decoding(run),
        "precision": [run.args.bf16, run.args.fp16],
        "examples": run.flags.report_examples,
    }

    def make(folder: Path) -> dict[str, Any]:
        trainer = make_trainer(run, teacher.model, "teacher", method=METHODS["scratch"])
        return judge(run, trainer, "teacher").to_json()

    outcome = Outcome.from_json(cached(run.cache, "outcome", settings, make, by_all=True, says=True)[1])
    if not teacher.is_loaded:  # nor is it for what it cost when it was judged
        return outcome
    return dataclasses.replace(outcome, cost=cost.measure(teacher.model))  # of this machine


def check_knows_task(run: Run, teacher: Teacher) -> None:
    """Raise InputError if all figures of the task are 0 for a teacher, which was then not fine-tuned for it."""
    name, task = run.flags.teacher, run.data.task.name
    figures = teacher.outcome.metrics
    if figures and not any(figure > 0 for figure in figures.values()):
        raise InputError(
            f"--teacher {name} does not know {task} ({', '.join(figures)}: 0): expected one that is "
            f"fine-tuned, as by fastkd-train --method scratch --student {name} --task {task}"
        )
