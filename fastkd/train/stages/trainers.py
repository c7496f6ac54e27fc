"""Trainers on a run's data, and what they report to."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from typing import Any

from ..common.errors import InputError
from ..common.processes import is_first
from ..training.trainer import DistillTrainer
from .judging import score
from .run import Run


def make_trainer(
    run: Run,
    model: Any,
    title: str,
    *,
    kind: type[DistillTrainer] = DistillTrainer,
    scores: bool | None = None,
    reports: bool = False,
    **objective: Any,
) -> DistillTrainer:
    """Return a trainer of `model` on the run's data.

    scores: whether evaluations give the task's figures too; by default if the flags ask for it. reports: whether it
    writes to what `--report_to` names, where one run is of one model. objective: `method` and what goes with it (see
    `kind`).
    """
    flags, args, data = run.flags, run.args, run.data
    args = args if reports or not args.report_to else dataclasses.replace(args, report_to="none")
    scores = args.predict_with_generate if scores is None else scores
    args = copy.copy(args)
    args.predict_with_generate = False  # `score` does
    try:
        trainer = kind(
            model=model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            data_collator=data.collate,
            processing_class=data.tokenizer,
            workspace_mb=flags.workspace_mb,
            embedding_learning_rate=flags.embedding_learning_rate,
            projection_learning_rate=flags.projection_learning_rate,
            cka_over_processes=flags.cka_over_processes,
            score=(lambda model: score(run, model, None)[0]) if scores and data.task.metrics else None,
            **objective,
        )
    except (ValueError, TypeError, ImportError, RuntimeError) as error:  # what transformers says of its own flags
        raise InputError(" ".join(str(error).split())) from error
    trainer.show_progress(title)
    return trainer


def end_reports(trainer: DistillTrainer) -> None:
    """End the runs of trackers that would go on with the next model's."""
    for name in trainer.args.report_to or ():
        if name in ("wandb", "trackio", "swanlab") and is_first():
            importlib.import_module(name).finish()
