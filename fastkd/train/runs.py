"""The two things fastkd-train does: `train` makes one student, `demo` compares two."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_utils import get_last_checkpoint

from . import report
from .arguments import FastkdArguments, TransformersArguments, chosen_method
from .cache import copy_folder, replace_folder
from .errors import InputError
from .objectives import METHODS, Method
from .stages import Data, Teacher, check_objective, evaluate_given, get_data, get_teacher, get_texts, train_student
from .student import load_teacher
from .trainer import DistillTrainer


def train(flags: FastkdArguments, args: TransformersArguments) -> None:
    """Train one student by `flags.method` into `args.output_dir`: its save_pretrained folder, checkpoints, a report.

    Raises InputError before anything is written if the folder holds files already and neither resuming nor
    overwriting was asked for, or if the run cannot be resumed.
    """
    started, method = time.perf_counter(), chosen_method(flags)
    out, cache = _output_folder(args), _cache(flags, args)
    checkpoint = _checkpoint(args.resume_from_checkpoint, out)
    if checkpoint is None and out.is_dir() and any(out.iterdir()) and not flags.overwrite_output_dir:
        raise InputError(
            f"{out} already holds files: give --resume_from_checkpoint last, --overwrite_output_dir or another folder"
        )
    if checkpoint is None and out.is_dir() and any(out.iterdir()) and not (out / "run.json").is_file():
        raise InputError(f"{out} holds files that no run of fastkd-train made, so they are not overwritten")
    model, tokenizer = load_teacher(flags.teacher) if flags.teacher else (None, None)
    check_objective(flags, method, model)
    data = get_data(flags, cache, get_texts(flags, cache), tokenizer)
    identity = _identity(flags, args, data)
    if checkpoint is not None:
        _check_same_run(checkpoint.parent / "run.json", identity)
    teacher = None
    if method.needs_teacher:
        given = Teacher(model, Path(flags.teacher), None) if flags.teacher else None
        teacher = given or get_teacher(flags, args, cache, data)

    if checkpoint is None and out.is_dir():
        shutil.rmtree(out)  # --overwrite_output_dir; only now, when no input can turn out bad any more
    out.mkdir(parents=True, exist_ok=True)
    (out / "run.json").write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
    trainer, outcome = train_student(flags, args, data, flags.method, method, teacher, checkpoint)
    trainer.save_model(str(out))
    outcomes = [teacher.outcome, outcome] if teacher and teacher.outcome else [outcome]
    report.write(out, outcomes, _facts(flags, args, data, trainer, started), _notes(method))
    print("\n".join(["", report.table(outcomes), "", *_notes(method), f"Student and report.md in {out}"]))


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
    if out.is_dir() and any(out.iterdir()) and not (out / "demo.json").is_file():
        raise InputError(f"{out} already holds files that no demo made: give --output_dir another folder")
    args = replace(args, save_strategy="no")
    model, tokenizer = load_teacher(flags.teacher) if flags.teacher else (None, None)
    check_objective(flags, method, model)
    data = get_data(flags, cache, get_texts(flags, cache), tokenizer)
    if flags.teacher:
        teacher = Teacher(model, Path(flags.teacher), evaluate_given(flags, args, data, model))
    else:
        teacher = get_teacher(flags, args, cache, data)

    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps(_identity(flags, args, data), indent=2) + "\n", encoding="utf-8")
    outcomes = [teacher.outcome] if teacher.outcome else []
    copy_folder(teacher.folder, out / "teacher")
    for name, folder, objective in (("scratch", "scratch", METHODS["scratch"]), (flags.method, "student", method)):
        trainer, outcome = train_student(flags, args, data, name, objective, teacher)
        replace_folder(out / folder, _saver(trainer))
        outcomes.append(outcome)
    report.write(out, outcomes, _facts(flags, args, data, trainer, started), _notes(method))
    print("\n".join(["", report.table(outcomes), "", report.verdict(outcomes), *_notes(method)]))
    print(f"Teacher, student, report.md and metrics.json in {out} ({time.perf_counter() - started:.0f} s)")


def _saver(trainer: DistillTrainer) -> Callable[[Path], None]:
    return lambda folder: trainer.save_model(str(folder))


def _output_folder(args: TransformersArguments) -> Path:
    out = Path(str(args.output_dir))
    if out.exists() and not out.is_dir():
        raise InputError(f"--output_dir {out} is a file: expected a folder, or a name for a new one")
    return out


def _cache(flags: FastkdArguments, args: TransformersArguments) -> Path:
    return Path(flags.cache_dir) if flags.cache_dir else Path(str(args.output_dir)).absolute().parent / "cache"


def _checkpoint(given: str | None, out: Path) -> Path | None:
    """Return the folder that `--resume_from_checkpoint` (a path, "last" or "true") means; None without the flag."""
    if given is None:
        return None
    if given.lower() in ("last", "true"):
        last = get_last_checkpoint(str(out)) if out.is_dir() else None
        if last is None:
            raise InputError(f"nothing to resume from: {out} holds no checkpoint")
        return Path(last)
    if not (Path(given) / "trainer_state.json").is_file():
        raise InputError(f"nothing to resume from: {given} is no checkpoint (it has no trainer_state.json)")
    return Path(given)


def _identity(flags: FastkdArguments, args: TransformersArguments, data: Data) -> dict[str, Any]:
    """Return the settings that must not change when a run is resumed."""
    names = ["method", "temperature", "divergence", "divergence_beta", "weights", "relation_heads", "teacher_layer"]
    names += ["match_first_position", "teacher", "student_layers", "student_d_model", "student_init", "sequence_length"]
    if not flags.teacher:
        names += ["teacher_layers", "teacher_d_model", "teacher_steps", "teacher_learning_rate"]
    return {**{name: getattr(flags, name) for name in names}, "seed": args.seed, "texts": data.digest}


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
    if method.student_init == "slice":
        notes.append(
            "The distilled student started from a slice of its teacher; a student from scratch starts at random."
        )
    return notes


def _facts(
    flags: FastkdArguments, args: TransformersArguments, data: Data, trainer: DistillTrainer, started: float
) -> dict[str, Any]:
    """Return what a reader needs to judge or repeat the run of the student that `trainer` trained."""
    method = trainer.method
    relations = {
        "relation_heads": method.relation_heads,
        "teacher_layers": ", ".join(f"{layer} ({place})" for place, layer in trainer.teacher_layers.items()),
    }
    matched = {
        "matched_states": "; ".join(
            f"{stack} " + ", ".join(f"{mine} to {its}" for mine, its in pairs)
            for stack, pairs in trainer.matched_states.items()
        ),
        "match_first_position": method.match_first_position,
    }
    return {
        "method": flags.method,
        "loss": method.formula,
        "temperature": method.temperature,
        "divergence": method.divergence,
        "divergence_beta": method.divergence_beta,
        **(relations if method.places else {}),
        **(matched if method.hidden_terms else {}),
        "student_init": method.student_init,
        "texts": flags.train_file or "documentation of the standard library",
        "training_chunks": len(data.train),
        "held_out_chunks": len(data.held_out),
        "tokens_per_chunk": flags.sequence_length,
        "pieces": len(data.tokenizer),
        "batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning_rate": args.learning_rate,
        "embedding_learning_rate": flags.embedding_learning_rate,
        "seed": args.seed,
        "seconds_in_all": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
