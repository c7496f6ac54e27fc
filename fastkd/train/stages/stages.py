"""The stages of a run after its data: teacher, student, and what both are worth. Each prints a heading."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import Trainer, get_scheduler

import fastkd

from ..common import endings
from ..common.cache import cached
from ..common.errors import InputError
from ..common.family import is_enct5
from ..common.processes import is_first
from ..data.examples import Classes, Pairs
from ..flags.arguments import EMBEDDING_FACTOR, TransformersArguments
from ..flags.fields import FastkdArguments, chosen_method
from ..judge import cost
from ..judge.evaluate import classify, generate
from ..judge.metrics import score_rows
from ..models.architectures import enct5_config, enct5_from
from ..models.loading import load_config, load_model, unsharded
from ..models.student import is_tied, new_model, slice_teacher, smaller_config, student_config, t5_config
from ..models.tokenizer import padded_size, special_tokens
from ..objectives.methods import METHODS, Method
from ..report.outcome import Outcome
from ..training.guards import check_arguments
from ..training.trainer import DistillTrainer
from .folders import write_json
from .given import Given, load_teacher
from .identity import digest, examples_per_step, recipe
from .prepare import VERSION, Data, get_data, heading, with_classes


@dataclass
class Teacher:
    """A teacher, the save_pretrained folder it came from (or its name), and how it did."""

    model: Any
    source: str
    outcome: Outcome


def data_seed(args: TransformersArguments) -> int:
    """Return the seed of orders and corruptions."""
    return args.seed if args.data_seed is None else args.data_seed


def get_run_data(flags: FastkdArguments, args: TransformersArguments, cache: Path, given: Given) -> Data:
    """Return the data of a run, with classes for an EncT5."""
    data = get_data(flags, cache, data_seed(args), given.tokenizer)
    return with_classes(data, given.classes) if given.architecture == "enct5" else data


def planned_config(method: Method, teacher: Any, d_model: int | None, layers: int | None) -> Any:
    """Return the `T5Config` that a new student will have, but for its vocabulary; teacher: that of its teacher, if any.

    Raises ValueError if it cannot be sliced from the teacher.
    """
    if method.student_init == "prune":
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


def check_objective(flags: FastkdArguments, method: Method, given: Given) -> None:
    """Raise InputError if the method cannot compare the student with the teacher: one that was given, or the trained.

    Or if the student cannot be sliced from it. Before anything else is made, so that nobody waits for a teacher that is
    of no use.
    """
    classes = ["?"] if given.architecture == "enct5" else []
    teacher = given.configs.get("teacher") or trained_config(flags, 2, classes)
    try:
        student = given.configs.get("student")
        student = student or planned_config(method, teacher, flags.student_d_model, flags.student_layers)
        if classes and not is_enct5(student):
            student = enct5_config(student, classes)
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


def get_teacher(flags: FastkdArguments, args: TransformersArguments, cache: Path, data: Data, given: Given) -> Teacher:
    """Return the teacher that was given, or one trained on this run's data, from the cache if it was trained before."""
    if given.teacher is not None:
        heading(f"Teacher: {flags.teacher}")
        outcome = _judged(flags, args, cache, data, given.teacher, given.digests["teacher"])
        return Teacher(given.teacher, str(flags.teacher), outcome)
    heading("Teacher: a T5 trained from scratch")
    rate, seed = flags.teacher_learning_rate, args.seed + 1  # other corruptions and orders than the student will see
    own_flags = dataclasses.replace(flags, embedding_learning_rate=EMBEDDING_FACTOR * rate)
    own: dict[str, Any] = {"max_steps": flags.teacher_steps or 0, "learning_rate": rate, "seed": seed}
    keeps: dict[str, Any] = {"save_strategy": "no", "load_best_model_at_end": False}
    own_args = dataclasses.replace(args, data_seed=None, **own, **keeps)
    settings = {
        "version": VERSION,
        "data": data.digest,
        "layers": flags.teacher_layers,
        "d_model": flags.teacher_d_model,
        **recipe(own_args),
        "max_steps": flags.teacher_steps,
    }

    def make(folder: Path) -> None:
        model = new_model(trained_config(flags, padded_size(data.tokenizer), data.classes), seed)
        trainer = make_trainer(own_flags, own_args, data.with_seed(seed), model, "teacher", method=METHODS["scratch"])
        trainer.train()
        trainer.save_model(str(folder))
        if is_first():
            write_json(folder / "training.json", trainer.trained)

    folder, _ = cached(cache, "teacher", settings, make, by_all=True, says=True)
    model = load_teacher(flags, args, folder, load_config(folder, "teacher"))
    trained = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    outcome = _judged(flags, args, cache, data, model, digest(model))
    return Teacher(model, str(folder), dataclasses.replace(outcome, **trained))


