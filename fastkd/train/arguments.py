"""The flags of fastkd-train: its own, then every field of transformers' Seq2SeqTrainingArguments."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

import fastkd

from .errors import InputError
from .objectives import METHODS, STUDENT_INITS, Method

# Our defaults for transformers' flags. They are the demo's: a small student on two CPU cores.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.01,
    "adam_beta2": 0.98,
    "max_steps": 300,
    "num_train_epochs": 0.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "eval_strategy": "steps",
    "eval_steps": 0.2,
    "logging_steps": 0.02,
    "save_steps": 200.0,
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": False,  # transformers' own default follows its log level, which the command line lowers
    "dataloader_pin_memory": torch.cuda.is_available(),
}

_EXAMPLES = """\
examples:
  fastkd-train --demo
      everything from nothing: corpus, tokenizer, teacher, distilled student, and the same student from scratch
  fastkd-train --method kd --output_dir runs/kd
      distil one student from the embedded teacher
  fastkd-train --method mlmkd --teacher runs/demo/teacher --train_file my.txt --output_dir runs/mine
      distil on your own text (UTF-8, paragraphs separated by blank lines) from your own T5
  fastkd-train --demo --method miniend-e
      the same comparison for MiniEnD-E: logits, and relations of queries, keys and values in encoder and decoder
  fastkd-train --method miniend-d --divergence jsd --weights logit_kl=0.5 --output_dir runs/jsd
      another divergence, and another weight of one term
  fastkd-train --demo --method hsm-cka
      the same comparison for HSM: hidden states matched by CKA, student sliced from the teacher
  fastkd-train --method hsm-kd --divergence reverse_kl --output_dir runs/hsm-kd
      HSM's arm without hidden states; the divergence, where given, should be the same in every arm
  fastkd-train --method kd --output_dir runs/kd --resume_from_checkpoint last
      continue an interrupted run: the same command plus this flag
"""


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class FastkdArguments:
    """What fastkd-train adds to transformers' arguments."""

    _argument_group_name = "fastkd"

    method: str = _help("; ".join(f"{name}: {m.summary}" for name, m in METHODS.items()), "mlmkd")
    demo: bool = _help("compare distillation with training from scratch, from nothing, in a few minutes", False)
    list_methods: bool = _help("print the methods with their terms and weights, and stop", False)
    teacher: str | None = _help("folder of a T5 with its tokenizer; without it, one is trained on the same texts", None)
    train_file: str | None = _help("UTF-8 text to learn from; without it, the embedded corpus", None)
    eval_file: str | None = _help("UTF-8 text to evaluate on; without it, a held-out 5 %% of the training texts", None)
    student_layers: int = _help("encoder layers, and as many decoder layers", 2)
    student_d_model: int = _help(
        "width; heads are 32 wide and feed-forward layers 4 times as wide, or for a slice as in the teacher", 64
    )
    student_init: str | None = _help(
        f"{' or '.join(STUDENT_INITS)}: the top-left part of every matrix of the teacher, whose variant of T5 it then "
        "shares, or random weights; without it, the method's own",
        None,
    )
    temperature: float | None = _help("of the logit term; without it, the method's own", None)
    divergence: str | None = _help(
        f"of logit and relation terms: {', '.join(fastkd.DIVERGENCES)}; without it, the method's own", None
    )
    divergence_beta: float | None = _help("of jsd, skew_kl and skew_reverse_kl; without it, the method's own", None)
    weights: str | None = _help("TERM=NUMBER,... in place of the method's own weights of these terms", None)
    relation_heads: int | None = _help(
        "into which relation terms split queries, keys and values; without it, the method's own", None
    )
    teacher_layer: int | None = _help(
        "whose queries, keys and values relation terms take, from 1; without it the last, but 21 of 24", None
    )
    match_first_position: bool = _help(
        "hsm methods compare the first decoder position too, which reads the start token", False
    )
    projection_learning_rate: float = _help("of the matrix by which hsm-linear projects hidden states", 1e-4)
    sequence_length: int = _help("tokens per chunk, before span corruption", 128)
    vocabulary_size: int = _help("pieces of the trained tokenizer, 100 sentinels included", 4096)
    teacher_layers: int = _help("of the trained teacher", 2)
    teacher_d_model: int = _help("of the trained teacher", 128)
    teacher_steps: int = _help("of the trained teacher", 450)
    teacher_learning_rate: float = _help("of the trained teacher", 2e-3)
    embedding_learning_rate: float | None = _help(
        "of the tied embedding, which starts at standard deviation 1 and needs larger steps than the other weights",
        0.16,
    )
    workspace_mb: float | None = _help("memory of the fused loss; without it, fastkd's default", None)
    cache_dir: str | None = _help(
        "where corpus, tokenizer and trained teacher are kept for other runs; without it, cache/ beside output_dir",
        None,
    )
    overwrite_output_dir: bool = _help("replace the run that output_dir already holds", False)


class TransformersArguments(Seq2SeqTrainingArguments):
    """Seq2SeqTrainingArguments in a group of its own, so that --help lists fastkd's flags first."""

    _argument_group_name = "transformers.Seq2SeqTrainingArguments"


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)  # argparse would print a hundred flags of usage first


