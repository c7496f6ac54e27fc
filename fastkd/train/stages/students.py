"""The student of a run: its first weights, its training, what it is worth."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from ..common.family import family_of
from ..data.pairs import Pairs, class_labels
from ..models.architectures import enct5_config, enct5_from
from ..models.student import is_tied, new_model, slice_teacher, with_classes
from ..models.tokenizer import padded_size
from ..objectives.methods import Method
from ..report.outcome import Outcome
from ..teaching.cached import Numbered, collated
from ..training.trainer import DistillTrainer
from .given import Teacher
from .identity import examples_per_step
from .judging import judge, written
from .planning import planned_config
from .prepare import Data, heading
from .run import Run
from .trainers import end_reports, make_trainer


def train_student(
    run: Run,
    name: str,
    method: Method,
    teacher: Teacher | None,
    checkpoint: Path | None = None,
) -> tuple[DistillTrainer, Outcome]:
    """Train the student by a method. Its shape, first weights and data depend on the flags, not on the method.

    But the first weights are only a slice of the teacher for a method that starts so: the baseline is from scratch.
    """
    its = run.given.configs.get("student") or run.given.configs.get("teacher")
    heading(f"Student: {name} ({(method.on(its) if its else method).summary})")
    if run.flags.labelled_examples:
        run = dataclasses.replace(run, data=_labelled(run, teacher if method.needs_teacher else None))
    data = run.data
    student = copy.deepcopy(run.given.student)  # another student of the same run starts from it too
    if student is not None and run.given.kind == "classifier":
        student = _with_head(student, data.classes, run)
    if student is None:
        student = new_student(run, teacher)
        if teacher and method.student_init == "slice":
            slice_teacher(student, teacher.model)
    objective: dict[str, Any] = {"method": method, "teacher": None}
    if teacher and method.needs_teacher:
        objective["teacher"] = teacher.cached or teacher.model
        if teacher.cached:
            teacher.let_go()
            train, collate = Numbered(data.train, teacher.cached.epochs), collated(data.collate)
            run = dataclasses.replace(run, data=dataclasses.replace(data, train=train, collate=collate))
    trainer = make_trainer(run, student, name, reports=name == run.flags.method, **objective)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    outcome = judge(run, trainer, name)
    end_reports(trainer)
    return trainer, outcome


def _with_head(student: Any, classes: Sequence[str], run: Run) -> Any:
    """Return a student that was given as a classifier: itself, or with a new head if it has none."""
    if family_of(student.config).name == "T5":
        return enct5_from(student, classes)
    if any(student.config.id2label.values()):
        if any(classes):  # by the names that the data has for them, which the model need not have told
            student.config.id2label = dict(enumerate(classes))
            student.config.label2id = {name: i for i, name in enumerate(classes)}
        return student
    names = list(classes) if any(classes) else ["score"]
    print(f"student {run.flags.student} has no head for {', '.join(names[:9])}: it starts with a random one")
    return with_classes(student, names, run.args.seed)


def _labelled(run: Run, teacher: Teacher | None) -> Data:
    """Return the data as a student learns it: with the targets of `--labelled_examples`, drawn by the seed.

    Those of the others are what the teacher writes (sequence-level distillation, Kim and Rush, 2016), as many as the
    run reads; without a teacher there are no others.
    """
    args, data = run.args, run.data
    rows = data.train.rows.shuffle(seed=run.seed)
    known = rows.take(min(run.flags.labelled_examples or 0, len(rows)))
    if teacher and len(known) < len(rows):
        others = rows.skip(len(known))
        if args.max_steps > 0:
            others = others.take(min(args.max_steps * examples_per_step(args), len(others)))
        texts = written(run, teacher.model, others, "the teacher's answers")
        # Of a prompt that is gone on with behind a space, as the data does.
        begins = (target[: len(target) - len(target.lstrip())] for target in others["target"])
        texts = [begin + text for begin, text in zip(begins, texts, strict=True)]
        labels = class_labels(texts, data.classes) if data.classes else data.train.answers(data.tokenizer, texts)
        answers = datasets.Dataset.from_dict({**others.to_dict(), "target": texts, "labels": labels}, rows.features)
        known = datasets.concatenate_datasets([known, answers])
    return dataclasses.replace(data, train=Pairs(known, data.train.is_causal))


def new_student(run: Run, teacher: Teacher | None) -> Any:
    """Return a student with random weights, of the variant of a teacher if the flags ask for a slice of it.

    Of a teacher's family and vocabulary also where the method needs none, so that baselines are of the same shape.
    """
    flags, data, seed = run.flags, run.data, run.args.seed
    its = teacher.config if teacher else run.given.configs.get("teacher")
    config = planned_config(flags.objective, its, flags.student_d_model, flags.student_layers)
    if teacher and flags.objective.student_init == "slice":
        return new_model(config, seed, tied=is_tied(teacher.model))
    if family_of(config).name.endswith("T5"):
        config.vocab_size = its.vocab_size if its is not None else padded_size(data.tokenizer)
        config.pad_token_id = config.decoder_start_token_id = data.tokenizer.pad_token_id
        config.eos_token_id = data.tokenizer.eos_token_id
        config = enct5_config(config, data.classes) if data.classes else config
    return new_model(config, seed)
