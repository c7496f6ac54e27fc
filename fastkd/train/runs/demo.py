"""Distil a student and train the same one without its teacher, to be compared at a glance."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..common.cache import copy_folder, replace_folder
from ..common.errors import InputError
from ..flags.arguments import EMBEDDING_FACTOR, TransformersArguments
from ..flags.fields import FastkdArguments
from ..objectives.methods import METHODS
from ..report import reports
from ..stages.folders import DEMO, write_json
from ..stages.students import train_student
from .facts import compared, facts_of
from .left import save, write_report
from .prepared import prepare


def demo(flags: FastkdArguments, args: TransformersArguments) -> None:
    """Distil a student and train the same one without its teacher; write all, the teacher and a report to output_dir.

    All students take as many steps. Those without a teacher learn from labels: one from scratch and, if the distilled
    one is sliced from its teacher, one that is too, so that what the start gives and what the loss gives can be told
    apart. Another demo in the same folder reuses data and teacher from the cache, and replaces the students.
    Raises InputError before anything is written if output_dir holds files that no demo made.
    """
    if args.resume_from_checkpoint:
        raise InputError("--demo has no checkpoints to resume from: run it again, it reuses the teacher")
    if args.load_best_model_at_end:
        raise InputError("--demo keeps no checkpoints, so there is no best one: leave --load_best_model_at_end away")
    args = replace(args, save_strategy="no")
    ready, method = prepare(flags, args), flags.objective
    run, out, teacher = ready.run, ready.out, ready.teacher
    assert teacher is not None

    write_json(out / DEMO, ready.identity)
    outcomes = [teacher.outcome]
    if Path(teacher.source).is_dir():
        copy_folder(Path(teacher.source), out / "teacher")
    arms = {"scratch": METHODS["scratch"], flags.method: method}
    if method.student_init == "slice" and run.given.student is None:
        start = replace(METHODS["scratch"], student_init="slice", summary="cross-entropy, from a slice of the teacher")
        arms = {"scratch": METHODS["scratch"], "sliced start": start, flags.method: method}
    for name, objective in arms.items():
        own = flags
        if objective.student_init == "random" and run.given.student is None:
            rate = flags.embedding_learning_rate or EMBEDDING_FACTOR * args.learning_rate
            own = replace(flags, embedding_learning_rate=rate)
        trainer, outcome = train_student(replace(run, flags=own), name, objective, teacher)
        outcomes.append(outcome)
        facts = facts_of(replace(ready, run=replace(run, flags=own)), objective, trainer.model, trainer.teacher, name)
        shown = outcomes if objective.needs_teacher else [outcome]
        folder = out / ("student" if objective is method else name.replace(" ", "-"))
        replace_folder(folder, partial(save, run, trainer, objective, facts, shown))
    lead = compared(run, outcomes)
    examples = write_report(ready, outcomes, facts, lead=[lead])
    print("\n".join(["", lead, "", reports.at_a_glance(outcomes, examples), "", reports.verdict(outcomes)]))
    print(f"More in report.html; models in {out} ({time.perf_counter() - ready.started:.0f} s)")
