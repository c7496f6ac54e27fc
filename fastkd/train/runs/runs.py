"""What fastkd-train does: `train` makes one student, `demo` compares two, both from the stages of a run."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import SAFE_WEIGHTS_NAME

import fastkd

from ..common.cache import copy_folder, replace_folder, write_whole
from ..common.errors import InputError, writing
from ..common.processes import be_patient, by_first
from ..data.corpus import EMBEDDED
from ..flags.arguments import EMBEDDING_FACTOR, TransformersArguments
from ..flags.fields import FastkdArguments, chosen_method
from ..judge.metrics import signatures
from ..minidisc import pages
from ..minidisc.prune import order_of
from ..minidisc.ranking import held_out_for_importance, rank
from ..minidisc.rounds import Distiller, Parent
from ..minidisc.schedule import Schedule
from ..minidisc.trials import check_schedule, run_schedule
from ..models.loading import load_config, load_model
from ..objectives.methods import METHODS, Method
from ..report import reports
from ..report.card import write_card
from ..report.outcome import Outcome
from ..report.page import table
from ..stages.folders import (
    DEMO,
    are_used,
    cache_folder,
    check_outside,
    is_used,
    output_folder,
    resumed,
    rounds,
    running,
    write_json,
)
from ..stages.given import Given, load_given
from ..stages.identity import check_same_run, examples_per_step, held_out_digest, identity
from ..stages.prepare import Data, heading
from ..stages.stages import (
    Teacher,
    check_knows_task,
    check_objective,
    check_optimizer,
    get_run_data,
    get_teacher,
    judge_saved,
    planned_config,
    train_student,
)
from ..training.checkpoints import last_checkpoint
from ..training.trainer import DistillTrainer


@dataclass
class _Run:
    """A run that may begin: nothing of what it needs is missing or bad. teacher: None where the method needs none."""

    flags: FastkdArguments
    args: TransformersArguments
    method: Method
    out: Path
    cache: Path
    is_used: bool
    checkpoint: Path | None
    given: Given
    data: Data
    identity: dict[str, Any]
    teacher: Teacher | None
    started: float


def _prepared(flags: FastkdArguments, args: TransformersArguments) -> _Run:
    """Return a run, its teacher trained and judged, but its folder as it was. Raises InputError if it cannot begin."""
    started, method = time.perf_counter(), chosen_method(flags)
    be_patient(args.ddp_timeout)
    prunes, resuming = method.student_init == "prune", args.resume_from_checkpoint is not None

    def places() -> tuple[Path, Path, bool, Path | None]:
        out, cache = output_folder(args), cache_folder(flags, args)
        used = is_used(flags, out, resuming)
        check_outside(out, flags, cache, used or flags.demo)
        return out, cache, used, rounds(args, out) if resuming and prunes else resumed(args, out)

    out, cache, used, checkpoint = by_first(places)
    check_optimizer(args)
    if checkpoint is not None and (checkpoint / SAFE_WEIGHTS_NAME).is_file():  # FSDP reads others, and all of them
        load_model(checkpoint, "checkpoint")
    # What is pruned is pruned as it is, and teaches in its own dtype.
    exact = replace(flags, teacher_dtype="float32") if prunes else flags
    given = load_given(exact, args)
    check_objective(flags, method, given)
    with writing("cache_dir", cache):
        data = get_run_data(flags, args, cache, given)
        now = identity(flags, args, given, data)
        if checkpoint is not None:
            by_first(lambda: check_same_run(checkpoint.parent, now))
        teacher = get_teacher(exact, args, cache, data, given) if method.needs_teacher or prunes else None
    return _Run(flags, args, method, out, cache, used, checkpoint, given, data, now, teacher, started)


def train(flags: FastkdArguments, args: TransformersArguments) -> None:
    """Train one student by `flags.method` into `args.output_dir`: its save_pretrained folder, checkpoints, a report.

    Raises InputError before anything is written if the folder holds files already and neither resuming nor
    overwriting was asked for, or if the run cannot be resumed.
    """
    run = _prepared(flags, args)
    with running(run.out, run.is_used, run.identity):  # only now, when no input can turn out bad any more
        trainer, outcome = train_student(
            flags, args, run.data, flags.method, run.method, run.teacher, run.given, run.checkpoint
        )
        outcomes = [run.teacher.outcome, outcome] if run.teacher else [outcome]
        _leave(run, trainer, outcomes, _facts(run, run.method, trainer.model, trainer.teacher, flags.method))


def pruned(flags: FastkdArguments, args: TransformersArguments) -> None:
    """Prune the teacher and distil what is left by the flags' schedule into `args.output_dir`; see `minidisc`.

    The folder holds the student, its report, and the folder `assistant` if one came between. Rounds that are done are
    kept in the cache, from which `--resume_from_checkpoint last` and other runs take them.
    Raises InputError as `train` does, and for a teacher that does not know the task, or a target that leaves nothing.
    """
    run = _prepared(flags, args)
    teacher = run.teacher
    assert teacher is not None
    if run.given.teacher is not None:
        check_knows_task(flags, run.data, teacher)
    heading("Importance of heads and neurons")
    run.data, examples = held_out_for_importance(flags, args, run.data)
    scores, key = rank(args, run.cache, run.data, examples, teacher.model)
    check_schedule(flags, run.method, run.data, scores, teacher.model.config)

    with running(run.out, run.is_used, run.identity):
        resuming, work = run.checkpoint is not None, run.out / "rounds"
        distiller = Distiller(flags, args, run.method, run.data, scores, run.cache, work, resuming)
        first = Parent(teacher.model, teacher.source, None, order_of(scores), key)
        schedule, results = run_schedule(distiller, first)
        # The models of the schedule's best trial, and the last of its assistants.
        names = [f"assistant {100 * result.round.chosen:g} %" for result in results[:-1]] + [flags.method]
        judged = [judge_saved(flags, args, run.data, name, done) for name, done in zip(names, results, strict=True)]
        trainer: Any = judged[-1][0]
        facts = _facts(run, run.method, trainer.model, teacher.model, flags.method)
        facts |= {"pruned": f"{100 * schedule.target:g} %", "schedule_gflops": round(schedule.gflops, 1)}
        if len(results) > 1:
            copy_folder(results[-2].folder, run.out / "assistant")
        _leave(run, trainer, [teacher.outcome, *(outcome for _, outcome in judged)], facts, schedule)
        shutil.rmtree(work, ignore_errors=True)


def _leave(
    run: _Run,
    trainer: DistillTrainer,
    outcomes: list[Outcome],
    facts: dict[str, Any],
    schedule: Schedule | None = None,
) -> None:
    """Write the student, its card and its report, and print the report's table."""
    _save(run, trainer, run.method, facts, outcomes, run.out)
    by_first(lambda: _report(run, outcomes, facts, schedule))
    where = f"Student, report.html and report.md in {run.out}"
    print("\n".join(["", table(outcomes), "", *_notes(run.method), where]))