def _judged(
    flags: FastkdArguments, args: TransformersArguments, cache: Path, data: Data, model: Any, known: str
) -> Outcome:
    """Return how a teacher does, which answers all held-out data for that only once. known: its fingerprint."""
    settings = {
        "version": [VERSION, fastkd.__version__, transformers.__version__],
        "teacher": known,
        "data": data.digest,
        "decoding": decoding(args, data),
        "precision": [args.bf16, args.fp16],
        "examples": flags.report_examples,
    }

    def make(folder: Path) -> None:
        trainer = make_trainer(flags, args, data, model, "teacher", method=METHODS["scratch"])
        outcome = judge(flags, args, data, trainer, "teacher")
        if is_first():
            write_json(folder / "outcome.json", outcome.to_json())

    folder, _ = cached(cache, "answers", settings, make, by_all=True, says=True)
    outcome = Outcome.from_json(json.loads((folder / "outcome.json").read_text(encoding="utf-8")))
    return dataclasses.replace(outcome, cost=cost.measure(model))  # of this machine


def check_knows_task(flags: FastkdArguments, data: Data, teacher: Teacher) -> None:
    """Raise InputError if all figures of the task are 0 for a teacher, which was then not fine-tuned for it."""
    figures = teacher.outcome.metrics
    if figures and not any(figure > 0 for figure in figures.values()):
        raise InputError(
            f"--teacher {flags.teacher} does not know {data.task.name} ({', '.join(figures)}: 0): expected one that is "
            f"fine-tuned, as by fastkd-train --method scratch --student {flags.teacher} --task {data.task.name}"
        )


def judge_saved(
    flags: FastkdArguments, args: TransformersArguments, data: Data, name: str, result: Any
) -> tuple[DistillTrainer, Outcome]:
    """Return (a trainer of its model, how it did) for a round of `minidisc` that is done."""
    model, _ = load_model(result.folder, "student")
    trainer = make_trainer(flags, args, data, model, name, method=METHODS["scratch"])
    outcome = judge(flags, args, data, trainer, name)
    return trainer, dataclasses.replace(outcome, **result.trained)


def train_student(
    flags: FastkdArguments,
    args: TransformersArguments,
    data: Data,
    name: str,
    method: Method,
    teacher: Teacher | None,
    given: Given,
    checkpoint: Path | None = None,
) -> tuple[DistillTrainer, Outcome]:
    """Train the student by a method. Its shape, first weights and data depend on the flags, not on the method.

    But the first weights are only a slice of the teacher for a method that starts so: the baseline is from scratch.
    """
    heading(f"Student: {name} ({method.summary})")
    if flags.labelled_examples:
        data = _labelled(flags, args, data, teacher if method.needs_teacher else None)
    student = copy.deepcopy(given.student)  # another student of the same run starts from it too
    if student is not None and data.classes and not is_enct5(student.config):
        student = enct5_from(student, data.classes)
    if student is None:
        student = new_student(flags, data, teacher.model if teacher else None, args.seed)
        if teacher and method.student_init == "slice":
            slice_teacher(student, teacher.model)
    objective: dict[str, Any] = {"method": method, "teacher": teacher.model if teacher else None}
    trainer = make_trainer(flags, args, data, student, name, reports=name == flags.method, **objective)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    outcome = judge(flags, args, data, trainer, name)
    end_reports(trainer)
    return trainer, outcome


def end_reports(trainer: DistillTrainer) -> None:
    """End the runs of trackers that would go on with the next model's."""
    for name in trainer.args.report_to or ():
        if name in ("wandb", "trackio", "swanlab") and is_first():
            importlib.import_module(name).finish()


