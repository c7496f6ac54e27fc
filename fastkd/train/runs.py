"""What fastkd-train does: `train` makes one student, `demo` compares two, both from the stages of a run."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import SAFE_WEIGHTS_NAME

import fastkd

from . import minidisc, report
from .arguments import FastkdArguments, TransformersArguments, chosen_method
from .cache import copy_folder, replace_folder
from .card import write_card
from .checkpoints import checkpoints, fault, last_checkpoint, recover
from .errors import InputError
from .loading import load_config, load_model
from .metrics import signatures
from .objectives import METHODS, Method
from .prepare import Data, heading
from .processes import by_first
from .prune import order_of
from .report import Outcome
from .schedule import Schedule
from .sharding import is_asked_for
from .stages import (
    Teacher,
    check_knows_task,
    check_objective,
    check_optimizer,
    examples_per_step,
    get_run_data,
    get_teacher,
    judge_saved,
    load_given,
    planned_config,
    recipe,
    train_student,
)
from .trainer import DistillTrainer


def train(flags: FastkdArguments, args: TransformersArguments) -> None:
    """Train one student by `flags.method` into `args.output_dir`: its save_pretrained folder, checkpoints, a report.

    Raises InputError before anything is written if the folder holds files already and neither resuming nor
    overwriting was asked for, or if the run cannot be resumed.
    """
    started, method = time.perf_counter(), chosen_method(flags)
    cache = _cache(flags, args)
    out = by_first(lambda: _output_folder(args))
    checkpoint = by_first(lambda: _checkpoint(args.resume_from_checkpoint, out))
    is_used = by_first(lambda: _check_unused(flags, out, checkpoint is not None))
    _check_outside(out, flags, cache)
    check_optimizer(args)
    if checkpoint is not None and (checkpoint / SAFE_WEIGHTS_NAME).is_file():  # FSDP reads others, and all of them
        load_model(checkpoint, "checkpoint")
    given = load_given(flags, args)
    check_objective(flags, method, given)
    data = get_run_data(flags, args, cache, given)
    identity = _identity(flags, args) | {"data": data.digest}
    if checkpoint is not None:
        by_first(lambda: _check_same_run(checkpoint.parent / "run.json", identity))
    teacher = get_teacher(flags, args, cache, data, given) if method.needs_teacher else None

    by_first(lambda: _begin(out, is_used, identity))  # only now, when no input can turn out bad any more
    trainer, outcome = train_student(flags, args, data, flags.method, method, teacher, given, checkpoint)
    outcomes = [teacher.outcome, outcome] if teacher else [outcome]
    facts, config = _trainers_facts(flags, args, data, trainer, flags.method, started), flags.config_text(args)
    trainer.save_model(str(out))
    by_first(lambda: _describe(out, flags, method, facts, outcomes, config))
    by_first(lambda: _report(out, flags, data, outcomes, facts, config, _notes(method)))
    print("\n".join(["", report.table(outcomes), "", *_notes(method), f"Student, report.html and report.md in {out}"]))


def _begin(out: Path, is_used: bool, identity: dict[str, Any]) -> None:
    """Make the run's folder, in place of another run's if it is used, and write down what the run is."""
    if is_used:
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "run.json", identity)


def pruned(flags: FastkdArguments, args: TransformersArguments) -> None:
    """Prune the teacher and distil what is left by the flags' schedule into `args.output_dir`; see `minidisc`.

    The folder holds the student, its report, and the folder `assistant` if one came between. Rounds that are done are
    kept in the cache, from which `--resume_from_checkpoint last` and other runs take them.
    Raises InputError as `train` does, and for a teacher that does not know the task, or a target that leaves nothing.
    """
    started, method, resuming = time.perf_counter(), chosen_method(flags), args.resume_from_checkpoint is not None
    out, cache = _output_folder(args), _cache(flags, args)
    if resuming and str(args.resume_from_checkpoint).lower() not in ("last", "true"):
        raise InputError(f"--method {flags.method} resumes with --resume_from_checkpoint last: it finds what is done")
    if resuming and not (out / "run.json").is_file():
        raise InputError(f"nothing to resume from: {out} holds no run")
    is_used = _check_unused(flags, out, resuming)
    _check_outside(out, flags, cache)
    check_optimizer(args)
    exact = replace(flags, teacher_dtype="float32")  # it is pruned as it is, and teaches in its own dtype
    given = load_given(exact, args)
    check_objective(flags, method, given)
    data = get_run_data(flags, args, cache, given)
    identity = _identity(flags, args) | {"data": data.digest}
    if resuming:
        _check_same_run(out / "run.json", identity)
    teacher = get_teacher(exact, args, cache, data, given)
    if given.teacher is not None:
        check_knows_task(flags, data, teacher)
    heading("Importance of heads and neurons")
    data, examples = minidisc.held_out_for_importance(flags, args, data)
    scores, key = minidisc.rank(args, cache, data, examples, teacher.model)
    minidisc.check_schedule(flags, method, data, scores, teacher.model.config)

    _begin(out, is_used, identity)
    distiller = minidisc.Distiller(flags, args, method, data, scores, cache, out / "rounds", resuming)
    first = minidisc.Parent(teacher.model, teacher.source, None, order_of(scores), key)
    schedule, results = minidisc.run_schedule(distiller, first)
    _leave_pruned(flags, args, out, data, method, teacher, schedule, results, started)


def _leave_pruned(
    flags: FastkdArguments,
    args: TransformersArguments,
    out: Path,
    data: Data,
    method: Method,
    teacher: Teacher,
    schedule: Schedule,
    results: Sequence[minidisc.Result],
    started: float,
) -> None:
    """Judge the models of the schedule's best trial; write the student, its last assistant, and the report."""
    names = [f"assistant {100 * result.round.chosen:g} %" for result in results[:-1]] + [flags.method]
    judged = [judge_saved(flags, args, data, name, result) for name, result in zip(names, results, strict=True)]
    trainer, outcomes = judged[-1][0], [teacher.outcome, *(outcome for _, outcome in judged)]
    student: Any = trainer.model
    facts = _facts(flags, args, data, method, student.config, teacher.model.config, flags.method, started)
    facts |= {"pruned": f"{100 * schedule.target:g} %", "schedule_gflops": round(schedule.gflops, 1)}
    config = flags.config_text(args)
    if len(results) > 1:
        copy_folder(results[-2].folder, out / "assistant")
    trainer.save_model(str(out))
    _describe(out, flags, method, facts, outcomes, config)
    _report(out, flags, data, outcomes, facts, config, _notes(method), schedule)
    shutil.rmtree(out / "rounds", ignore_errors=True)
    print("\n".join(["", report.table(outcomes), "", *_notes(method), f"Student, report.html and report.md in {out}"]))


