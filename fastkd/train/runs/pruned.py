"""Prune a teacher, and distil what is left of it in rounds."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from ..common.cache import copy_folder
from ..flags.arguments import TransformersArguments
from ..flags.fields import FastkdArguments
from ..minidisc.prune import order_of
from ..minidisc.ranking import held_out_for_importance, rank
from ..minidisc.rounds import Distiller, Model, check_schedule, run_schedule
from ..objectives.methods import METHODS
from ..stages.judging import judge
from ..stages.prepare import heading
from ..stages.teachers import check_knows_task
from ..stages.trainers import make_trainer
from .left import facts_of, leave, save
from .prepared import prepare


def pruned(flags: FastkdArguments, args: TransformersArguments) -> None:
    """Prune the teacher and distil what is left by the flags' schedule into `args.output_dir`; see the room `minidisc`.

    The folder holds the student, its report, and the folder `assistant` if one came between. Rounds that are done are
    kept in the cache, from which `--resume_from_checkpoint last` and other runs take them.
    Raises InputError as `train` does, and for a teacher that does not know the task, or a target that leaves nothing.
    """
    ready, method = prepare(flags, args), flags.objective
    teacher = ready.teacher
    assert teacher is not None
    if ready.run.given.teacher is not None:
        check_knows_task(ready.run, teacher)
    heading("Importance of heads and neurons")
    ready.run, examples = held_out_for_importance(ready.run)
    run = ready.run
    scores, key = rank(run, examples, teacher.model)
    distiller = Distiller(run, scores, ready.out / "rounds", ready.checkpoint is not None)
    check_schedule(distiller, teacher.model)

    with ready.running():
        first = Model(teacher.name, key, teacher.model, order_of(scores))
        schedule, models = run_schedule(distiller, first)
        # The models of the schedule's best trial, and the last of its assistants.
        names = [f"assistant {100 * sparsity:g} %" for sparsity in schedule.chosen.assistants] + [flags.method]
        outcomes = [teacher.outcome]
        for name, made in zip(names, models, strict=True):
            trainer = make_trainer(run, made.load(), name, method=METHODS["scratch"])
            outcomes.append(dataclasses.replace(judge(run, trainer, name), **made.trained))
        if len(models) > 1:
            copy_folder(Path(models[-2].folder), ready.out / "assistant")
        facts = facts_of(ready, method, trainer.model, teacher.model, flags.method)
        facts |= {"pruned": f"{100 * schedule.target:g} %", "schedule_gflops": round(schedule.gflops, 1)}
        save(run, trainer, method, facts, outcomes, ready.out)
        leave(ready, outcomes, facts, schedule)
        shutil.rmtree(distiller.work, ignore_errors=True)
