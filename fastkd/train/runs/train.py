"""Train one student."""

from __future__ import annotations

from ..flags.arguments import TransformersArguments
from ..flags.fields import FastkdArguments
from ..stages.folders import running
from ..stages.students import train_student
from .facts import facts_of
from .left import leave
from .prepared import prepare


def train(flags: FastkdArguments, args: TransformersArguments) -> None:
    """Train one student by `flags.method` into `args.output_dir`: its save_pretrained folder, checkpoints, a report.

    Raises InputError before anything is written if the folder holds files already and neither resuming nor
    overwriting was asked for, or if the run cannot be resumed.
    """
    ready, method = prepare(flags, args), flags.objective
    config = flags.config_text(args)
    with running(ready.out, ready.is_used, ready.identity, config):  # only now, when no input can turn out bad any more
        trainer, outcome = train_student(ready.run, flags.method, method, ready.teacher, ready.checkpoint)
        outcomes = [ready.teacher.outcome, outcome] if ready.teacher else [outcome]
        leave(ready, trainer, outcomes, facts_of(ready, method, trainer.model, trainer.teacher, flags.method))