def _check_unused(flags: FastkdArguments, out: Path, resuming: bool) -> bool:
    """Return whether the folder holds a run that is to be replaced; raise InputError if nobody asked for that."""
    is_used = not resuming and out.is_dir() and any(out.iterdir())
    if is_used and not flags.overwrite_output_dir:
        raise InputError(
            f"{out} already holds files: give --resume_from_checkpoint last, --overwrite_output_dir or another folder"
        )
    if is_used and not (out / "run.json").is_file():
        raise InputError(f"{out} holds files that no run of fastkd-train made, so they are not overwritten")
    return is_used


def interpolated(flags: FastkdArguments, args: TransformersArguments) -> None:
    """Train an assistant of intermediate size by the method, then the student with the assistant as its teacher.

    "Interpolated distillation" of MiniEnD (Zhang et al., 2024), which the paper does not define: that there is one
    assistant, halfway between teacher and student in width and depth unless the flags say otherwise, is an assumption.
    The assistant's run is the folder `assistant` of output_dir, the student's the folder `student`; a run that was
    interrupted goes on with `--resume_from_checkpoint last` in whichever of the two it was.
    """
    out, resuming = _output_folder(args), args.resume_from_checkpoint is not None
    if resuming and str(args.resume_from_checkpoint).lower() not in ("last", "true"):
        raise InputError("--interpolated resumes with --resume_from_checkpoint last: the checkpoint is found by itself")
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
    cache, overwriting = str(_cache(flags, args)), flags.overwrite_output_dir
    flags = replace(flags, cache_dir=cache, interpolated=False, assistant_layers=None, assistant_d_model=None)
    parts = {
        "assistant": replace(flags, student_layers=layers, student_d_model=width),
        "student": replace(
            flags, student_layers=student.num_layers, teacher=str(out / "assistant"), teacher_dtype="float32"
        ),
    }
    for name, part in parts.items():
        folder = out / name
        if resuming and (folder / "metrics.json").is_file():  # the last file that a run writes
            _check_same_run(folder / "run.json", _identity(part, args))
            print(f"{name}: {folder} is complete")
            continue
        heading(f"Interpolated: the {name}, {part.student_layers} layers a side")
        last = "last" if resuming and last_checkpoint(folder) else None
        part = replace(part, overwrite_output_dir=overwriting or resuming)
        train(part, replace(args, output_dir=str(folder), resume_from_checkpoint=last))


