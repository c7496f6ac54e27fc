"""Train a student, or the students that a demo compares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..common.cache import copy_folder
from ..common.errors import InputError
from ..flags.arguments import EMBEDDING_FACTOR, TransformersArguments
from ..flags.fields import FastkdArguments
from ..objectives.methods import METHODS, Method
from ..stages.run import Run
from ..stages.students import train_student
from .left import facts_of, leave, save
from .prepared import prepare


def train(flags: FastkdArguments, args: TransformersArguments) -> None:
    """Train one student by `flags.method` into `args.output_dir`: its save_pretrained folder, checkpoints, a report.

    A demo trains the same student without its teacher, too, and puts every model into a folder of its own, the
    teacher's too. Another one in the same folder reuses data and teacher from the cache, and replaces the students.
    Raises InputError before anything is written if the folder holds files already and neither resuming nor
    overwriting was asked for, or for a demo files that no demo made; or if the run cannot be resumed.
    """
    if flags.demo:
        if args.resume_from_checkpoint or args.load_best_model_at_end:
            given = "resume_from_checkpoint" if args.resume_from_checkpoint else "load_best_model_at_end"
            raise InputError(f"--demo keeps no checkpoints for --{given}: run it again, it reuses the teacher")
        args = replace(args, save_strategy="no")
    ready = prepare(flags, args)
    teacher, out = ready.teacher, ready.out
    outcomes = [teacher.outcome] if teacher else []
    with ready.running():  # only now, when no input can turn out bad any more
        if flags.demo and teacher and Path(teacher.name).is_dir():
            copy_folder(Path(teacher.name), out / "teacher")
        for name, method in _methods(ready.run).items():
            own = replace(ready, run=_with_rate(ready.run, method))
            trainer, outcome = train_student(own.run, name, method, teacher, ready.checkpoint)
            outcomes.append(outcome)
            facts = facts_of(own, method, trainer.model, trainer.teacher, name)
            folder = out / ("student" if name == flags.method else name.replace(" ", "-")) if flags.demo else out
            save(ready.run, trainer, method, facts, outcomes if method.needs_teacher else [outcome], folder)
        leave(ready, outcomes, facts)


def _methods(run: Run) -> dict[str, Method]:
    """Return by which methods students are trained, the flags' own last, all for as many steps.

    Those of a demo without a teacher learn from labels: one from scratch and, if the distilled one is sliced from its
    teacher, one that is too, so that what the start gives and what the loss gives can be told apart.
    """
    flags, scratch = run.flags, METHODS["scratch"]
    methods = {"scratch": scratch} if flags.demo else {}
    if flags.demo and flags.objective.student_init == "slice" and run.given.student is None:
        summary = "cross-entropy, from a slice of the teacher"
        methods["sliced start"] = replace(scratch, student_init="slice", summary=summary)
    return {**methods, flags.method: flags.objective}


def _with_rate(run: Run, method: Method) -> Run:
    """Return the run with a rate of its own for an embedding that starts at random, if it has none."""
    rate = run.flags.embedding_learning_rate or EMBEDDING_FACTOR * run.args.learning_rate
    starts_random = method.student_init == "random" and run.given.student is None
    return replace(run, flags=replace(run.flags, embedding_learning_rate=rate)) if starts_random else run
