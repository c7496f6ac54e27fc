"""What a run leaves: the student's folder with its card, and the report; and what its reader must know."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import fastkd

from ..common.cache import write_whole
from ..common.family import KINDS
from ..common.processes import by_first
from ..data.corpus import EMBEDDED
from ..flags.fields import FastkdArguments
from ..judge.evaluate import begins
from ..judge.metrics import signatures
from ..minidisc import pages
from ..minidisc.schedule import Schedule
from ..objectives.methods import Method
from ..report import reports
from ..report.card import write_card
from ..report.outcome import Outcome
from ..report.page import table
from ..stages.identity import examples_per_step, held_out_digest
from ..stages.judging import decoding
from ..stages.run import Run
from ..training.trainer import DistillTrainer
from .prepared import Prepared


def save(
    run: Run,
    trainer: DistillTrainer,
    method: Method,
    facts: dict[str, Any],
    outcomes: Sequence[Outcome],
    folder: Path,
) -> None:
    """Write a student, the configuration that repeats its run, and its model card.

    The card may be published, so it does not say where files lie.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    method = method.on(model.config)
    if KINDS[trainer.kind].answers:  # so that it writes for others, too, as it was judged
        for setting, value in {**decoding(run), **begins(model, run.data.tokenizer)}.items():
            setattr(model.generation_config, setting, value)
    trainer.save_model(str(folder))

    def describe() -> None:
        write_whole(folder / "config.yaml", run.flags.config_text(run.args))
        given = {name: Path(str(facts[name])) for name in ("texts", "teacher", "student") if name in facts}
        names = {name: path.name for name, path in given.items() if path.is_absolute() or path.exists()}
        teacher = run.flags.teacher if method.needs_teacher else None
        write_card(folder, method.summary, teacher, outcomes, facts | names, notes_on(method))

    by_first(describe)


def leave(ready: Prepared, outcomes: list[Outcome], facts: dict[str, Any], schedule: Schedule | None = None) -> None:
    """Write the report of a run whose students are saved, and print what is most worth knowing of it."""
    run, out = ready.run, ready.out
    lead = [compared(run, outcomes)] if run.flags.demo else []
    rows = run.data.held_out_rows.take(min(run.flags.report_examples, len(run.data.held_out_rows)))
    examples = list(zip(rows["source"], rows["target"], strict=True))
    shown: dict[str, Any] = {"lead": lead, "examples": examples, "config": run.flags.config_text(run.args)}
    shown |= pages.shown(schedule)
    by_first(lambda: reports.write(out, outcomes, facts, notes_on(run.flags.objective), **shown))
    if run.flags.demo:
        said = [*lead, "", reports.at_a_glance(outcomes, examples), "", reports.verdict(outcomes)]
        said.append(f"More in report.html; models in {out} ({time.perf_counter() - ready.started:.0f} s)")
    else:
        said = [table(outcomes), "", *notes_on(run.flags.objective)]
        said.append(f"Student, report.html and report.md in {out}")
    print("\n".join(["", *said]))


# What a reader must know ---------------------------------------------------------------------------------------------


