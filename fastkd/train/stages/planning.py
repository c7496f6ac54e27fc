"""Of which sizes models will be, and whether a run can work, before anything is made."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Trainer, get_scheduler

from ..common.errors import InputError
from ..common.family import family_of, is_enct5
from ..flags.arguments import TransformersArguments
from ..flags.fields import FastkdArguments
from ..models.architectures import enct5_config
from ..models.student import smaller_config, student_config, t5_config
from ..objectives.methods import Method
from ..training.guards import check_arguments
from .given import Given


def planned_config(method: Method, teacher: Any, d_model: int | None, layers: int | None) -> Any:
    """Return the config that a new student will have, but for its vocabulary; teacher: that of its teacher, if any.

    Raises ValueError if it cannot be sliced from the teacher.
    """
    if method.prunes:
        return teacher
    if method.student_init == "slice":
        return smaller_config(teacher, d_model, layers)
    plain = student_config(teacher, d_model, layers)
    return enct5_config(plain, ["?"]) if teacher and is_enct5(teacher) else plain


def trained_config(flags: FastkdArguments, rows: int, classes: Sequence[str] = ()) -> Any:
    """Return the config of the teacher that `--train_teacher` makes, an EncT5's with classes; None without the flag."""
    if not flags.train_teacher:
        return None
    assert flags.teacher_d_model and flags.teacher_layers  # the flags are checked
    config = t5_config(rows, flags.teacher_d_model, flags.teacher_layers)
    return enct5_config(config, classes) if classes else config


def configs(
    flags: FastkdArguments, method: Method, given: Mapping[str, Any], kind: str, rows: int = 2
) -> tuple[Any, Any]:
    """Return the configs of (student, teacher): those that are given, by their roles, or of what the run makes.

    rows: of the embeddings where no teacher's tells. Raises ValueError as `planned_config` does.
    """
    classes = ["?"] if kind == "classifier" else []
    teacher, student = given.get("teacher") or trained_config(flags, rows, classes), given.get("student")
    if student is None:
        student = copy.copy(planned_config(method, teacher, flags.student_d_model, flags.student_layers))
        student.vocab_size = teacher.vocab_size if teacher else rows
    return enct5_config(student, classes) if classes and family_of(student).name == "T5" else student, teacher


def check_objective(flags: FastkdArguments, method: Method, given: Given) -> None:
    """Raise InputError if the method cannot compare the student with the teacher: one that was given, or the trained.

    Or if the student cannot be sliced from it. Before anything else is made, so that nobody waits for a teacher that is
    of no use.
    """
    try:
        student, teacher = configs(flags, method, given.configs, given.kind)
        method.check_fits(student, teacher or student)
    except ValueError as error:
        raise InputError(f"--{error}") from error


def check_optimizer(args: TransformersArguments) -> None:
    """Raise InputError if the optimizer or the schedule cannot be made, before anybody waits for a teacher.

    Or if the best checkpoint, which is to be loaded, might be none.
    """
    check_arguments(args)
    parameter = torch.nn.Parameter(torch.zeros(8, 8))
    warmup, steps, schedule = args.get_warmup_steps(100), 100, args.lr_scheduler_kwargs
    assert not isinstance(schedule, str)  # it was one on the command line
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind([parameter], **{k: v for k, v in options.items() if k not in ("params", "optimizer_dict")})
        get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps, schedule)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise InputError(f"--optim or --lr_scheduler_type: {' '.join(str(error).split())}") from error