def interpolated(flags: FastkdArguments, args: TransformersArguments) -> None:
    """Train an assistant of intermediate size by the method, then the student with the assistant as its teacher.

    "Interpolated distillation" of MiniEnD (Zhang et al., 2024), which the paper does not define: that there is one
    assistant, halfway between teacher and student in width and depth unless the flags say otherwise, is an assumption.
    The assistant's run is the folder `assistant` of output_dir, the student's the folder `student`; a run that was
    interrupted goes on with `--resume_from_checkpoint last` in whichever of the two it was.
    """
    out, resuming = output_folder(args), args.resume_from_checkpoint is not None
    method, teacher = chosen_method(flags), load_config(str(flags.teacher), "teacher")
    width, layers = flags.assistant_d_model, flags.assistant_layers
    try:  # of both runs, before the first of them
        student = planned_config(method, teacher, flags.student_d_model, flags.student_layers)
        layers = layers or round((teacher.num_layers + student.num_layers) / 2)
        if width is None and flags.student_d_model is not None:  # or it stays as wide as the teacher, too
            width = max(64, round((teacher.d_model + student.d_model) / 128) * 64)
        assistant = planned_config(method, teacher, width, layers)
        method.check_fits(assistant, teacher)
        method.check_fits(planned_config(method, assistant, flags.student_d_model, student.num_layers), assistant)
    except ValueError as error:
        who = f"{width or teacher.d_model} wide of {layers} layers a side"
        raise InputError(f"--{error} (with an assistant {who})") from error
    alone: dict[str, Any] = {"interpolated": False, "assistant_layers": None, "assistant_d_model": None}
    cache, overwriting = cache_folder(flags, args), flags.overwrite_output_dir or resuming
    check_outside(out, flags, cache, are_used(flags, args, out, ("assistant", "student")))
    flags = replace(flags, cache_dir=str(cache), overwrite_output_dir=overwriting, **alone)
    parts = {
        "assistant": replace(flags, student_layers=layers, student_d_model=width),
        "student": replace(
            flags, student_layers=student.num_layers, teacher=str(out / "assistant"), teacher_dtype="float32"
        ),
    }
    for name, part in parts.items():
        folder = out / name
        if resuming and (folder / "metrics.json").is_file():  # the last file that a run writes
            given = load_given(part, args)
            check_same_run(folder, identity(part, args, given, get_run_data(part, args, cache, given)))
            print(f"{name}: {folder} is complete")
            continue
        heading(f"Interpolated: the {name}, {part.student_layers} layers a side")
        last = "last" if resuming and last_checkpoint(folder) else None
        title = f"{args.run_name or out.name}, {name}"
        train(part, replace(args, output_dir=str(folder), run_name=title, resume_from_checkpoint=last))


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
    run = _prepared(flags, args)
    out, data, method, teacher = run.out, run.data, run.method, run.teacher
    assert teacher is not None

    write_json(out / DEMO, run.identity)
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
        trainer, outcome = train_student(own, args, data, name, objective, teacher, run.given)
        outcomes.append(outcome)
        facts = _facts(replace(run, flags=own), objective, trainer.model, trainer.teacher, name)
        compared = outcomes if objective.needs_teacher else [outcome]
        folder = out / ("student" if objective is method else name.replace(" ", "-"))
        replace_folder(folder, partial(_save, run, trainer, objective, facts, compared))
    lead = _compared(flags, data, outcomes)
    shown = _report(run, outcomes, facts, lead=[lead])
    print("\n".join(["", lead, "", reports.at_a_glance(outcomes, shown), "", reports.verdict(outcomes)]))
    print(f"More in report.html; models in {out} ({time.perf_counter() - run.started:.0f} s)")