def make_parser() -> HfArgumentParser:
    """Return the parser of all flags."""
    groups: Any = [FastkdArguments, TransformersArguments]
    parser = _Parser(
        groups,
        prog="fastkd-train",
        usage="fastkd-train (--demo | --method METHOD) [--output_dir FOLDER] [flags]",
        description="Distil a T5 teacher into a smaller T5 student, without ever materialising vocabulary logits.",
        epilog=_EXAMPLES,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(**DEFAULTS)
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the epilog's line breaks."""


def closest(given: str, known: Sequence[str]) -> str:
    """Return "; did you mean 'x'?" for the most similar known word, or nothing if none is similar."""
    match = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def parse(argv: Sequence[str]) -> tuple[FastkdArguments, TransformersArguments]:
    """Parse and check the flags.

    Raises InputError for unknown flags and methods (with the closest known one) and for values out of range.
    """
    parser = make_parser()
    try:
        fastkd_args, args, unknown = parser.parse_args_into_dataclasses(
            list(argv), return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError) as error:  # transformers' own checks of its arguments
        raise InputError(" ".join(str(error).split())) from error
    if unknown:
        word = unknown[0]
        flags = [option for action in parser._actions for option in action.option_strings]
        kind = "flag" if word.startswith("-") else "argument"
        raise InputError(f"unknown {kind} {word!r}" + closest(word.split("=")[0], flags))
    _check(fastkd_args, args)
    return fastkd_args, args


def chosen_method(flags: FastkdArguments) -> Method:
    """Return the method with the flags' settings in place of its own.

    Raises InputError for weights of terms that the method lacks, that are no numbers, or that leave no term.
    """
    method = METHODS[flags.method]
    names = ["temperature", "divergence", "divergence_beta", "relation_heads", "teacher_layer"]
    names += ["match_first_position", "student_init"]
    given = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    terms = {**method.terms}
    if flags.weights is not None:
        terms |= dict(_weight(text, method) for text in flags.weights.split(","))
    terms = {term: weight for term, weight in terms.items() if weight != 0}
    if not terms:
        raise InputError(f"--weights: every term of {flags.method} has weight 0")
    return replace(method, terms=terms, **given)


def _weight(text: str, method: Method) -> tuple[str, float]:
    """Return (term, weight) of "TERM=NUMBER"."""
    term, _, number = text.partition("=")
    if term not in method.terms:
        terms = list(method.terms)
        raise InputError(f"--weights: no term {term!r}{closest(term, terms)} (terms: {', '.join(terms)})")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise InputError(f"--weights: expected {term}=NUMBER, 0 or above, got {text!r}")
    return term, weight


def _check(fastkd_args: FastkdArguments, args: TransformersArguments) -> None:
    if fastkd_args.method not in METHODS:
        raise InputError(
            f"unknown method {fastkd_args.method!r}{closest(fastkd_args.method, list(METHODS))} "
            f"(methods: {', '.join(METHODS)})"
        )
    if fastkd_args.demo and not METHODS[fastkd_args.method].needs_teacher:
        raise InputError("--demo compares a distillation method with scratch: choose another --method")
    for name in ("student_layers", "student_d_model", "teacher_layers", "teacher_d_model", "teacher_steps"):
        if getattr(fastkd_args, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(fastkd_args, name)}")
    if fastkd_args.sequence_length < 8:
        raise InputError(f"--sequence_length must be at least 8, got {fastkd_args.sequence_length}")
    if fastkd_args.vocabulary_size < 512:
        raise InputError(f"--vocabulary_size must be at least 512, got {fastkd_args.vocabulary_size}")
    if fastkd_args.temperature is not None and not fastkd_args.temperature > 0:
        raise InputError(f"--temperature must be above 0, got {fastkd_args.temperature}")
    if fastkd_args.divergence is not None and fastkd_args.divergence not in fastkd.DIVERGENCES:
        names = list(fastkd.DIVERGENCES)
        raise InputError(
            f"unknown divergence {fastkd_args.divergence!r}{closest(fastkd_args.divergence, names)} "
            f"(divergences: {', '.join(names)})"
        )
    if fastkd_args.divergence_beta is not None and not 0 < fastkd_args.divergence_beta < 1:
        raise InputError(f"--divergence_beta must be between 0 and 1, got {fastkd_args.divergence_beta}")
    if fastkd_args.student_init is not None and fastkd_args.student_init not in STUDENT_INITS:
        raise InputError(f"--student_init: expected {' or '.join(STUDENT_INITS)}, got {fastkd_args.student_init!r}")
    method = chosen_method(fastkd_args)
    if method.student_init == "slice" and not method.needs_teacher:
        raise InputError(f"--student_init: {fastkd_args.method} has no teacher to slice, expected random, got 'slice'")
    if not fastkd_args.projection_learning_rate > 0:
        raise InputError(f"--projection_learning_rate must be above 0, got {fastkd_args.projection_learning_rate}")
    if fastkd_args.workspace_mb is not None and not fastkd_args.workspace_mb > 0:
        raise InputError(f"--workspace_mb must be above 0, got {fastkd_args.workspace_mb}")
    if args.predict_with_generate:
        raise InputError("--predict_with_generate is not supported: evaluation is the loss and the token accuracy")
    if args.num_train_epochs > 0:
        if args.max_steps != DEFAULTS["max_steps"]:
            raise InputError("give --max_steps or --num_train_epochs, not both")
        args.max_steps = -1  # our default must not override the epochs that were asked for
    elif args.max_steps <= 0:
        raise InputError("give --max_steps or --num_train_epochs above 0")
    if args.output_dir == "trainer_output":  # transformers' default
        args.output_dir = str(Path("runs") / ("demo" if fastkd_args.demo else fastkd_args.method))