def _labelled(flags: FastkdArguments, args: TransformersArguments, data: Data, teacher: Teacher | None) -> Data:
    """Return the data as a student learns it: with the targets of `--labelled_examples`, drawn by the seed.

    Those of the others are what the teacher writes (sequence-level distillation, Kim and Rush, 2016), as many as the
    run reads; without a teacher there are no others.
    """
    rows = data.train.rows.shuffle(seed=data_seed(args))
    known = rows.take(min(flags.labelled_examples or 0, len(rows)))
    if teacher and len(known) < len(rows):
        others = rows.skip(len(known))
        if args.max_steps > 0:
            others = others.take(min(args.max_steps * examples_per_step(args), len(others)))
        texts = _written(teacher.model, args, data, others["input_ids"], "the teacher's answers")
        labels = data.tokenizer(text_target=texts)["input_ids"]
        answers = datasets.Dataset.from_dict({**others.to_dict(), "target": texts, "labels": labels}, rows.features)
        known = datasets.concatenate_datasets([known, answers])
    return dataclasses.replace(data, train=Classes(known, data.classes) if data.classes else Pairs(known))


def new_student(flags: FastkdArguments, data: Data, teacher: Any, seed: int) -> Any:
    """Return a student with random weights, of the teacher's variant of T5 if the flags ask for a slice of it."""
    width, layers, tokenizer = flags.student_d_model, flags.student_layers, data.tokenizer
    if chosen_method(flags).student_init == "slice":
        return new_model(smaller_config(teacher.config, width, layers), seed, tied=is_tied(teacher))
    config = student_config(teacher.config if teacher else None, width, layers)
    config.vocab_size = teacher.config.vocab_size if teacher else padded_size(tokenizer)
    config.pad_token_id = config.decoder_start_token_id = tokenizer.pad_token_id
    config.eos_token_id = tokenizer.eos_token_id
    return new_model(enct5_config(config, data.classes) if data.classes else config, seed)


def make_trainer(
    flags: FastkdArguments,
    args: TransformersArguments,
    data: Data,
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
    args = args if reports or not args.report_to else dataclasses.replace(args, report_to="none")
    scores = args.predict_with_generate if scores is None else scores
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
            score=(lambda model: score(model, args, data, None)[0]) if scores and data.task.metrics else None,
            **objective,
        )
    except (ValueError, TypeError, ImportError, RuntimeError) as error:  # what transformers says of its own flags
        raise InputError(" ".join(str(error).split())) from error
    trainer.show_progress(title)
    return trainer


def decoding(args: TransformersArguments, data: Data) -> dict[str, Any]:
    """Return by which settings all models of a run write."""
    most = args.generation_max_length or data.target_tokens
    return {"max_new_tokens": most, "num_beams": args.generation_num_beams or 1}


def score(model: Any, args: TransformersArguments, data: Data, title: str | None) -> tuple[dict[str, float], list[str]]:
    """Return (the task's figures, outputs) of what a model writes for all held-out examples; no figures for texts."""
    rows = data.held_out_rows
    outputs = _written(model, args, data, rows["input_ids"], title)
    is_text = data.task.name == "span_corruption"
    return {} if is_text or not outputs else score_rows(rows["task"], outputs, rows["target"]), outputs


def _written(model: Any, args: TransformersArguments, data: Data, sources: Any, title: str | None) -> list[str]:
    """Return what a model writes for sources, token ids."""
    common: Any = {"batch_size": args.per_device_eval_batch_size, "title": title}
    if data.classes:
        return classify(model, data.tokenizer, sources, **common)
    special, is_text = set(special_tokens(data.tokenizer).values()), data.task.name == "span_corruption"
    kept = special if is_text else special.intersection(chain.from_iterable(data.held_out_rows["labels"]))
    return generate(model, data.tokenizer, sources, kept=kept, **decoding(args, data), **common)


def judge(
    flags: FastkdArguments, args: TransformersArguments, data: Data, trainer: DistillTrainer, name: str
) -> Outcome:
    """Return how a model does after its training, if it had any: held-out loss, the task's figures, and its cost."""
    endings.begin(f"the evaluation of {name}")
    state = trainer.state
    model = unsharded(trainer.model) if state.global_step else trainer.model  # a student is small, a teacher may not be
    step = state.best_global_step if args.load_best_model_at_end else state.global_step  # of the weights it has now
    evaluated = [e for e in state.log_history if "eval_loss" in e and e["step"] == step and step]
    trainer.score = None  # what it writes is scored below, once
    final = evaluated[-1] if evaluated else trainer.evaluate()
    metrics, outputs = score(model, args, data, f"{name}: writing")
    return Outcome(
        name=name,
        parameters=cost.parameters(model),
        loss=final["eval_loss"],
        token_accuracy=final["eval_token_accuracy"],
        **trainer.trained,
        metrics=metrics,
        outputs=outputs[: flags.report_examples],
        cost=cost.measure(model),
    )