def _compared(flags: FastkdArguments, data: Data, outcomes: Sequence[Outcome]) -> str:
    """Return what the demo compares, in words for those who do not know it."""
    teacher, *others, student = outcomes
    starts = {"scratch": "scratch (random first weights)", "sliced start": "sliced start (a slice of the teacher's)"}
    alone = " and ".join(starts[o.name] for o in others)
    labels, answers = "labels alone", ""
    if flags.labelled_examples:
        labels = f"{flags.labelled_examples:,} labelled examples alone"
        answers = " its answers to the other examples,"
    return (
        f"The teacher has {teacher.parameters / 1e6:.2f} million parameters and has learned {flags.task} from all "
        f"{len(data.train):,} training examples: {_texts(flags)}. The students, {student.parameters / 1e6:.2f} million "
        f"each, take {student.steps} steps. {alone} learn from {labels}; {student.name} has the teacher, too:{answers} "
        "its distributions and what else the method compares."
    )


def _save(
    run: _Run,
    trainer: DistillTrainer,
    method: Method,
    facts: dict[str, Any],
    outcomes: Sequence[Outcome],
    folder: Path,
) -> None:
    """Write a student, the configuration that repeats its run, and its model card.

    The card may be published, so it does not say where files lie.
    """
    trainer.save_model(str(folder))

    def describe() -> None:
        write_whole(folder / "config.yaml", run.flags.config_text(run.args))
        given = {name: Path(str(facts[name])) for name in ("texts", "teacher", "student") if name in facts}
        names = {name: path.name for name, path in given.items() if path.is_absolute() or path.exists()}
        teacher = run.flags.teacher if method.needs_teacher else None
        write_card(folder, method.summary, teacher, outcomes, facts | names, _notes(method))

    by_first(describe)