def facts_of(ready: Prepared, method: Method, student: Any, teacher: Any, name: str) -> dict[str, Any]:
    """Return what a reader needs to judge or repeat the run of a student; teacher: None if it had none."""
    run = ready.run
    flags, args, data = run.flags, run.args, run.data
    method = method.on(student.config)
    facts: dict[str, Any] = {"method": name, "loss": method.formula, "temperature": method.temperature}
    facts |= {"divergence": method.divergence_in_words, "divergence_beta": method.divergence_beta}
    if method.places:
        layers = method.teacher_layers(teacher.config).items()
        facts["relation_heads"] = method.relation_heads
        facts["teacher_layers"] = ", ".join(f"{layer} ({place})" for place, layer in layers)
    if method.hidden_terms:
        facts["matched_states"] = "; ".join(
            f"{stack} " + ", ".join(f"{mine} to {its}" for mine, its in pairs)
            for stack, pairs in method.matched_states(student.config, teacher.config).items()
        )
        facts["match_first_position"] = method.match_first_position
    if method.mixup_terms:
        facts |= {"mixup_alpha": method.mixup_alpha, "mixup_distance": method.mixup_distance}
    if method.needs_teacher:
        own = flags.teacher_dtype == "auto"
        dtype = str(teacher.config.dtype).removeprefix("torch.") if own else flags.teacher_dtype
        facts |= {"teacher": flags.teacher or "trained on the same data", "teacher_dtype": dtype}
    rows = data.held_out_rows
    seconds = rows["pair"] if "pair" in rows.column_names else []
    facts |= {
        "student": flags.student,
        "student_init": None if flags.student else method.student_init,
        "task": flags.task,
        "texts": _texts(flags),
        "dataset_config": flags.dataset_config,
        "source_lang": flags.source_lang,
        "target_lang": flags.target_lang,
        "reads": "pairs of texts" if any(seconds) else None,
        "source_ends": "in a line break" if any(x.endswith("\n") for x in rows["source"][:1]) else None,
        **data.facts,
        "held_out_data": held_out_digest(data),
        "tokens_per_chunk": flags.sequence_length if data.task.is_text else None,
        "source_prefix": _source_prefix(run) or None,
        **signatures([data.task.name], data.held_out_rows["target"]),
        "decoding": f"{args.generation_num_beams} beams" if (args.generation_num_beams or 1) > 1 else "greedy",
        "pieces": len(data.tokenizer),
        "batch": examples_per_step(args),
        "learning_rate": args.learning_rate,
        "embedding_learning_rate": float(f"{flags.embedding_learning_rate or args.learning_rate:.6g}"),
        "seed": args.seed,
        "seconds_in_all": round(time.perf_counter() - ready.started, 1),
        "threads": torch.get_num_threads(),
        "fastkd": fastkd.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _texts(flags: FastkdArguments) -> str:
    """Return what to call the data."""
    return flags.train_file or flags.dataset_name or EMBEDDED[str(flags.embedded_data)]


_PREFIXES = {"summarization": "summarize: ", "translation": "translate .+? to .+?: "}


def _source_prefix(run: Run) -> str:
    """Return what the flags, or else the task, put before every source; of GLUE before its first text."""
    data = run.data
    if run.flags.source_prefix is not None:
        return run.flags.source_prefix
    name, is_glue = data.task.name, bool(data.task.columns)
    first = next(iter(data.held_out_rows["source"][:1]), "")
    found = re.match(_PREFIXES.get(name, rf"{name} \w+: " if is_glue else ""), first)
    return found[0] if found else ""


def notes_on(method: Method) -> list[str]:
    """Return what a reader of the figures must know about the method."""
    notes = []
    if not method.vocabulary_terms:
        notes.append(
            "This method has no vocabulary term, so its student was not trained to predict tokens: held-out loss and "
            "token accuracy say little before it is fine-tuned."
        )
    if method.prunes:
        notes.append("Assistants and student started from the teacher's weights, without its pruned heads and neurons.")
    if method.student_init == "slice":
        notes.append("The distilled student started from a slice of its teacher; one from scratch starts at random.")
    return notes


def compared(run: Run, outcomes: Sequence[Outcome]) -> str:
    """Return what the demo compares, in words for those who do not know it."""
    flags = run.flags
    teacher, *others, student = outcomes
    starts = {"scratch": "scratch (random first weights)", "sliced start": "sliced start (a slice of the teacher's)"}
    alone = " and ".join(starts[o.name] for o in others)
    labels, answers = "labels alone", ""
    if flags.labelled_examples:
        labels = f"{flags.labelled_examples:,} labelled examples alone"
        answers = " its answers to the other examples,"
    return (
        f"The teacher has {teacher.parameters / 1e6:.2f} million parameters and has learned {flags.task} from all "
        f"{len(run.data.train):,} training examples: {_texts(flags)}. The students, {student.parameters / 1e6:.2f} "
        f"million each, take {student.steps} steps. {alone} learn from {labels}; {student.name} has the teacher, "
        f"too:{answers} its distributions and what else the method compares."
    )