def demo(flags: FastkdArguments, args: TransformersArguments) -> None:
    """Distil a student and train the same one from scratch; write both, the teacher and a report to output_dir.

    Both students see the same data in the same order for as many steps, and start from the same weights, unless the
    distilled one is sliced from its teacher. Another demo in the same folder reuses corpus, tokenizer and teacher from
    the cache, and replaces the students.
    Raises InputError before anything is written if output_dir holds files that no demo made.
    """
    started, method = time.perf_counter(), chosen_method(flags)
    out, cache = _output_folder(args), _cache(flags, args)
    if args.resume_from_checkpoint:
        raise InputError("--demo has no checkpoints to resume from: run it again, it reuses the teacher")
    if args.load_best_model_at_end:
        raise InputError("--demo keeps no checkpoints, so there is no best one: leave --load_best_model_at_end away")
    if out.is_dir() and any(out.iterdir()) and not (out / "demo.json").is_file():
        raise InputError(f"{out} already holds files that no demo made: give --output_dir another folder")
    args = replace(args, save_strategy="no")
    _check_outside(out, flags, cache)
    check_optimizer(args)
    given = load_given(flags, args)
    check_objective(flags, method, given)
    data = get_run_data(flags, args, cache, given)
    teacher = get_teacher(flags, args, cache, data, given)

    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "demo.json", _identity(flags, args))
    outcomes, config = [teacher.outcome], flags.config_text(args)
    if Path(teacher.source).is_dir():
        copy_folder(Path(teacher.source), out / "teacher")
    for name, folder, objective in (("scratch", "scratch", METHODS["scratch"]), (flags.method, "student", method)):
        trainer, outcome = train_student(flags, args, data, name, objective, teacher, given)
        outcomes.append(outcome)
        facts = _trainers_facts(flags, args, data, trainer, name, started)
        compared = outcomes if objective.needs_teacher else [outcome]
        replace_folder(out / folder, _saver(trainer, flags, objective, facts, compared, config))
    _report(out, flags, data, outcomes, facts, config, _notes(method))
    print("\n".join(["", report.table(outcomes), "", report.verdict(outcomes), *_notes(method)]))
    print(f"Teacher, student, report.html, report.md and metrics.json in {out} ({time.perf_counter() - started:.0f} s)")


def _saver(trainer: DistillTrainer, *description: Any) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        trainer.save_model(str(folder))
        _describe(folder, *description)

    return save


