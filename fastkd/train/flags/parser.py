"""How fastkd-train's own flags are read, and its help, from the fields' metadata; nothing heavy is imported."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from ..common.errors import closest
from . import config
from .fields import GLUE, GROUPS, USUAL, parse_grid, parse_mix, parse_weights

# Our defaults for transformers' flags; `--demo` has its own, configs/demo.yaml.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 3e-4,
    "warmup_steps": 0.05,
    "weight_decay": 0.01,
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "logging_steps": 0.01,
    "save_steps": 0.1,
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": False,
}
# What --help says of those of transformers' flags that people set: (name, what follows it, help).
_USUAL = (
    ("output_dir", "FOLDER", "for the student, its report and checkpoints; without it, runs/METHOD"),
    ("num_train_epochs", "X", "passes over the data (default: 3.0)"),
    ("max_steps", "N", "steps of the optimiser, in place of epochs"),
    ("learning_rate", "X", "at its highest"),
    ("lr_scheduler_type", "NAME", "how it falls, such as cosine or constant (default: linear)"),
    ("warmup_steps", "X", "in which it rises; below 1 their share of all steps"),
    ("per_device_train_batch_size", "N", "examples (default: 8)"),
    ("gradient_accumulation_steps", "N", "batches to a step (default: 1)"),
    ("bf16", None, "compute in bfloat16"),
    ("gradient_checkpointing", None, "less memory, more time; activation_checkpointing in new transformers"),
    ("eval_steps", "X", "between evaluations; below 1 their share of all steps"),
    ("save_steps", "X", "between checkpoints, likewise"),
    ("load_best_model_at_end", None, "keep the weights of the best checkpoint, by --metric_for_best_model"),
    ("predict_with_generate", None, "score generated texts at every evaluation, not only at the end"),
    ("resume_from_checkpoint", "PATH", "last, or the folder of one"),
    ("report_to", "NAME", "tensorboard, wandb or another logger"),
    ("seed", "N", "of weights, orders and corruptions (default: 42)"),
    ("use_cpu", None, "also where there is a GPU"),
    ("fsdp", None, "shard the student over the processes of torchrun"),
)


def _boolean(text: str) -> bool:
    known = {"true": True, "yes": True, "1": True, "t": True, "y": True}
    known |= {"false": False, "no": False, "0": False, "f": False, "n": False}
    return known[text.lower()]


_MEANT = {"interpolated": "; it goes with any method: give --interpolated and a --method"}
# How each annotation is read, what it expects, and what the help calls it.
_KINDS: dict[str, tuple[Callable[[str], Any], str, str | None]] = {
    "str": (str, "a word", "NAME"),
    "list[str]": (str, "words", "FOLDER ..."),
    "int": (int, "a whole number", "N"),
    "float": (float, "a number", "X"),
    "bool": (_boolean, "true or false", None),
    "dict[str, float]": (parse_weights, "TERM=NUMBER,...", "TERM=X,..."),
    "str | dict[str, float]": (parse_mix, "NAME or NAME=NUMBER,...", "NAME"),
    "list[float]": (parse_grid, "NUMBER,...", "X,..."),
}
ABOUT = {
    "help": "this text, and stop",
    "help_all": "every flag, and stop",
    "list_methods": "the methods with their terms and weights, and stop",
    "version": "the versions of fastkd, torch and transformers, and stop",
}
JOINED = ("dict[str, float]", "str | dict[str, float]", "list[float]")  # written with commas


def kind_of(field: dataclasses.Field[Any]) -> str:
    """Return a field's annotation without its None."""
    return str(field.type).removesuffix(" | None")


def reader(field: dataclasses.Field[Any]) -> Callable[[str], Any]:
    """Return what reads a flag's word, and raises ArgumentTypeError if it is no value that the field can have."""
    kind = kind_of(field)
    read, expected, _ = _KINDS[kind]

    def value_of(word: str) -> Any:
        try:
            value = read(word)
        except (ValueError, KeyError) as error:
            problem = str(error) if kind in JOINED else f"expected {expected}, got {word!r}"
            raise argparse.ArgumentTypeError(problem) from error
        if field.name == "task" and value.removeprefix("glue/") in GLUE:
            value = value.removeprefix("glue/")
        choices = field.metadata["choices"]
        names = value if isinstance(value, dict) else [value]
        if unknown := [name for name in names if choices and name not in choices]:
            hint = _MEANT.get(unknown[0]) or closest(unknown[0], choices)
            raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}{hint} (known: {', '.join(choices)})")
        if kind in ("int", "float"):
            check_bounds(value, field.metadata)
        return value

    return value_of


def check_bounds(value: float, bounds: Mapping[str, Any]) -> None:
    """Raise ArgumentTypeError for a number that is not finite, or not within those of the bounds that there are."""
    known = {"above": operator.gt, "least": operator.ge, "below": operator.lt, "most": operator.le}
    limits = {name: bounds[name] for name in known if name in bounds}
    if not math.isfinite(value) or not all(known[name](value, limit) for name, limit in limits.items()):
        words = {"least": "at least", "most": "at most"}
        wanted = [f"{words.get(name, name)} {limit:g}" for name, limit in limits.items()]
        wanted = wanted if math.isfinite(value) else ["finite", *wanted]
        raise argparse.ArgumentTypeError(f"must be {' and '.join(wanted)}, got {value}")


def bounded(read: Callable[[str], Any], bounds: Mapping[str, Any]) -> Callable[[str], Any]:
    """Return a reader of numbers within bounds."""

    @functools.wraps(read)  # argparse's messages take its name
    def value_of(word: str) -> Any:
        value = read(word)
        check_bounds(value, bounds)
        return value

    return value_of


def fields_by_name() -> dict[str, dataclasses.Field[Any]]:
    """Return the fields of fastkd-train's own flags."""
    return {field.name: field for part in GROUPS for field in dataclasses.fields(part)}


def help_text(everything: bool = False) -> str:
    """Return the help of the flags that people use, or of all of fastkd-train's own."""
    parser = argparse.ArgumentParser(
        prog="fastkd-train",
        usage="fastkd-train (--demo [NAME] | --method METHOD | --config FILE) [flags]",
        description="Distil a T5, BART, BERT, GPT-2, Llama or their kin into a smaller one, without vocabulary logits.",
        epilog=(config.TEXTS / "examples.txt").read_text(encoding="utf-8"),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=100),
        add_help=False,
    )
    groups: dict[str, list[tuple[str, str | None, str]]] = {}
    groups["about"] = [(name, None, text) for name, text in ABOUT.items()]
    for part in GROUPS:
        shown = [field for field in dataclasses.fields(part) if everything or field.name in USUAL]
        groups[part._argument_group_name] = [(f.name, _KINDS[kind_of(f)][2], _explained(f)) for f in shown]
    if not everything:
        groups["training, by transformers' Seq2SeqTrainingArguments"] = [*_USUAL]
    for title, rows in groups.items():
        group = parser.add_argument_group(title)
        for name, metavar, text in rows:
            default = f" (default: {DEFAULTS[name]})" if DEFAULTS.get(name, "none") != "none" else ""
            kind: dict[str, Any] = {"metavar": metavar} if metavar else {"action": "store_true"}
            group.add_argument(f"--{name}", help=text + default, **kind)
    return parser.format_help()


def _explained(field: dataclasses.Field[Any]) -> str:
    """Return a field's help with its choices and its default."""
    choices, default = field.metadata["choices"], field.default
    text = field.metadata["help"] + (f": {', '.join(choices)}" if choices and field.name != "method" else "")
    return text if default is None or default is False else f"{text} (default: {default})"