def _report(
    run: _Run,
    outcomes: Sequence[Outcome],
    facts: dict[str, Any],
    schedule: Schedule | None = None,
    lead: Sequence[str] = (),
) -> list[reports.Example]:
    """Write the report; return the examples that it shows."""
    rows = run.data.held_out_rows
    shown = rows.take(min(run.flags.report_examples, len(rows)))
    examples = list(zip(shown["source"], shown["target"], strict=True))
    besides = {"config": run.flags.config_text(run.args), **pages.shown(schedule)}
    reports.write(run.out, outcomes, facts, _notes(run.method), lead=lead, examples=examples, **besides)
    return examples


def _notes(method: Method) -> list[str]:
    """Return what a reader of the figures must know about the method."""
    notes = []
    if not method.vocabulary_terms:
        notes.append(
            "This method has no vocabulary term, so its student was not trained to predict tokens: held-out loss and "
            "token accuracy say little before it is fine-tuned."
        )
    if method.student_init == "prune":
        notes.append("Assistants and student started from the teacher's weights, without its pruned heads and neurons.")
    if method.student_init == "slice":
        notes.append("The distilled student started from a slice of its teacher; one from scratch starts at random.")
    return notes


def _texts(flags: FastkdArguments) -> str:
    """Return what to call the data."""
    return flags.train_file or flags.dataset_name or EMBEDDED[str(flags.embedded_data)]


_PREFIXES = {"summarization": "summarize: ", "translation": "translate .+? to .+?: "}


def _source_prefix(flags: FastkdArguments, data: Data) -> str:
    """Return what the flags, or else the task, put before every source; of GLUE before its first text."""
    if flags.source_prefix is not None:
        return flags.source_prefix
    name, is_glue = data.task.name, bool(data.task.splits)
    first = next(iter(data.held_out_rows["source"][:1]), "")
    found = re.match(_PREFIXES.get(name, rf"{name} \w+: " if is_glue else ""), first)
    return found[0] if found else ""


def _facts(run: _Run, method: Method, student: Any, teacher: Any, name: str) -> dict[str, Any]:
    """Return what a reader needs to judge or repeat the run of a student; teacher: None if it had none."""
    flags, args, data = run.flags, run.args, run.data
    facts: dict[str, Any] = {"method": name, "loss": method.formula}
    facts |= _settings(method, "temperature", "divergence", "divergence_beta")
    if method.places:
        layers = method.teacher_layers(teacher.config).items()
        facts |= _settings(method, "relation_heads")
        facts["teacher_layers"] = ", ".join(f"{layer} ({place})" for place, layer in layers)
    if method.hidden_terms:
        facts["matched_states"] = "; ".join(
            f"{stack} " + ", ".join(f"{mine} to {its}" for mine, its in pairs)
            for stack, pairs in method.matched_states(student.config, teacher.config).items()
        )
        facts |= _settings(method, "match_first_position")
    if method.mixup_terms:
        facts |= _settings(method, "mixup_alpha", "mixup_distance")
    if method.needs_teacher:
        own = flags.teacher_dtype == "auto"
        dtype = str(teacher.config.dtype).removeprefix("torch.") if own else flags.teacher_dtype
        facts |= {"teacher": flags.teacher or "trained on the same data", "teacher_dtype": dtype}
    prefix = _source_prefix(flags, data)
    return {
        **facts,
        **({"student": flags.student} if flags.student else {"student_init": method.student_init}),
        "task": flags.task,
        "texts": _texts(flags),
        **({"dataset_config": flags.dataset_config} if flags.dataset_config else {}),
        **data.facts,
        "held_out_data": held_out_digest(data),
        **({"tokens_per_chunk": flags.sequence_length} if flags.task == "span_corruption" else {}),
        **({"source_prefix": prefix} if prefix else {}),
        **signatures([data.task.name], data.held_out_rows["target"]),
        "decoding": f"{args.generation_num_beams} beams" if (args.generation_num_beams or 1) > 1 else "greedy",
        "pieces": len(data.tokenizer),
        "batch": examples_per_step(args),
        "learning_rate": args.learning_rate,
        "embedding_learning_rate": flags.embedding_learning_rate or args.learning_rate,
        "seed": args.seed,
        "seconds_in_all": round(time.perf_counter() - run.started, 1),
        "threads": torch.get_num_threads(),
        "fastkd": fastkd.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _settings(method: Method, *names: str) -> dict[str, Any]:
    return {name: getattr(method, name) for name in names}