def _describe(
    folder: Path,
    flags: FastkdArguments,
    method: Method,
    facts: dict[str, Any],
    outcomes: list[Outcome],
    config: str,
) -> None:
    """Write the configuration that repeats a student's run, and its model card, into the student's folder.

    The card may be published, so it does not say where files lie.
    """
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    places = {name: Path(str(facts[name])).name for name in ("texts", "teacher", "student") if _is_place(facts, name)}
    write_card(
        folder,
        method=outcomes[-1].name,
        summary=method.summary,
        teacher=flags.teacher if method.needs_teacher else None,
        outcomes=outcomes,
        facts=facts | places,
        config="",
        task=flags.task,
        prefix=facts.get("source_prefix", ""),
        notes=_notes(method),
    )


def _is_place(facts: dict[str, Any], name: str) -> bool:
    path = Path(str(facts.get(name, "")))
    return name in facts and (path.is_absolute() or path.exists())


def _report(
    out: Path,
    flags: FastkdArguments,
    data: Data,
    outcomes: list[Outcome],
    facts: dict[str, Any],
    config: str,
    notes: list[str],
    schedule: Schedule | None = None,
) -> None:
    shown = data.held_out_rows.take(min(flags.report_examples, len(data.held_out_rows)))
    examples = list(zip(shown["source"], shown["target"], strict=True))
    report.write(out, outcomes, facts, notes, examples=examples, config=config, schedule=schedule)


