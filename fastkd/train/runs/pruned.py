"""Prune a teacher, and distil what is left of it in rounds."""

from __future__ import annotations

import shutil
from typing import Any

from ..common.cache import copy_folder
from ..flags.arguments import TransformersArguments
from ..flags.fields import FastkdArguments
from ..minidisc.prune import order_of
from ..minidisc.ranking import held_out_for_importance, rank
from ..minidisc.rounds import Distiller, Parent
from ..minidisc.trials import check_schedule, run_schedule
from ..stages.folders import running
from ..stages.prepare import heading
from ..stages.teachers import check_knows_task
from ..stages.trainers import judge_saved
from .facts import facts_of
from .left import leave
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
    check_schedule(run, scores, teacher.model.config)

    with running(ready.out, ready.is_used, ready.identity, flags.config_text(args)):
        resuming, work = ready.checkpoint is not None, ready.out / "rounds"
        distiller = Distiller(run, scores, work, resuming)
        first = Parent(teacher.model, teacher.source, None, order_of(scores), key)
        schedule, results = run_schedule(distiller, first)
        # The models of the schedule's best trial, and the last of its assistants.
        names = [f"assistant {100 * result.round.chosen:g} %" for result in results[:-1]] + [flags.method]
        judged = [judge_saved(run, name, done) for name, done in zip(names, results, strict=True)]
        trainer: Any = judged[-1][0]
        facts = facts_of(ready, method, trainer.model, teacher.model, flags.method)
        facts |= {"pruned": f"{100 * schedule.target:g} %", "schedule_gflops": round(schedule.gflops, 1)}
        if len(results) > 1:
            copy_folder(results[-2].folder, ready.out / "assistant")
        leave(ready, trainer, [teacher.outcome, *(outcome for _, outcome in judged)], facts, schedule)
        shutil.rmtree(work, ignore_errors=True)
