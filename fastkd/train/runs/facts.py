"""What a reader of a run's figures must know: its settings, notes on its method, what a demo compares."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers

import fastkd

from ..data.corpus import EMBEDDED
from ..flags.fields import FastkdArguments
from ..judge.metrics import signatures
from ..objectives.methods import Method
from ..report.outcome import Outcome
from ..stages.identity import examples_per_step, held_out_digest
from ..stages.run import Run
from .prepared import Prepared


def facts_of(ready: Prepared, method: Method, student: Any, teacher: Any, name: str) -> dict[str, Any]:
    """Return what a reader needs to judge or repeat the run of a student; teacher: None if it had none."""
    run = ready.run
    flags, args, data = run.flags, run.args, run.data
    facts: dict[str, Any] = {"method": name, "loss": method.formula}
    facts |= _settings(method, "temperature") | {"divergence": method.divergence_in_words}
    facts |= _settings(method, "divergence_beta")
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
    prefix = _source_prefix(run)
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
        "seconds_in_all": round(time.perf_counter() - ready.started, 1),
        "threads": torch.get_num_threads(),
        "fastkd": fastkd.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _settings(method: Method, *names: str) -> dict[str, Any]:
    return {name: getattr(method, name) for name in names}


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