def _output_folder(args: TransformersArguments) -> Path:
    """Return `--output_dir`, after making sure that it can be written to, or made: not hours later."""
    out = Path(str(args.output_dir))
    try:
        if out.exists() and not out.is_dir():
            raise InputError(f"--output_dir {out} is a file: expected a folder, or a name for a new one")
        existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"--output_dir {out} cannot be written to: {error.strerror}") from error
    return out


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a file that is never there by half."""
    whole = path.with_name(f".{path.name}")
    whole.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(whole, path)


def _check_outside(out: Path, flags: FastkdArguments, cache: Path) -> None:
    """Raise InputError if something that the run needs lies in the folder that it may replace."""
    names = ("train_file", "eval_file", "dataset_name", "teacher", "student")
    for name, path in {"cache_dir": cache, **{name: getattr(flags, name) for name in names}}.items():
        if path is not None and Path(path).absolute().is_relative_to(out.absolute()):
            raise InputError(
                f"--{name} {path} lies in --output_dir {out}, which the run replaces: choose another place"
            )


def _cache(flags: FastkdArguments, args: TransformersArguments) -> Path:
    return Path(flags.cache_dir) if flags.cache_dir else Path(str(args.output_dir)).absolute().parent / "cache"


def _checkpoint(given: str | None, out: Path) -> Path | None:
    """Return the folder that `--resume_from_checkpoint` (a path, "last" or "true") means; None without the flag."""
    if given is None:
        return None
    if given.lower() in ("last", "true"):
        recover(out)
        broken = [f"{path.name}: {why}" for path in checkpoints(out) if (why := fault(path))]
        last = last_checkpoint(out)
        if last is None:
            other = f" that is whole ({'; '.join(broken)})" if broken else ""
            raise InputError(f"nothing to resume from: {out} holds no checkpoint{other}")
        if broken:
            print(f"continuing from {last}; passing over what is not whole ({'; '.join(broken)})")
        return last
    why = fault(Path(given))
    if why is not None:
        raise InputError(f"nothing to resume from: {given} is no checkpoint that is whole ({why})")
    if Path(given).absolute().parent != out.absolute() and out.is_dir() and any(out.iterdir()):
        raise InputError(f"{given} is a checkpoint of another run than {out}, which holds files: give its own folder")
    return Path(given)


# Flags that a resumed run may change: what it shows, and where things are. All others must stay.
_MAY_CHANGE = {
    "config", "transformers_flags", "overwrite_output_dir", "cache_dir", "workspace_mb", "report_examples",
    "train_file", "eval_file", "teacher_sharding",
}  # fmt: skip


def _identity(flags: FastkdArguments, args: TransformersArguments) -> dict[str, Any]:
    """Return the settings that must not change when a run is resumed; files count by what is in them, elsewhere."""
    ours = {name: value for name, value in vars(flags).items() if name not in _MAY_CHANGE}
    return json.loads(json.dumps(ours | recipe(args) | {"fsdp": is_asked_for(args)}))


def _check_same_run(record: Path, identity: dict[str, Any]) -> None:
    """Raise InputError if the run that wrote `record` was started with other settings."""
    before = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else identity
    for name, value in identity.items():
        if before.get(name) != value:
            raise InputError(
                f"cannot resume: the run was started with {name} {before.get(name)!r}, now it is {value!r}"
            )


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
        notes.append(
            "The distilled student started from a slice of its teacher; a student from scratch starts at random."
        )
    return notes


def _source_prefix(data: Data) -> str:
    """Return the words up to a first colon that all held-out sources begin with, such as "summarize: "."""
    words = {source.partition(": ")[0] for source in data.held_out_rows["source"][:100] if ": " in source}
    return f"{words.pop()}: " if len(words) == 1 else ""


def _trainers_facts(
    flags: FastkdArguments, args: TransformersArguments, data: Data, trainer: DistillTrainer, name: str, started: float
) -> dict[str, Any]:
    student: Any = trainer.model
    teacher = None if trainer.teacher is None else trainer.teacher.config
    return _facts(flags, args, data, trainer.method, student.config, teacher, name, started)


def _facts(
    flags: FastkdArguments,
    args: TransformersArguments,
    data: Data,
    method: Method,
    student: Any,
    teacher: Any,
    name: str,
    started: float,
) -> dict[str, Any]:
    """Return what a reader needs to judge or repeat the run of a student. student, teacher: their configs."""
    layers = method.teacher_layers(teacher) if method.places else {}
    relations = {
        "relation_heads": method.relation_heads,
        "teacher_layers": ", ".join(f"{layer} ({place})" for place, layer in layers.items()),
    }
    matched = {
        "matched_states": "; ".join(
            f"{stack} " + ", ".join(f"{mine} to {its}" for mine, its in pairs)
            for stack, pairs in (method.matched_states(student, teacher) if method.hidden_terms else {}).items()
        ),
        "match_first_position": method.match_first_position,
    }
    own = flags.teacher_dtype == "auto" and teacher is not None
    dtype = str(teacher.dtype).removeprefix("torch.") if own else flags.teacher_dtype
    used = {"teacher": flags.teacher or "trained on the same data", "teacher_dtype": dtype}
    mixed = {"mixup_alpha": method.mixup_alpha, "mixup_distance": method.mixup_distance}
    given, prefix = flags.train_file or flags.dataset_name, _source_prefix(data)
    return {
        "method": name,
        "loss": method.formula,
        "temperature": method.temperature,
        "divergence": method.divergence,
        "divergence_beta": method.divergence_beta,
        **(relations if method.places else {}),
        **(matched if method.hidden_terms else {}),
        **(mixed if method.mixup_terms else {}),
        **(used if method.needs_teacher else {}),
        **({"student": flags.student} if flags.student else {"student_init": method.student_init}),
        "task": flags.task,
        "texts": given or "documentation of the standard library",
        **({"dataset_config": flags.dataset_config} if flags.dataset_config else {}),
        **data.facts,
        **({"tokens_per_chunk": flags.sequence_length} if flags.task == "span_corruption" else {}),
        **({"source_prefix": prefix} if prefix else {}),
        **signatures([data.task.name], data.held_out_rows["target"]),
        "decoding": f"{args.generation_num_beams} beams" if (args.generation_num_beams or 1) > 1 else "greedy",
        "pieces": len(data.tokenizer),
        "batch": examples_per_step(args),
        "learning_rate": args.learning_rate,
        "embedding_learning_rate": flags.embedding_learning_rate or args.learning_rate,
        "seed": args.seed,
        "seconds_in_all": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
        "fastkd": fastkd.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
